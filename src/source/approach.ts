import type { Listener } from '../cgroup/cgroup.js';
import type { Clock } from '../clock.js';
import { isVanished } from '../errors.js';

/** Longest and shortest pause between two looks, in milliseconds. */
const LONGEST_MS = 500;
const SHORTEST_MS = 1;
/** While the end is there: whoever was told of it looks by himself. */
const THERE_MS = 10;
/** Two looks closer than this say little of the rate, in seconds: memory is taken in pieces. */
const LEAST_S = 0.02;
/** What was seen counts for about so long, in seconds: memory is often taken in bursts. */
const FADES_S = 0.3;

export interface ApproachOptions {
  /** How much is left before the end, in bytes; Infinity where there is none. */
  left: () => number;
  /** Bytes a second that may be taken from one moment to the next by whoever took nothing so far. */
  fastest: number;
  /** So many bytes before the end it is one already, where `rate` bytes a second are taken. */
  lead: (rate: number) => number;
  /** What is left before the lead, in bytes, where there may be more than `left` has seen. */
  beyond?: (left: number, lead: number) => number;
  /** Called at each look; all in bytes. */
  looked: (left: number, lead: number, beyond: number) => void;
}

/** Looks how near the end is, the more often the nearer it is and the faster it comes. */
export class Approach implements Listener {
  readonly #clock: Clock;
  readonly #options: ApproachOptions;
  #before: number;
  #beforeUs: number;
  #rate = 0;
  #cancel = () => {};
  #closed = false;

  constructor(clock: Clock, options: ApproachOptions) {
    this.#clock = clock;
    this.#options = options;
    this.#before = options.left();
    this.#beforeUs = clock.nowUs();
    this.#wait(this.#before);
  }

  #wait(way: number): void {
    // At this rate half of the way is gone at the next look.
    const pause = way / 2 / Math.max(this.#rate, this.#options.fastest / 2);
    const pauseMs = way > 0 ? Math.min(LONGEST_MS, Math.max(SHORTEST_MS, pause * 1000)) : THERE_MS;
    this.#cancel = this.#clock.after(pauseMs, () => this.look());
  }

  /** Bytes a second that are taken, or were a moment ago. */
  get rate(): number {
    this.#sample();
    return this.#rate;
  }

  #sample(): number {
    const left = this.#options.left();
    const now = this.#clock.nowUs();
    const seconds = (now - this.#beforeUs) / 1e6;
    const taken = this.#before - left;
    const isBack = -taken > this.#options.lead(this.#rate); // more than was feared for: who took it is gone
    if (seconds < LEAST_S && !isBack) return left;
    if (isBack) this.#rate = 0;
    else if (Number.isFinite(taken)) this.#rate = Math.max(taken / seconds, this.#rate * Math.exp(-seconds / FADES_S));
    this.#before = left;
    this.#beforeUs = now;
    return left;
  }

  /** Looks now, besides those looks that are due. */
  look(): void {
    if (this.#closed) return;
    this.#cancel();
    try {
      const left = this.#sample();
      const lead = this.#options.lead(this.#rate);
      const beyond = this.#options.beyond?.(left, lead) ?? left - lead;
      this.#wait(beyond);
      this.#options.looked(left, lead, beyond);
    } catch (error) {
      this.close();
      if (!isVanished(error)) throw error; // that it was removed is told elsewhere
    }
  }

  close(): void {
    this.#closed = true;
    this.#cancel();
  }
}
