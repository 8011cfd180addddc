#!/usr/bin/env node
// Runs libFuzzer on what parses the input of others: the guard's messages, what is written down, the kernel's files.
//   npm run fuzz -- [--seconds 600] [--check] [name…]
// New inputs that reach new code are kept in test/fuzz/<name>, smallest set only (-set_cover_merge); not with --check.
import { spawnSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, readdirSync, renameSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { buildNative, root } from './cache.mjs';

const { values, positionals } = parseArgs({
  options: { seconds: { type: 'string', default: '60' }, check: { type: 'boolean', default: false } },
  allowPositionals: true,
});
const known = readdirSync(join(root, 'native/fuzz')).map((name) => name.replace('_fuzz.cc', ''));
const names = positionals.length > 0 ? positionals : known;
for (const name of names) {
  if (!known.includes(name)) fail(`there is no fuzzer '${name}'; expected ${known.join(', ')}`);
}

function fail(sentence) {
  process.stderr.write(`fuzz: ${sentence}\n`);
  process.exit(2);
}

function run(command, args, options = {}) {
  const { status, error } = spawnSync(command, args, { cwd: root, stdio: 'inherit', ...options });
  if (error) fail(`${command}: ${error.message}`);
  return status === 0;
}

const options = ['-DCMAKE_BUILD_TYPE=RelWithDebInfo', '-DREPRIEVE_FUZZ=ON', '-DREPRIEVE_SANITIZE=address,undefined'];
let build;
try {
  build = buildNative(
    'fuzz',
    'clang++-14',
    options,
    names.map((name) => `${name}_fuzz`),
  );
} catch (error) {
  fail(`${error.message}; Debian: clang-14, libclang-rt-14-dev`);
}

let found = false;
for (const name of names) {
  const corpus = join(root, 'test/fuzz', name);
  mkdirSync(corpus, { recursive: true });
  const scratch = mkdtempSync(join(tmpdir(), 'reprieve-fuzz-'));
  const [grown, merged] = ['grown', 'merged'].map((part) => join(scratch, part));
  for (const folder of [grown, merged]) mkdirSync(folder);
  const fuzzer = join(build, `${name}_fuzz`);
  process.stdout.write(`\n== ${name}, ${values.seconds} s\n`);
  const clean = run(fuzzer, [grown, corpus, `-max_total_time=${values.seconds}`, '-print_final_stats=1'], {
    cwd: scratch,
  });
  if (clean && !values.check) {
    run(fuzzer, ['-set_cover_merge=1', merged, corpus, grown], { stdio: 'ignore' });
    rmSync(corpus, { recursive: true });
    mkdirSync(corpus);
    for (const input of readdirSync(merged)) renameAcross(join(merged, input), join(corpus, input));
  } else if (!clean) {
    found = true;
    process.stdout.write(`${name}: the input that broke it is in ${scratch}\n`);
    continue;
  }
  rmSync(scratch, { recursive: true });
}
process.exitCode = found ? 1 : 0;

/** The scratch folder may be on another file system. */
function renameAcross(from, to) {
  try {
    renameSync(from, to);
  } catch (error) {
    if (error.code !== 'EXDEV') throw error;
    run('cp', [from, to]);
  }
}
