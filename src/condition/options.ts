import { invalidOption } from '../errors.js';
import type { Policy } from '../policy/decision.js';
import { lowestPriority } from '../policy/lowest-priority.js';

/** Deadlines and rungs of the ladder, as they are given. Times are milliseconds. */
export interface WatchDeadlines {
  /** Time for the policy, or the caller, to answer; 500 by default. */
  respondWithin?: number;
  /** Time for an action to clear the condition; 5,000 by default. */
  clearWithin?: number;
  /** Time for the whole ladder, whatever happens on it: the longest that a task waits; 20,000 by default. */
  handleWithin?: number;
  /** Jobs that one condition may cost, whatever a policy answers; 8 by default. The kernel's own kills are not counted. */
  maxVictims?: number;
  /**
   * Whether jobs are held where the kernel makes nobody wait. On cgroup v2, false by default: limits are left alone, and the
   * kernel kills at `memory.max` whoever was prepared for it, if it is quicker; with true, `memory.high` becomes the limit,
   * `memory.max` the limit and the reserve, and jobs are frozen while an answer is awaited. For 'system', true by default: jobs
   * that grow are frozen while an answer is awaited. v1 always holds.
   */
  hold?: boolean;
  /** What is tried when the policy fails, in this order; `[lowestPriority, 'kernel']` by default. 'kernel' is always last. */
  fallback?: readonly (Policy | 'kernel')[];
}

/** The same, checked and complete. */
export interface LadderOptions {
  respondWithin: number;
  clearWithin: number;
  handleWithin: number;
  maxVictims: number;
  /** Null: the caller acts, in the iterator style. */
  policy: Policy | null;
  /** Null: the default of the kind of scope. */
  hold: boolean | null;
  fallback: readonly (Policy | 'kernel')[];
}

export const DEFAULT_DEADLINES = {
  respondWithin: 500,
  clearWithin: 5_000,
  handleWithin: 20_000,
  maxVictims: 8,
} as const;

/** Timers of Node carry no more. */
const LONGEST_MS = 2 ** 31 - 1;

/** @throws ReprieveError ERR_REPRIEVE_INVALID_ARGUMENT naming the option */
export function parseLadder(options: WatchDeadlines & { policy?: Policy | undefined }): LadderOptions {
  const time = (name: 'respondWithin' | 'clearWithin' | 'handleWithin') => {
    const value = options[name] ?? DEFAULT_DEADLINES[name];
    if (typeof value !== 'number' || !(value > 0) || value > LONGEST_MS) {
      throw invalidOption(`the \`${name}\` option`, `a time in milliseconds above 0 and up to ${LONGEST_MS}`, value);
    }
    return value;
  };
  const maxVictims = options.maxVictims ?? DEFAULT_DEADLINES.maxVictims;
  if (!Number.isSafeInteger(maxVictims) || maxVictims < 1) {
    throw invalidOption('the `maxVictims` option', 'a whole number above 0', maxVictims);
  }
  const policy = options.policy ?? null;
  if (policy !== null && typeof policy !== 'function') {
    throw invalidOption('the `policy` option', 'a function of a snapshot', policy);
  }
  const hold = options.hold ?? null;
  if (hold !== null && typeof hold !== 'boolean') throw invalidOption('the `hold` option', 'true or false', hold);
  return {
    hold,
    respondWithin: time('respondWithin'),
    clearWithin: time('clearWithin'),
    handleWithin: time('handleWithin'),
    maxVictims,
    policy,
    fallback: parseFallback(options.fallback ?? [lowestPriority, 'kernel']),
  };
}

function parseFallback(fallback: unknown): (Policy | 'kernel')[] {
  const expected = "an array of policies that may end in 'kernel'";
  if (!Array.isArray(fallback)) throw invalidOption('the `fallback` option', expected, fallback);
  for (const [index, rung] of fallback.entries()) {
    const isLast = index === fallback.length - 1;
    if (typeof rung === 'function' || (rung === 'kernel' && isLast)) continue;
    throw invalidOption(
      `\`fallback[${index}]\``,
      rung === 'kernel' ? "the last one, as it is 'kernel'" : expected,
      rung,
    );
  }
  return fallback.at(-1) === 'kernel' ? [...fallback] : [...fallback, 'kernel'];
}
