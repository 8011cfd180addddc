import { ReprieveError, show } from '../errors.js';

/**
 * Path of a scope 'memcg:/path' below the memory hierarchy's root.
 * @throws ReprieveError ERR_REPRIEVE_INVALID_SCOPE, ERR_REPRIEVE_UNSUPPORTED (for 'system')
 */
export function parseScope(scope: unknown): string {
  if (scope === 'system') {
    throw new ReprieveError(
      'ERR_REPRIEVE_UNSUPPORTED',
      "The scope 'system' is not offered yet; expected 'memcg:/path'",
    );
  }
  const refuse = (why: string) =>
    new ReprieveError(
      'ERR_REPRIEVE_INVALID_SCOPE',
      `Expected the scope to be 'memcg:/path', got ${show(scope)}: ${why}`,
    );
  if (typeof scope !== 'string' || !scope.startsWith('memcg:')) throw refuse("it does not start with 'memcg:'");
  const path = scope.slice('memcg:'.length).replace(/(?<=.)\/+$/, '');
  if (!path.startsWith('/')) throw refuse('the path is not absolute');
  if (path === '/') throw refuse('the root memcg has no limit of its own and refuses oom_kill_disable');
  if (path.includes('\0')) throw refuse('the path holds a NUL');
  const bad = path
    .slice(1)
    .split('/')
    .find((name) => name === '' || name === '.' || name === '..');
  if (bad !== undefined) throw refuse(`'${bad}' is no name of a memcg`);
  return path;
}
