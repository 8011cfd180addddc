import { ReprieveError, show } from '../errors.js';

/** Path that stands for the whole machine: no memcg can be watched there. */
export const SYSTEM_PATH = '/';

/** A path as it is shown to people, and in reports. */
export function shownPath(path: string): string {
  return path === SYSTEM_PATH ? 'system' : path;
}

/** The scope of a path. */
export function scopeOf(path: string): string {
  return path === SYSTEM_PATH ? 'system' : `memcg:${path}`;
}

/**
 * Path of a scope 'memcg:/path' below the memory hierarchy's root; '/' for 'system'.
 * @throws ReprieveError ERR_REPRIEVE_INVALID_SCOPE
 */
export function parseScope(scope: unknown): string {
  if (scope === 'system') return SYSTEM_PATH;
  const refuse = (why: string) =>
    new ReprieveError(
      'ERR_REPRIEVE_INVALID_SCOPE',
      `Expected the scope to be 'memcg:/path' or 'system', got ${show(scope)}: ${why}`,
    );
  if (typeof scope !== 'string' || !scope.startsWith('memcg:')) throw refuse("it does not start with 'memcg:'");
  const path = scope.slice('memcg:'.length).replace(/(?<=.)\/+$/, '');
  if (!path.startsWith('/')) throw refuse('the path is not absolute');
  if (path === '/') throw refuse("the root memcg has no limit of its own; the whole machine is the scope 'system'");
  if (path.includes('\0')) throw refuse('the path holds a NUL');
  const bad = path
    .slice(1)
    .split('/')
    .find((name) => name === '' || name === '.' || name === '..');
  if (bad !== undefined) throw refuse(`'${bad}' is no name of a memcg`);
  return path;
}
