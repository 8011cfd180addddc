/**
 * What reprieve changes, written down before it is changed: one line a change, in files of fixed-width lines that are
 * overwritten in place. The format stands in docs/guard.md; whoever puts back (native/guard/state.cc) reads it.
 */
import { closeSync, fstatSync, openSync, readSync, writeFileSync, writeSync } from 'node:fs';
import { crc32 } from 'node:zlib';
import type { Memcg } from '../cgroup/cgroup.js';
import { ReprieveError, type SystemError } from '../errors.js';
import type { Epoch } from './epoch.js';

/** Bytes of a line, its newline included. */
const FILE_LINE = 1024;
const SCORE_LINE = 128;
/** Lines that are there from the start: then a full file system is no reason not to write them. */
const FILE_LINES_AT_FIRST = 16;
const SCORE_LINES_AT_FIRST = 128;

/** A change that is written down. */
export interface Entry {
  /** It was put back: forgets it. Never throws. */
  clear(): void;
}

/** A raised `oom_score_adj`. */
export interface ScoreChange {
  pid: number;
  /** Start times and `raisedAt` in clock ticks since boot. */
  started: number;
  raisedAt: number;
  was: number;
  wrote: number;
  /** Inode of the memcg in which processes that are born of it are looked for. */
  home: number;
}

/** Writes changes down. Every method throws a ReprieveError ERR_REPRIEVE_STATE if that fails: then change nothing. */
export interface Ledger {
  /** `oom_kill_disable`, about to be 1. */
  armed(memcg: Memcg, was: boolean): Entry;
  /** A memcg below an armed one had `oom_kill_disable` 1 itself. */
  keep(memcg: Memcg): Entry;
  /** A memcg, or it and those below, whose processes are about to get other scores. */
  home(memcg: Memcg, deep: boolean): Entry;
  score(change: ScoreChange): Entry;
  /** A control file; its name tells of which hierarchy. */
  file(memcg: Pick<Memcg, 'path' | 'inode'>, name: string, was: string, wrote: string): Entry;
}

const NOTHING: Entry = { clear() {} };

/** For the simulation, which ends with its process. */
export const NO_LEDGER: Ledger = {
  armed: () => NOTHING,
  keep: () => NOTHING,
  home: () => NOTHING,
  score: () => NOTHING,
  file: () => NOTHING,
};

/** A file of lines of one width. */
class LineFile {
  readonly #shown: string;
  readonly #width: number;
  readonly #epoch: Epoch;
  readonly #descriptor: number;
  readonly #free: number[] = [];
  #lines = 0;

  constructor(path: string, shown: string, width: number, atFirst: number, epoch: Epoch) {
    this.#shown = shown;
    this.#width = width;
    this.#epoch = epoch;
    writeFileSync(path, this.#blank().repeat(atFirst), { mode: 0o600, flag: 'wx' });
    this.#descriptor = openSync(path, 'r+');
    for (this.#lines = 0; this.#lines < atFirst; this.#lines++) this.#free.unshift(this.#lines);
  }

  #blank(): string {
    return `${' '.repeat(this.#width - 1)}\n`;
  }

  add(text: string): Entry {
    const line = Buffer.from(`${crc32(text).toString(16).padStart(8, '0')} ${text}`.padEnd(this.#width - 1));
    if (line.length >= this.#width) {
      throw new ReprieveError('ERR_REPRIEVE_STATE', `A path is too long to be written down: ${text}`);
    }
    const at = this.#free.pop() ?? this.#lines++;
    try {
      this.#write(at, Buffer.concat([line, Buffer.from('\n')]));
    } catch (error) {
      this.#free.push(at);
      const { message } = error as SystemError;
      throw new ReprieveError(
        'ERR_REPRIEVE_STATE',
        `A change could not be written down in ${this.#shown}, so it was not made: ${message}`,
        error,
      );
    }
    let cleared = false;
    return {
      clear: () => {
        // Once it is revoked, what was not put back by us is the guard's to put back.
        if (cleared || this.#epoch.revoked) return;
        cleared = true;
        try {
          this.#write(at, Buffer.from(this.#blank()));
          this.#free.push(at);
        } catch {
          // It stays: whoever puts back later finds that nothing is to be put back.
        }
      },
    };
  }

  isEmpty(): boolean {
    const all = Buffer.alloc(fstatSync(this.#descriptor).size);
    readSync(this.#descriptor, all, 0, all.length, 0);
    return all.toString('latin1').trim() === '';
  }

  #write(at: number, line: Buffer): void {
    // One write within one page: a process that is killed leaves the old line or the new one.
    const written = writeSync(this.#descriptor, line, 0, line.length, at * this.#width);
    if (written !== line.length) throw new Error(`only ${written} of ${line.length} bytes were written`);
  }

  close(): void {
    closeSync(this.#descriptor);
  }
}

/** The ledger of an instance, in its directory. */
export class FileLedger implements Ledger {
  readonly #files: LineFile;
  readonly #scores: LineFile;

  /** @param shown how the directory will be called */
  constructor(directory: string, shown: string, epoch: Epoch) {
    this.#files = new LineFile(`${directory}/files`, `${shown}/files`, FILE_LINE, FILE_LINES_AT_FIRST, epoch);
    this.#scores = new LineFile(`${directory}/scores`, `${shown}/scores`, SCORE_LINE, SCORE_LINES_AT_FIRST, epoch);
  }

  armed(memcg: Memcg, was: boolean): Entry {
    return was ? this.keep(memcg) : this.#file('file', 'memory.oom_control', memcg, '0', '1');
  }

  keep(memcg: Memcg): Entry {
    return this.#file('keep', 'memory.oom_control', memcg, '1', '1');
  }

  home(memcg: Memcg, deep: boolean): Entry {
    return this.#file('home', deep ? 'deep' : 'flat', memcg, '0', '0');
  }

  score({ pid, started, raisedAt, was, wrote, home }: ScoreChange): Entry {
    return this.#scores.add(`${pid} ${started} ${raisedAt} ${was} ${wrote} ${home}`);
  }

  file(memcg: Pick<Memcg, 'path' | 'inode'>, name: string, was: string, wrote: string): Entry {
    return this.#file('file', name, memcg, was, wrote);
  }

  /** A cgroup that is made by us, a memcg or one of the freezer: what is left in it goes to `back`. */
  made(cgroup: Pick<Memcg, 'path' | 'inode'>, back: string, hierarchy: 'memory' | 'freezer' = 'memory'): Entry {
    return this.#file('made', hierarchy === 'memory' ? '-' : hierarchy, cgroup, escapePath(back), '-');
  }

  /** The memcg of an overcharge window: what is left in it dies. */
  window(memcg: Pick<Memcg, 'path' | 'inode'>): Entry {
    return this.#file('made', 'window', memcg, '-', '-');
  }

  #file(kind: string, name: string, { path, inode }: Pick<Memcg, 'path' | 'inode'>, was: string, wrote: string): Entry {
    return this.#files.add(`${kind} ${name} ${inode} ${was} ${wrote} ${escapePath(path)}`);
  }

  /** Nothing is written down there any more, whoever cleared it. */
  isEmpty(): boolean {
    return this.#files.isEmpty() && this.#scores.isEmpty();
  }

  close(): void {
    this.#files.close();
    this.#scores.close();
  }
}

/** No blank and no control character in it: fields are separated by blanks, lines by newlines. */
function escapePath(path: string): string {
  return path.replace(/[\0-\x20%\x7f]/g, (byte) => `%${byte.charCodeAt(0).toString(16).padStart(2, '0')}`);
}
