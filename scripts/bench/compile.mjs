// Compiles the two small programs of the benchmark into the user's cache, once for each state of their source.
import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { existsSync, mkdirSync, readFileSync, renameSync } from 'node:fs';
import { homedir } from 'node:os';
import { join } from 'node:path';

const FLAGS = ['-std=c++20', '-O2', '-Wall', '-Wextra'];

/** Path of the program compiled from a source file. */
export function compile(source) {
  const hash = createHash('sha256').update(FLAGS.join(' ')).update(readFileSync(source)).digest('hex').slice(0, 12);
  const folder = join(process.env.XDG_CACHE_HOME || join(homedir(), '.cache'), 'reprieve', 'bench');
  const program = join(folder, `${source.replace(/^.*\/|\.cc$/g, '')}-${hash}`);
  if (existsSync(program)) return program;

  mkdirSync(folder, { recursive: true });
  const draft = `${program}.${process.pid}`; // another run may be doing the same
  const { error, status, stderr } = spawnSync('g++', [...FLAGS, '-o', draft, source], { encoding: 'utf8' });
  if (error?.code === 'ENOENT') throw new Error('g++ was not found: apt-get install g++');
  if (status !== 0) throw new Error(`${source} was not compiled: ${error?.message ?? stderr}`);
  renameSync(draft, program);
  return program;
}
