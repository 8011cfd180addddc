import type { GuardedDeadlines } from './guard.js';
import type { GuardOptions } from './options.js';

/** How long a task can wait, in milliseconds; what the kernel's own killer takes after that, is not in it. */
export interface Bound {
  /** As long as the handler does what it should. */
  handler: number;
  /** Whatever becomes of the handler; null without a guard: nobody bounds it then. */
  guard: number | null;
}

/**
 * The longest that a task waits. The guard acts at the latest when a condition is older than `handleWithin`, or the
 * handler silent for `respondWithin`, and `silence` more; it needs up to `within`. With both killed in the same instant
 * the next start is what ends the wait.
 */
export function boundOf(
  { respondWithin, handleWithin }: GuardedDeadlines,
  guard: Required<Pick<GuardOptions, 'within' | 'silence'>> | null,
): Bound {
  const { within, silence } = guard ?? { within: 0, silence: 0 };
  return { handler: handleWithin, guard: guard && handleWithin + respondWithin + silence + within };
}
