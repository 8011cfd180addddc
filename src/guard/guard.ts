import type { Memcg } from '../cgroup/cgroup.js';
import type { LiveJob } from '../snapshot/jobs.js';
import type { Job } from '../snapshot/snapshot.js';

/** Deadlines of a watch, in milliseconds, as the guard needs to know them. */
export interface GuardedDeadlines {
  respondWithin: number;
  handleWithin: number;
}

/** What the handler tells its guard. Nothing of it throws or waits for long: a guard that does not listen is replaced. */
export interface Guard {
  /** Before `oom_kill_disable` is set. */
  arm(memcg: Memcg, original: boolean, deadlines: GuardedDeadlines): void;
  /** After it was put back. */
  disarm(memcg: Memcg): void;
  /** Who may die there if the handler cannot say so any more. Of more than `MOST_PLANNED` only the first. */
  plan(memcg: Memcg, jobs: readonly LiveJob[]): void;
  /** True if there is a job that it was not told of, and that may die. */
  lacks(memcg: Memcg, jobs: readonly Job[]): boolean;
  /** A job was killed: the guard waits for that death before it chooses another. */
  killed(memcg: Memcg, job: LiveJob): void;
  /** A condition of that memcg is handled. */
  opened(memcg: Memcg): void;
  /** Nobody may be killed there: the handler waits for somebody else, however long that takes. */
  parked(memcg: Memcg): void;
  /** It has ended. */
  resolved(memcg: Memcg): void;
}

/** Where there is none: in the simulation, and with `guard: false`. */
export const NO_GUARD: Guard = {
  arm() {},
  disarm() {},
  plan() {},
  lacks: () => false,
  killed() {},
  opened() {},
  parked() {},
  resolved() {},
};
