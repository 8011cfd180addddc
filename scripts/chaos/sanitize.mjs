// The addon under AddressSanitizer and UBSan: built by cmake into the user's cache, and loaded in place of the shipped one.
import { spawnSync } from 'node:child_process';
import { readdirSync, readFileSync, rmSync } from 'node:fs';
import { basename, dirname, join } from 'node:path';
import { buildFolder, root } from '../cache.mjs';
import { sanitizerLog } from './build.mjs';

/** Builds it, and returns the environment in which a handler uses it. */
export function sanitized() {
  const folder = buildFolder('addon-sanitized', 'g++');
  run(join(root, 'node_modules/.bin/cmake-js'), ['build', '--out', folder, '--CDREPRIEVE_SANITIZE=address,undefined']);
  const library = run('g++', ['-print-file-name=libasan.so']).trim();
  return {
    LD_PRELOAD: library,
    ASAN_OPTIONS: 'detect_leaks=0:abort_on_error=1',
    UBSAN_OPTIONS: 'print_stacktrace=1:halt_on_error=1',
    REPRIEVE_NATIVE_DIRECTORY: join(folder, 'Release'),
  };
}

/** What guards found since the last call. */
export function sanitizerFindings() {
  const folder = dirname(sanitizerLog);
  const files = readdirSync(folder).filter((file) => file.startsWith(`${basename(sanitizerLog)}.`));
  return files.map((file) => {
    const text = readFileSync(join(folder, file), 'utf8');
    rmSync(join(folder, file));
    return `the guard, under sanitizers: ${text.slice(0, 3000)}`;
  });
}

function run(program, words) {
  const { status, stdout, stderr, error } = spawnSync(program, words, { cwd: root, encoding: 'utf8' });
  if (status !== 0) throw new Error(`${program} ${words.join(' ')}: ${error?.message ?? stderr}`);
  return stdout;
}
