/**
 * The directory of one handler below /run/reprieve: who it is, what it has changed, and the guard's record. A lock on it
 * is held by the handler and its guard together: where the lock can be had, both are gone.
 */
import { spawnSync } from 'node:child_process';
import {
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  unlinkSync,
  writeFileSync,
} from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { ReprieveError, type SystemError } from '../errors.js';
import { type Directory, guardPath, native } from '../native.js';
import type { Mounts } from './control-files.js';
import { FileLedger } from './ledger.js';

/** The default: for root, and for others where their session has such a directory. */
export const STATE_DIRECTORY =
  process.geteuid?.() === 0 || !process.env.XDG_RUNTIME_DIR
    ? '/run/reprieve'
    : `${process.env.XDG_RUNTIME_DIR}/reprieve`;

/** Where guards leave what they did. */
const RECORDS = 'records';
/** So many records are kept. */
const MOST_RECORDS = 32;
/** Room for the guard's record, taken while there is some. */
const RECORD_BYTES = 8192;

const MOST_ATTEMPTS = 3;

let lastNumber = 0;

export interface Instance {
  readonly name: string;
  readonly directory: Directory;
  /** The state directory. */
  readonly base: Directory;
  readonly ledger: FileLedger;
  /** The end: nothing of it is left. Synchronous. */
  remove(): void;
}

/** @throws ReprieveError ERR_REPRIEVE_STATE if nothing can be written there */
export function openInstance(base: string, mounts: Mounts): Instance {
  const name = `handler-${process.pid}-${++lastNumber}`;
  const path = `${base}/${name}`;
  const unfinished = `${base}/.new-${name}`;
  const undo: (() => void)[] = [];
  try {
    mkdirSync(`${base}/${RECORDS}`, { recursive: true, mode: 0o755 });
    for (const stale of [unfinished, path]) rmSync(stale, { recursive: true, force: true });
    mkdirSync(unfinished, { mode: 0o700 });
    undo.push(() => rmSync(unfinished, { recursive: true, force: true }));
    const owner = { version: 1, pid: process.pid, started: startTimeOf(process.pid), ...mounts };
    const lines = Object.entries(owner).map(([key, value]) => `${key} ${value}\n`);
    writeFileSync(`${unfinished}/owner`, lines.join(''), { mode: 0o600 });
    writeFileSync(`${unfinished}/record`, Buffer.alloc(RECORD_BYTES), { mode: 0o600 });
    const ledger = new FileLedger(unfinished, path);
    undo.push(() => ledger.close());
    const held = new (native().Directory)(base);
    undo.push(() => held.close());
    const directory = new (native().Directory)(unfinished);
    undo.push(() => directory.close());
    directory.claim();
    renameSync(unfinished, path);
    return {
      name,
      directory,
      base: held,
      ledger,
      remove() {
        ledger.close();
        rmSync(path, { recursive: true, force: true });
        directory.close();
        held.close();
      },
    };
  } catch (error) {
    for (const step of undo.reverse()) step();
    const { message } = error as SystemError;
    throw new ReprieveError(
      'ERR_REPRIEVE_STATE',
      `What is changed must be written down first, and that fails in ${base} (the \`stateDirectory\` option): ${message}`,
      error,
    );
  }
}

/** Field 22 of /proc/PID/stat (proc_pid_stat(5)): with the number it names a process for good. */
function startTimeOf(pid: number): number {
  const stat = readFileSync(`/proc/${pid}/stat`, 'utf8');
  return Number(stat.slice(stat.lastIndexOf(')') + 2).split(' ')[19]);
}

/** What a handler left behind in the state directory. */
interface Left {
  name: string;
  /** Neither the handler nor a guard of it holds it. */
  free: boolean;
  handlerLives: boolean;
}

function instancesIn(base: string): Left[] {
  let names: string[];
  try {
    names = readdirSync(base).filter((name) => name !== RECORDS && !name.startsWith('.'));
  } catch (error) {
    if ((error as SystemError).code === 'ENOENT') return [];
    throw error;
  }
  return names.flatMap((name) => {
    try {
      const directory = new (native().Directory)(`${base}/${name}`);
      try {
        return [{ name, free: directory.claim(), handlerLives: handlerLives(directory) }];
      } finally {
        directory.close();
      }
    } catch {
      return []; // just removed, or no directory
    }
  });
}

function handlerLives(directory: Directory): boolean {
  const owner = new Map(
    directory
      .readFile('owner')
      .split('\n')
      .map((line) => line.split(' ') as [string, string]),
  );
  try {
    return startTimeOf(Number(owner.get('pid'))) === Number(owner.get('started'));
  } catch {
    return false;
  }
}

/**
 * Puts back what handlers left that are gone, and waits, at most `waitMs`, for guards that are at it.
 * @returns a line for each thing that was done
 */
export async function restoreStale(base: string, waitMs: number): Promise<string[]> {
  const end = performance.now() + waitMs;
  let left = instancesIn(base);
  while (left.some(({ free, handlerLives }) => !free && !handlerLives) && performance.now() < end) {
    await sleep(20);
    left = instancesIn(base);
  }
  tidy(base);
  if (!left.some(({ free }) => free)) return [];
  const lines: string[] = [];
  // What was done is not done twice, so if it was killed it may as well be started again.
  for (let attempt = 1; ; attempt++) {
    const { stdout, status, signal, error } = runRestore([base]);
    lines.push(...(stdout ?? '').split('\n').filter((line) => line !== ''));
    if (status === 0) return lines;
    if (signal !== null && attempt < MOST_ATTEMPTS) continue;
    if (error) lines.push(`the guard's program could not be run: ${error.message}`);
    return [...lines, `not everything that was left in ${base} could be put back`];
  }
}

/** `reprieve-guard restore`: the one that knows how to put back, whoever asks for it. */
export function runRestore(args: string[]) {
  return spawnSync(guardPath(), ['restore', ...args], { stdio: ['ignore', 'pipe', 'inherit'], encoding: 'utf8' });
}

/** Of handlers that were killed while they started, and of records only the newest are kept. */
function tidy(base: string): void {
  try {
    for (const name of readdirSync(base)) {
      const pid = /^\.new-handler-(\d+)-/.exec(name)?.[1];
      if (pid !== undefined && !existsSync(`/proc/${pid}`)) rmSync(`${base}/${name}`, { recursive: true, force: true });
    }
    const names = readdirSync(`${base}/${RECORDS}`).sort();
    for (const name of names.slice(0, Math.max(0, names.length - MOST_RECORDS)))
      unlinkSync(`${base}/${RECORDS}/${name}`);
  } catch {
    // there are none yet, or somebody else prunes
  }
}
