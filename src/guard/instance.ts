/**
 * The directory of one handler below /run/reprieve: who it is, what it has changed, and the guard's record. A lock on it
 * is held by the handler and its guard together: where the lock can be had, both are gone.
 */
import { execFile } from 'node:child_process';
import {
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  unlinkSync,
  writeFileSync,
} from 'node:fs';
import { constants } from 'node:os';
import { setTimeout as sleep } from 'node:timers/promises';
import { ReprieveError, type SystemError } from '../errors.js';
import { type Directory, guardPath, native, type Pidfd } from '../native.js';
import type { Mounts } from './control-files.js';
import type { Epoch } from './epoch.js';
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
/** A restore takes no longer than this, or something is wrong: it is killed, and may be started again. */
const RESTORE_MS = 10_000;

export interface Instance {
  readonly name: string;
  readonly path: string;
  readonly directory: Directory;
  /** The state directory. */
  readonly base: Directory;
  readonly ledger: FileLedger;
  /** Who the guard is, for whoever finds that it is stopped. */
  noteGuard(pid: number): void;
  /** The end: nothing of it is left. Synchronous. */
  remove(): void;
  /** Something is left: it stays for the guard, or for `restoreInstance`. Synchronous. */
  close(): void;
}

/** @throws ReprieveError ERR_REPRIEVE_STATE if nothing can be written there */
export function openInstance(base: string, mounts: Mounts, epoch: Epoch): Instance {
  const undo: (() => void)[] = [];
  try {
    for (const path of [base, `${base}/${RECORDS}`]) makeDirectory(path);
    const { name, path, unfinished } = takeName(base);
    undo.push(() => rmSync(unfinished, { recursive: true, force: true }));
    const owner = { version: 1, pid: process.pid, started: startTimeOf(process.pid), ...mounts };
    const lines = Object.entries(owner).map(([key, value]) => `${key} ${value}\n`);
    writeFileSync(`${unfinished}/owner`, lines.join(''), { mode: 0o600 });
    writeFileSync(`${unfinished}/record`, Buffer.alloc(RECORD_BYTES), { mode: 0o600 });
    writeFileSync(`${unfinished}/guard`, guardLine(0), { mode: 0o600 });
    const ledger = new FileLedger(unfinished, path, epoch);
    undo.push(() => ledger.close());
    const held = new (native().Directory)(base);
    undo.push(() => held.close());
    const directory = new (native().Directory)(unfinished);
    undo.push(() => directory.close());
    directory.claim();
    renameSync(unfinished, path);
    const close = () => {
      for (const part of [ledger, directory, held]) part.close();
    };
    return {
      name,
      path,
      directory,
      base: held,
      ledger,
      noteGuard(pid) {
        directory.writeFile('guard', guardLine(pid));
      },
      remove() {
        rmSync(path, { recursive: true, force: true });
        close();
      },
      close,
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

/** Not with `recursive`: in /proc, where a directory can neither be found nor made, that tries for ever. */
function makeDirectory(path: string, mode = 0o755): boolean {
  try {
    mkdirSync(path, { mode });
    return true;
  } catch (error) {
    if ((error as SystemError).code !== 'EEXIST') throw error;
    return false;
  }
}

/** What is there is never taken: it may be another's with our process number, of another PID namespace or time. */
function takeName(base: string): { name: string; path: string; unfinished: string } {
  for (let number = 1; ; number++) {
    const name = `handler-${process.pid}-${number}`;
    const [path, unfinished] = [`${base}/${name}`, `${base}/.new-${name}`];
    if (!existsSync(path) && makeDirectory(unfinished, 0o700)) return { name, path, unfinished };
  }
}

/** Of one width, so that it can be overwritten where the file system is full. */
function guardLine(pid: number): string {
  return `${`${pid} ${pid === 0 ? 0 : startTimeOf(pid)}`.padEnd(63)}\n`;
}

/** Field 22 of /proc/PID/stat (proc_pid_stat(5)): with the number it names a process for good. */
function startTimeOf(pid: number): number {
  return Number(statOf(pid)[19]);
}

/** Field 3 of it. */
function isStopped(pid: number): boolean {
  return /^[Tt]$/.test(statOf(pid)[0] ?? '');
}

/** The fields from the third on. */
function statOf(pid: number): string[] {
  const stat = readFileSync(`/proc/${pid}/stat`, 'utf8');
  return stat.slice(stat.lastIndexOf(')') + 2).split(' ');
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
    const { code, message } = error as SystemError;
    if (code === 'ENOENT') return [];
    throw new ReprieveError(
      'ERR_REPRIEVE_STATE',
      `What was left in ${base} (the \`stateDirectory\` option) cannot be told: ${message}`,
      error,
    );
  }
  return names.flatMap((name) => {
    try {
      const directory = new (native().Directory)(`${base}/${name}`);
      try {
        return [{ name, free: directory.claim(), handlerLives: handlerLives(directory.readFile('owner')) }];
      } finally {
        directory.close();
      }
    } catch {
      return []; // just removed, or no directory
    }
  });
}

/** Whether the handler lives whom an `owner` file tells of. */
export function handlerLives(ownerText: string): boolean {
  const owner = new Map(ownerText.split('\n').map((line) => line.split(' ') as [string, string]));
  try {
    return startTimeOf(Number(owner.get('pid'))) === Number(owner.get('started'));
  } catch {
    return false;
  }
}

/**
 * Puts back what handlers left that are gone, and waits, at most `waitMs`, for guards that are at it.
 * @param tried what was tried before: once is enough, whatever came of it
 * @returns a line for each thing that was done
 * @throws ReprieveError ERR_REPRIEVE_STATE if the directory cannot be read
 */
export async function restoreStale(base: string, waitMs: number, tried: Set<string>): Promise<string[]> {
  const end = performance.now() + waitMs;
  const lines = endStoppedGuards(base);
  for (;;) {
    const left = instancesIn(base).filter(({ name }) => !tried.has(name));
    for (const { name } of left.filter(({ free }) => free)) {
      const told = await restoreInstance(base, name);
      if (told === null) continue; // somebody else was quicker
      lines.push(...told);
      tried.add(name);
    }
    if (!left.some(({ free, handlerLives }) => free || !handlerLives) || performance.now() >= end) break;
    await sleep(20);
  }
  tidy(base);
  return lines;
}

/**
 * A guard that somebody has stopped (SIGSTOP), of a handler that is gone, does nothing any more, and keeps others from it:
 * it is killed. @returns a line for each
 */
export function endStoppedGuards(base: string): string[] {
  return instancesIn(base).flatMap(({ name, free, handlerLives }) => {
    if (free || handlerLives) return [];
    let pidfd: Pidfd | undefined;
    try {
      const [pid = 0, started] = readFileSync(`${base}/${name}/guard`, 'utf8').trim().split(' ').map(Number);
      if (pid === 0) return [];
      pidfd = new (native().Pidfd)(pid);
      if (!isStopped(pid) || startTimeOf(pid) !== started || !pidfd.signal(constants.signals.SIGKILL)) return [];
      return [`${name}: its guard, process ${pid}, was stopped, and is killed`];
    } catch {
      return []; // it has ended meanwhile
    } finally {
      pidfd?.close();
    }
  });
}

/** Puts back what one handler left. @returns a line for each thing; null if somebody looks after it, or is at it */
export async function restoreInstance(base: string, name: string): Promise<string[] | null> {
  // What was done is not done twice, so if it was killed it may as well be started again.
  for (let attempt = 1; ; attempt++) {
    const { status, signal, stdout, failure } = await runRestore([base, name]);
    const lines = stdout.split('\n').filter((line) => line !== '');
    if (signal !== null && attempt < MOST_ATTEMPTS) continue;
    if (lines.some((line) => line.startsWith(`${name}: in use`))) return null;
    if (failure !== null) lines.push(`the guard's program could not be run: ${failure}`);
    if (status !== 0) lines.push(`not everything that was left in ${base}/${name} could be put back`);
    return lines;
  }
}

interface Restored {
  /** Null if it was ended by `signal`, or could not be run: `failure` says why then. */
  status: number | null;
  signal: NodeJS.Signals | null;
  stdout: string;
  failure: string | null;
}

/** `reprieve-guard restore`: the one that knows how to put back, whoever asks for it. */
export function runRestore(args: string[]): Promise<Restored> {
  return new Promise((resolve) => {
    const options = { timeout: RESTORE_MS, killSignal: 'SIGKILL' as const };
    execFile(guardPath(), ['restore', ...args], options, (error, stdout) => {
      const status = error === null ? 0 : typeof error.code === 'number' ? error.code : null;
      const signal = error?.signal ?? null;
      resolve({
        status,
        signal,
        stdout,
        failure: status === null && signal === null ? (error?.message ?? null) : null,
      });
    });
  });
}

/** Of handlers that were killed while they started, and of records only the newest are kept. */
function tidy(base: string): void {
  try {
    for (const name of readdirSync(base)) {
      const pid = /^\.new-handler-(\d+)-/.exec(name)?.[1];
      if (pid !== undefined && !existsSync(`/proc/${pid}`)) rmSync(`${base}/${name}`, { recursive: true, force: true });
    }
    const records = readdirSync(`${base}/${RECORDS}`).map((name) => `${base}/${RECORDS}/${name}`);
    const byAge = records.map((path) => ({ path, at: statSync(path).mtimeMs })).sort((a, b) => b.at - a.at);
    for (const { path } of byAge.slice(MOST_RECORDS)) unlinkSync(path);
  } catch {
    // there are none yet, or somebody else prunes
  }
}
