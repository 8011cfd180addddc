import type { Report } from '../report/report.js';
import type { Heap } from '../self/heap.js';

/** Fields that `readUsage` fills: see `native.ts`. */
export const USAGE_FIELDS = 4;

/** Reads what held the handler's thread up so far. */
export type ReadUsage = (out: Float64Array) => void;

type Figures = Pick<Report, 'faults' | 'contextSwitches' | 'collections'>;

export const NOBODY_KILLED: Figures = { faults: null, contextSwitches: null, collections: null };

/** What the way from event to kill met: read at both ends, and put together once the condition has ended. */
export class Toll {
  readonly #readUsage: ReadUsage;
  readonly #heap: Heap;
  readonly #fromUs: number;
  readonly #from: Float64Array;
  readonly #to = new Float64Array(USAGE_FIELDS);

  /** @param from what was read at the event, `fromUs` */
  constructor(readUsage: ReadUsage, heap: Heap, from: Float64Array, fromUs: number) {
    this.#readUsage = readUsage;
    this.#heap = heap;
    this.#from = from.slice();
    this.#fromUs = fromUs;
  }

  /** The first SIGKILL was sent. */
  killed(): void {
    this.#readUsage(this.#to);
  }

  /** @param killedUs when that was, from the event; null if nobody was killed */
  figures(killedUs: number | null): Figures {
    if (killedUs === null) return NOBODY_KILLED;
    const [minor = 0, major = 0, voluntary = 0, involuntary = 0] = this.#to.map(
      (value, index) => value - (this.#from[index] ?? 0),
    );
    return {
      faults: { minor, major },
      contextSwitches: { voluntary, involuntary },
      collections: this.#heap.collections(this.#fromUs, this.#fromUs + killedUs),
    };
  }
}
