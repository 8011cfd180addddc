// The observer, and guards with something switched off or under sanitizers.
import { readdirSync } from 'node:fs';
import { join } from 'node:path';
import { cache, compile, root } from '../cache.mjs';

/** As binding.gyp builds it. */
const GUARD_FLAGS = ['-fno-exceptions', '-fno-rtti'];

/** Where the guard under sanitizers says what it found, in files of this name and its process number. */
export const sanitizerLog = join(cache, 'chaos-sanitizer-log');

const SANITIZED = [
  '-fsanitize=address,undefined',
  '-fno-sanitize=vptr',
  '-fno-sanitize-recover=all',
  '-g',
  `-DREPRIEVE_SANITIZER_LOG="${sanitizerLog}"`,
];

export function buildObserver() {
  return compile('reprieve-chaos-observer', [`${root}/native/chaos/observer.cc`]);
}

/** @param mutant that step does nothing; null for none. */
export function buildGuard(mutant, { sanitize = false } = {}) {
  const files = (end) => ['guard', 'core'].flatMap((folder) => filesIn(`${root}/native/${folder}`, end));
  const sources = files('.cc');
  const flags = [...GUARD_FLAGS, ...(sanitize ? SANITIZED : ['-static'])];
  if (sanitize) sources.push(`${root}/native/chaos/sanitizer_options.cc`);
  if (mutant !== null) flags.push(`-DREPRIEVE_MUTANT_NO_${mutant.toUpperCase()}`);
  return compile('reprieve-guard', sources, { headers: files('.h'), flags });
}

function filesIn(folder, end) {
  const names = readdirSync(folder).filter((name) => name.endsWith(end));
  return names.sort().map((name) => `${folder}/${name}`);
}
