/**
 * V8's heap, kept so that the way from event to kill finds its pages there and no collection due.
 *
 * A handler allocates little, and V8 gives half of the young generation back to the kernel at each collection of a
 * program that does (SemiSpaceNewSpace::Shrink()): what is allocated next are pages that nobody has touched. Locking is
 * no way out, as V8 aborts when madvise(MADV_DONTNEED) fails, as it does on locked pages. So the pages are faulted in
 * again after each collection, and collections are brought forward to a moment at which nobody waits.
 */
import { PerformanceObserver, performance } from 'node:perf_hooks';
import { getHeapSpaceStatistics, setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';
import type { SystemError } from '../errors.js';
import { type NativeBinding, native } from '../native.js';

/** Pauses of V8's garbage collector. */
export interface Collections {
  count: number;
  /** All of them together, in microseconds. */
  us: number;
}

/** What a handler asks of the heap. */
export interface Heap {
  /** While nobody waits: collects if that would be due soon, and faults in what was mapped since. */
  tend(): void;
  /** The collector's pauses that began between two times, in the clock's microseconds. */
  collections(fromUs: number, toUs: number): Collections;
}

/** What became of it. */
export interface YoungGeneration {
  /** Its size when the handler was opened; 0 with the reason where nothing is done. */
  bytes: number;
  /** It does not grow. */
  fixed: boolean;
  /** Null, or what could not be done, at the latest try. */
  whyNot: string | null;
}

/** Flags of V8 with what they are by default (Node 20), and how many handlers of this process stand on each. */
const FLAGS = {
  /** Code that was compiled for a kill is not dropped for want of kills. */
  keepCode: { set: '--no-flush-bytecode', unset: '--flush-bytecode', users: 0 },
  /** The young generation does not grow. */
  fixed: { set: '--semi-space-growth-factor=1', unset: '--semi-space-growth-factor=2', users: 0 },
};

/** Whoever started node with a flag of that name wants it so. */
function isGiven(flag: string): boolean {
  const name = (flag.split('=')[0] ?? '').replace(/^--(no-)?/, '').replaceAll('_', '-');
  const given = [...process.execArgv, ...(process.env.NODE_OPTIONS ?? '').split(/\s+/)];
  return given.some((argument) => argument.replaceAll('_', '-').includes(name));
}

function raiseFlag(name: keyof typeof FLAGS): void {
  const flag = FLAGS[name];
  if (flag.users++ === 0 && !isGiven(flag.set)) setFlagsFromString(flag.set);
}

function lowerFlag(name: keyof typeof FLAGS): void {
  const flag = FLAGS[name];
  if (--flag.users === 0 && !isGiven(flag.set)) setFlagsFromString(flag.unset);
}

/**
 * Pages are faulted in again only after so many times as long as the last time took: rarely by a program that collects
 * all the time, more often while a limit is near.
 */
const PAUSE_AFTER_COLLECTION = 100;
const PAUSE_TENDING = 10;

/** Pauses that are remembered. */
const MOST_PAUSES = 64;

/** The heap of this process. */
export class OwnHeap implements Heap {
  readonly young: YoungGeneration;
  readonly #native: NativeBinding = native();
  /** From performance.now() to the clock, in microseconds. */
  readonly #offsetUs = this.#native.nowUs() - performance.now() * 1000;
  readonly #pauses: { atUs: number; us: number }[] = [];
  readonly #observer: PerformanceObserver;
  readonly #collect: (() => void) | null;
  readonly #flags: (keyof typeof FLAGS)[];
  #closed = false;
  /** The last time that pages were faulted in. */
  #populated = { endMs: 0, tookMs: 0 };

  /**
   * @param steady keep it ready; else only the pauses are counted
   * @param fixed the young generation may not grow, and malloc keeps more than it needs
   */
  constructor(steady: boolean, fixed: boolean) {
    this.#observer = new PerformanceObserver((list) => {
      this.#note(list.getEntries());
      if (this.#collect !== null && this.#mayPopulate(PAUSE_AFTER_COLLECTION)) this.#populate();
    });
    this.#observer.observe({ type: 'gc' });
    let collect: (() => void) | null = null;
    let whyNot: string | null = steady ? null : 'not asked for (drill: false)';
    if (steady) {
      try {
        this.#native.populate();
        collect = minorCollector();
      } catch (error) {
        const { code, message } = error as SystemError;
        whyNot = code === 'EINVAL' ? 'MADV_POPULATE_WRITE is not there: Linux 5.14 or later' : message;
      }
    }
    this.#collect = collect;
    this.#flags = collect === null ? [] : fixed ? ['keepCode', 'fixed'] : ['keepCode'];
    for (const flag of this.#flags) raiseFlag(flag);
    if (this.#flags.includes('fixed')) this.#native.padMalloc();
    this.young = { bytes: collect === null ? 0 : youngSpace().size, fixed: this.#flags.includes('fixed'), whyNot };
  }

  /** Half a millisecond in a small program; in a large one it is not to take more than its share. */
  #mayPopulate(pause: number): boolean {
    const { endMs, tookMs } = this.#populated;
    return performance.now() >= endMs + tookMs * pause;
  }

  /** For want of a descriptor, say, it may fail: faults are met then, and nothing else is amiss. */
  #populate(): void {
    const beganMs = performance.now();
    try {
      this.#native.populate();
      this.young.whyNot = null;
    } catch (error) {
      this.young.whyNot = (error as SystemError).message;
    }
    const endMs = performance.now();
    this.#populated = { endMs, tookMs: endMs - beganMs };
  }

  #note(entries: readonly { startTime: number; duration: number }[]): void {
    for (const { startTime, duration } of entries) {
      this.#pauses.push({ atUs: startTime * 1000 + this.#offsetUs, us: duration * 1000 });
    }
    this.#pauses.splice(0, this.#pauses.length - MOST_PAUSES);
  }

  tend(): void {
    // A collection whose pages are not faulted in after it would do harm.
    if (this.#collect === null || !this.#mayPopulate(PAUSE_TENDING)) return;
    const { used, free } = youngSpace();
    if (used > free) this.#collect();
    this.#populate();
  }

  collections(fromUs: number, toUs: number): Collections {
    this.#note(this.#observer.takeRecords());
    const between = this.#pauses.filter(({ atUs }) => atUs >= fromUs && atUs <= toUs);
    return { count: between.length, us: between.reduce((sum, { us }) => sum + us, 0) };
  }

  close(): void {
    this.#observer.disconnect();
    if (this.#collect === null || this.#closed) return;
    this.#closed = true;
    for (const flag of this.#flags) lowerFlag(flag);
  }
}

/** V8 gives its collector to contexts that are made while the flag is set. */
function minorCollector(): () => void {
  const { gc: exposed } = globalThis as { gc?: (options: { type: 'minor' }) => void };
  if (exposed !== undefined) return () => exposed({ type: 'minor' }); // node --expose-gc: leave that as it is
  setFlagsFromString('--expose-gc');
  try {
    const gc = runInNewContext('gc') as (options: { type: 'minor' }) => void;
    return () => gc({ type: 'minor' });
  } finally {
    setFlagsFromString('--no-expose-gc');
  }
}

function youngSpace(): { size: number; used: number; free: number } {
  const space = getHeapSpaceStatistics().find(({ space_name }) => space_name === 'new_space');
  const { space_used_size: used = 0, space_available_size: free = 0 } = space ?? {};
  return { size: used + free, used, free };
}
