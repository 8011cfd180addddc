import type { Listener } from '../cgroup/cgroup.js';
import type { Clock } from '../clock.js';
import { isVanished } from '../errors.js';

/** Longest and shortest pause between two looks, in milliseconds. */
const LONGEST_MS = 500;
const SHORTEST_MS = 1;
/** Two looks closer than this say little of the rate, in seconds. */
const LEAST_S = 0.004;
/** Of what was seen, this much counts at the next look: memory is often taken in bursts. */
const KEPT = 0.7;

export interface ApproachOptions {
  /** How much is left before the end, in bytes; Infinity where there is none. */
  left: () => number;
  /** Bytes a second that may be taken from one moment to the next by whoever took nothing so far. */
  fastest: number;
  /** Called at each look: `rate` in bytes a second, 0 while nothing is taken; `pauseMs` until the next look. */
  looked: (left: number, rate: number, pauseMs: number) => void;
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

  #wait(left: number): number {
    // At this rate half of the way is gone at the next look.
    const pause = left / 2 / Math.max(this.#rate, this.#options.fastest / 2);
    const pauseMs = Math.min(LONGEST_MS, Math.max(SHORTEST_MS, pause * 1000));
    this.#cancel = this.#clock.after(pauseMs, () => this.look());
    return pauseMs;
  }

  /** Bytes a second that are taken, by what is left now; 0 while memory comes back. */
  get rate(): number {
    this.#sample();
    return this.#rate;
  }

  #sample(): number {
    const left = this.#options.left();
    const now = this.#clock.nowUs();
    const seconds = (now - this.#beforeUs) / 1e6;
    if (seconds < LEAST_S) return left;
    const taken = this.#before - left;
    if (taken < 0) this.#rate = 0;
    else if (Number.isFinite(taken)) this.#rate = Math.max(taken / seconds, this.#rate * KEPT);
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
      const pauseMs = this.#wait(left);
      this.#options.looked(left, this.#rate, pauseMs);
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
