import type { Memcg } from '../cgroup/cgroup.js';
import { directoryOf } from '../cgroup/v1.js';
import type { Clock } from '../clock.js';
import { fromSystem, isRevoked, type SystemError } from '../errors.js';
import type { ControlFiles } from '../guard/control-files.js';

/** In the order in which they are put back: the one of memory and swap together is never the lower one (memory.rst, 5.3). */
const LIMITS = ['memory.limit_in_bytes', 'memory.memsw.limit_in_bytes'] as const;
/** The kernel shows "no limit" as the largest multiple of a page in a signed 64 bit number. */
const NO_LIMIT = 2 ** 62;
/** A limit below what is used is tried again after this time, in milliseconds. */
const AGAIN_MS = 1_000;

/** Limits of memcgs that the handler lives in, raised by what its reserve takes there while they are watched. */
export class RaisedLimits {
  readonly #files: ControlFiles;
  readonly #clock: Clock;
  readonly #bytes: number;
  readonly #warn: (message: string) => void;
  /** By path: what ends the attempts to put one back. */
  readonly #raised = new Map<string, () => void>();

  constructor(files: ControlFiles, clock: Clock, bytes: number, warn: (message: string) => void) {
    this.#files = files;
    this.#clock = clock;
    this.#bytes = bytes;
    this.#warn = warn;
  }

  /** @throws ReprieveError ERR_REPRIEVE_STATE, ERR_REPRIEVE_REVOKED, ERR_REPRIEVE_PERMISSION; `putBack` what was done of it */
  raise(memcg: Memcg): void {
    const stop = this.#raised.get(memcg.path);
    stop?.();
    this.#raised.set(memcg.path, () => {});
    if (stop !== undefined) return; // it could not be put back yet
    try {
      for (const name of LIMITS.toReversed()) {
        const limit = readLimit(memcg, name);
        if (limit < NO_LIMIT) this.#files.change('memory', memcg.path, name, String(limit + this.#bytes));
      }
    } catch (error) {
      throw fromSystem(error, `raising the limit of memcg ${memcg.path}`);
    }
  }

  /** The kernel refuses it as long as more is used (EBUSY): then again and again. */
  putBack(path: string, said = false): void {
    try {
      for (const name of LIMITS) this.#files.putBack('memory', path, name);
      this.#raised.delete(path);
    } catch (error) {
      if (isRevoked(error)) return; // the guard does it
      if (!said) this.#warn(`the limit of ${path} is put back once less is used: ${(error as SystemError).message}`);
      this.#raised.set(
        path,
        this.#clock.after(AGAIN_MS, () => this.putBack(path, true)),
      );
    }
  }

  /** What is left is for whoever closes the files. */
  close(): void {
    for (const stop of this.#raised.values()) stop();
    this.#raised.clear();
  }
}

/** Infinity where there is no such limit, as without swap accounting. */
function readLimit(memcg: Memcg, name: string): number {
  try {
    return Number(directoryOf(memcg).readFile(name));
  } catch (error) {
    if ((error as SystemError).code === 'ENOENT') return Number.POSITIVE_INFINITY;
    throw error;
  }
}
