#!/usr/bin/env node
// Builds and runs the tests of native/core under AddressSanitizer and UndefinedBehaviorSanitizer, with plain CMake.
// --tidy runs clang-tidy over native/core and native/addon as well; what else is given goes to doctest.
import { spawn, spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { existsSync, mkdirSync, readdirSync, readFileSync, rmdirSync, rmSync } from 'node:fs';
import { availableParallelism, homedir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = dirname(dirname(fileURLToPath(import.meta.url)));
const compiler = process.env.CXX ?? 'g++';
const arguments_ = process.argv.slice(2).filter((argument) => argument !== '--tidy');
const tidy = process.argv.includes('--tidy');
const TIMEOUT_MS = 180_000;

function fail(sentence) {
  process.stderr.write(`native-test: ${sentence}\n`);
  process.exit(1);
}

function versionOf(command) {
  const { stdout, status } = spawnSync(command, ['--version'], { encoding: 'utf8' });
  return status === 0 ? stdout : undefined;
}

function run(command, options, quiet = false) {
  const { status, error, stdout, stderr } = spawnSync(command, options, {
    cwd: root,
    encoding: 'utf8',
    stdio: quiet ? 'pipe' : 'inherit',
  });
  if (error) fail(error.message);
  if (status !== 0 && quiet) process.stderr.write(stdout + stderr);
  return status === 0;
}

/** A build folder for this checkout and these tools; CMake itself sees to changed sources. */
function buildFolder() {
  const cmake = versionOf('cmake') ?? fail('cmake was not found (Debian: cmake)');
  const cxx = versionOf(compiler) ?? fail(`${compiler} was not found (Debian: g++)`);
  const key = createHash('sha256')
    .update([root, process.execPath, process.version, cmake, compiler, cxx].join('\0'))
    .digest('hex');
  const cache = process.env.XDG_CACHE_HOME || join(homedir(), '.cache');
  return join(cache, 'reprieve', 'native', key.slice(0, 16));
}

function configure(folder) {
  const generator = versionOf('ninja') ? ['-G', 'Ninja'] : [];
  const options = ['-S', 'native', '-B', folder, '-DCMAKE_BUILD_TYPE=Debug', '-DREPRIEVE_SANITIZE=address,undefined'];
  mkdirSync(folder, { recursive: true });
  return run('cmake', [...options, ...generator, `-DCMAKE_CXX_COMPILER=${compiler}`], true);
}

function build(folder) {
  const jobs = String(availableParallelism());
  return run('cmake', ['--build', folder, '--target', 'reprieve-native-test', '--parallel', jobs], true);
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
  const sources = ['core', 'addon'].flatMap((part) =>
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

const folder = buildFolder();
if (!configure(folder) || !build(folder)) {
  // A folder that was cut off half way, or that an upgrade made useless, is not worth understanding.
  rmSync(folder, { recursive: true, force: true });
  if (!configure(folder) || !build(folder)) fail('the tests could not be built (Debian: doctest-dev, ninja-build)');
}
process.exitCode = test(folder);
if (tidy && !(await lint(folder))) process.exitCode ||= 1;
