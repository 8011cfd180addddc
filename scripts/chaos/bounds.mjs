// The deadlines that the episodes are played with, short so that they are quick, and what follows from them.

/** Of the watch, in milliseconds. */
export const DEADLINES = { respondWithin: 100, clearWithin: 300, handleWithin: 800 };

/** Of the guard, in milliseconds. */
export const GUARD = { within: 1000, silence: 300 };

/**
 * For the kernel, and a machine with two busy cores: a memcg that was handed over needs its kills (8 to 16 ms each), a
 * thawed victim its way out, the observer its look.
 */
const ALLOWANCE_MS = 500;

/**
 * The longest that a task may be parked or frozen: the handler had its time, was silent for as long as the guard waits, and
 * the guard its own.
 */
export const BOUND_MS =
  Math.max(DEADLINES.handleWithin, DEADLINES.respondWithin) + GUARD.silence + GUARD.within + ALLOWANCE_MS;

/** After the handler's death the guard acts at once. */
export const DEAD_MS = GUARD.within + ALLOWANCE_MS;

/** A handler that is there but does nothing is waited for. */
export const SILENT_MS = DEADLINES.respondWithin + GUARD.silence + DEAD_MS;

/** While the handler works: its own bound. */
export const WORKING_MS = DEADLINES.handleWithin + ALLOWANCE_MS;

/** A guard that was killed is replaced at once, one that was stopped when it has not answered for a while (src/guard/process.ts). */
export const REPLACED_MS = { SIGKILL: 500, SIGSTOP: 4_500 };

/** Where handler and guard were both out of action, the next handler releases within this time of the start of its process. */
export const NEXT_START_MS = 1500;

/**
 * A handler that is asked to close, a guard that is told that it is not needed any more, and the next start end within this
 * time. Nothing is promised of it, and nobody waits meanwhile: it is generous, for a machine that is busy with other things.
 */
export const CLOSE_MS = 10_000;
