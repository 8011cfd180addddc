#!/usr/bin/env node
// Builds and runs the tests of native/core under AddressSanitizer and UndefinedBehaviorSanitizer, with plain CMake.
// --tidy runs clang-tidy over native/core and native/addon as well; what else is given goes to doctest.
import { spawn, spawnSync } from 'node:child_process';
import { existsSync, readdirSync, readFileSync, rmdirSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { join } from 'node:path';
import { buildNative, root } from './cache.mjs';

const arguments_ = process.argv.slice(2).filter((argument) => argument !== '--tidy');
const tidy = process.argv.includes('--tidy');
const TIMEOUT_MS = 180_000;

function fail(sentence) {
  process.stderr.write(`native-test: ${sentence}\n`);
  process.exit(1);
}

function build() {
  const options = ['-DCMAKE_BUILD_TYPE=Debug', '-DREPRIEVE_SANITIZE=address,undefined'];
  try {
    return buildNative('native', process.env.CXX ?? 'g++', options, ['reprieve-native-test']);
  } catch (error) {
    fail(error.message);
  }
}

/** Cgroups that a crash of the test program left behind: its process id is in their names. */
function removeLeftovers(directory, prefix) {
  if (!existsSync(directory)) return;
  for (const entry of readdirSync(directory, { withFileTypes: true })) {
    if (!entry.isDirectory() || !entry.name.startsWith(prefix)) continue;
    const path = join(directory, entry.name);
    removeLeftovers(path, prefix);
    for (let attempt = 0; attempt < 100; attempt++) {
      for (const pid of readFileSync(join(path, 'cgroup.procs'), 'utf8').split('\n').filter(Boolean)) {
        try {
          process.kill(Number(pid), 'SIGKILL');
        } catch {} // gone already
      }
      try {
        rmdirSync(path);
        break;
      } catch {
        Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 20);
      }
    }
  }
}

function test(folder) {
  const { status, signal, error, pid } = spawnSync(join(folder, 'reprieve-native-test'), arguments_, {
    stdio: 'inherit',
    timeout: TIMEOUT_MS,
    killSignal: 'SIGKILL',
  });
  removeLeftovers('/sys/fs/cgroup/memory', `reprieve-test-native-${pid}-`);
  if (signal || error) process.stderr.write(`native-test: ended by ${signal ?? error.message}\n`);
  return status ?? 1;
}

/** clang-tidy over each source, as many at a time as there are processors. */
async function lint(folder) {
  const sources = ['core', 'addon', 'guard'].flatMap((part) =>
    readdirSync(join(root, 'native', part))
      .filter((name) => name.endsWith('.cc'))
      .map((name) => join('native', part, name)),
  );
  let clean = true;
  const worker = async () => {
    for (let source = sources.pop(); source; source = sources.pop()) {
      const child = spawn('clang-tidy-14', ['-p', folder, '--quiet', source], { cwd: root });
      let output = '';
      child.stdout.on('data', (text) => {
        output += text;
      });
      const code = await new Promise((resolve) => {
        child.on('error', () => fail('clang-tidy-14 was not found (Debian: clang-tidy-14)'));
        child.on('close', resolve);
      });
      process.stdout.write(output);
      clean &&= code === 0;
    }
  };
  await Promise.all(Array.from({ length: availableParallelism() }, worker));
  process.stdout.write(clean ? 'clang-tidy: clean\n' : 'clang-tidy: see above\n');
  return clean;
}

const folder = build();
process.exitCode = test(folder);
if (tidy && !(await lint(folder))) process.exitCode ||= 1;
