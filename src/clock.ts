import { native } from './native.js';

/** Where the ladder gets its time from, so that a simulation can run it on a clock of its own. */
export interface Clock {
  /** Monotonic microseconds; on the real clock CLOCK_MONOTONIC (clock_gettime(2)). */
  nowUs(): number;
  /** Calls back once after `ms` milliseconds, unless the returned function is called before. */
  after(ms: number, run: () => void): () => void;
}

/** CLOCK_MONOTONIC and Node's timers. */
export const realClock: Clock = {
  nowUs: () => native().nowUs(),
  after(ms, run) {
    const timer = setTimeout(run, ms);
    return () => clearTimeout(timer);
  },
};
