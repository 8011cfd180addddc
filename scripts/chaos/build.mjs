// The observer, and guards with something switched off or under sanitizers.
import { readdirSync, readFileSync } from 'node:fs';
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
  const headers = files('.h');
  const sources = files('.cc');
  if (sanitize) sources.push(`${root}/native/chaos/sanitizer_options.cc`);
  const flags = [...GUARD_FLAGS, ...(sanitize ? SANITIZED : ['-static'])];
  // What no mutant changes is compiled once for all of them.
  const varies = (source) => readFileSync(source, 'utf8').includes('REPRIEVE_MUTANT');
  const same = sources.filter((source) => !varies(source));
  const common = compile('common.o', same, { headers, flags: [...flags, '-r', '-nostdlib'] });
  if (mutant !== null) flags.push(`-DREPRIEVE_MUTANT_NO_${mutant.toUpperCase()}`);
  return compile('reprieve-guard', [...sources.filter(varies), common], { headers, flags });
}

function filesIn(folder, end) {
  const names = readdirSync(folder).filter((name) => name.endsWith(end));
  return names.sort().map((name) => `${folder}/${name}`);
}
