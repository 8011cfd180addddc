// What is compiled beside the addon is kept in the user's cache, outside the checkout: once for each state of it.
import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { existsSync, mkdirSync, readFileSync, renameSync, rmSync } from 'node:fs';
import { homedir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

export const root = dirname(dirname(fileURLToPath(import.meta.url)));
export const cache = join(process.env.XDG_CACHE_HOME || join(homedir(), '.cache'), 'reprieve');

/** Path of a program compiled from sources by g++; headers count as what it is made from. */
export function compile(name, sources, { headers = [], flags = [] } = {}) {
  const words = ['-std=c++20', '-O2', '-Wall', '-Wextra', `-I${root}/native`, ...flags];
  const hash = createHash('sha256').update(words.join(' '));
  for (const file of [...sources, ...headers]) hash.update(file).update(readFileSync(file));
  const folder = join(cache, 'programs', hash.digest('hex').slice(0, 12)); // the program keeps its name: it is known by that
  const program = join(folder, name);
  if (existsSync(program)) return program;

  mkdirSync(folder, { recursive: true });
  const draft = `${program}.${process.pid}`; // another run may be doing the same
  const { error, status, stderr } = spawnSync('g++', [...words, '-o', draft, ...sources], { encoding: 'utf8' });
  if (error?.code === 'ENOENT') throw new Error('g++ was not found: apt-get install g++');
  if (status !== 0) throw new Error(`${name} was not compiled: ${error?.message ?? stderr}`);
  renameSync(draft, program);
  return program;
}

/** A build folder for this checkout and these tools: CMake refuses one that was configured for another. */
export function buildFolder(name, compiler) {
  const tools = ['cmake', compiler].map(
    (command) => versionOf(command) ?? missing(`${command} was not found (Debian: cmake, ${compiler})`),
  );
  const key = createHash('sha256').update([root, process.execPath, process.version, compiler, ...tools].join('\0'));
  const folder = join(cache, name, key.digest('hex').slice(0, 16));
  mkdirSync(folder, { recursive: true });
  return folder;
}

/**
 * Builds targets of native/CMakeLists.txt; CMake itself sees to changed sources.
 * @returns the build folder
 */
export function buildNative(name, compiler, options, targets) {
  const folder = buildFolder(name, compiler);
  const generator = versionOf('ninja') ? ['-G', 'Ninja'] : [];
  const words = ['-S', 'native', '-B', folder, ...generator, `-DCMAKE_CXX_COMPILER=${compiler}`, ...options];
  const built = () => cmake(words) && cmake(['--build', folder, '--parallel', '--target', ...targets]);
  if (built()) return folder;
  // A folder that was cut off half way, or that an upgrade made useless, is not worth understanding.
  rmSync(folder, { recursive: true, force: true });
  return built() ? folder : missing(`${targets.join(', ')} could not be built (Debian: doctest-dev, ninja-build)`);
}

function versionOf(command) {
  const { stdout, status } = spawnSync(command, ['--version'], { encoding: 'utf8' });
  return status === 0 ? stdout : null;
}

function cmake(words) {
  const { status, error, stdout, stderr } = spawnSync('cmake', words, { cwd: root, encoding: 'utf8' });
  if (status !== 0) process.stderr.write(error?.message ?? stdout + stderr);
  return status === 0;
}

function missing(sentence) {
  throw new Error(sentence);
}
