import type { Memcg } from '../cgroup/cgroup.js';
import type { LiveJob } from '../snapshot/jobs.js';
import type { Job } from '../snapshot/snapshot.js';

/** Deadlines of a watch, in milliseconds, as the guard needs to know them. */
export interface GuardedDeadlines {
  respondWithin: number;
  handleWithin: number;
}

/** A memcg, or a tended scope under a number of the handler's own: unique among its watches, and no armed memcg's inode. */
export type GuardedScope = Pick<Memcg, 'inode' | 'path'>;

/** What the handler tells its guard. Nothing of it throws or waits for long: a guard that does not listen is replaced. */
export interface Guard {
  /** Before `oom_kill_disable` is set. */
  arm(memcg: Memcg, original: boolean, deadlines: GuardedDeadlines): void;
  /**
   * Where nobody parks (cgroup v2, the whole machine), before the first change: what was changed and frozen there is put back
   * if the handler dies, is silent for too long or keeps somebody frozen for too long.
   */
  tend(scope: GuardedScope, deadlines: GuardedDeadlines): void;
  /** After everything there was put back. */
  disarm(scope: GuardedScope): void;
  /** Who may die there if the handler cannot say so any more. Of more than `MOST_PLANNED` only the first. */
  plan(memcg: Memcg, jobs: readonly LiveJob[]): void;
  /** True if there is a job that it was not told of, and that may die. */
  lacks(memcg: Memcg, jobs: readonly Job[]): boolean;
  /** A job was killed: the guard waits for that death before it chooses another. */
  killed(memcg: Memcg, job: LiveJob): void;
  /** A condition of that memcg or scope is handled. */
  opened(scope: GuardedScope): void;
  /** Nobody may be killed there: the handler waits for somebody else, however long that takes. */
  parked(scope: GuardedScope): void;
  /** It has ended. */
  resolved(scope: GuardedScope): void;
}

/** Where there is none: in the simulation, and with `guard: false`. */
export const NO_GUARD: Guard = {
  arm() {},
  tend() {},
  disarm() {},
  plan() {},
  lacks: () => false,
  killed() {},
  opened() {},
  parked() {},
  resolved() {},
};
