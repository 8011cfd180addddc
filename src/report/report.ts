import type { Waiter } from '../cgroup/cgroup.js';
import type { Decision } from '../policy/decision.js';
import type { ReserveCounters } from '../reserve/account.js';
import type { WindowRecord } from '../reserve/overcharge.js';
import type { Collections } from '../self/heap.js';
import type { Snapshot } from '../snapshot/snapshot.js';

/**
 * How an episode ended: `cleared` by the ladder or by itself, by the `kernel`'s own killer after a hand-over or before us, the memcg
 * `vanished`, it was `released` because the watch was closed, or it was `left` to whoever owns the memcg above.
 */
export type Outcome = 'cleared' | 'kernel' | 'vanished' | 'released' | 'left' | 'revoked';

/** One thing that happened, in microseconds from the event. */
export interface Step {
  atUs: number;
  /** Whose turn it was: 'policy', 'caller', 'fallback 1' …, 'kernel'. */
  rung: string;
  text: string;
}

/** A job that was killed. */
export interface Victim {
  job: string;
  name: string;
  rung: string;
  because: string;
  /** Processes that were signalled. */
  pids: number[];
  /** First SIGKILL sent, from the event. */
  killedUs: number;
  /** All of it dead, from the event; null if that was not seen. */
  deadUs: number | null;
  /** Memory that came back with it, in bytes; null if it is not dead. */
  freed: number | null;
  /** Memory still charged to the dead job (tmpfs, page cache), in bytes; null if its memcg is gone or it has none. */
  left: number | null;
}

/** What the kernel's killer took of a job. */
export interface KernelVictim {
  job: string;
  /** Processes that were gone after the memcg was handed over; empty where only their number is known. */
  pids: number[];
  /** How many. */
  processes: number;
}

/** An episode as data. Times are microseconds from the event: the wake-up of the handler by the kernel's signal. */
export interface Report {
  version: 1;
  id: string;
  /** The memcg that was out of memory. */
  owner: string;
  /** What is watched. */
  scopes: string[];
  openedAt: string;
  outcome: Outcome;
  timings: {
    /** The snapshot was there. */
    snapshotUs: number | null;
    /** The first decision that could be carried out. */
    decidedUs: number | null;
    /** The first SIGKILL. */
    killedUs: number | null;
    /** The last victim all dead. */
    deadUs: number | null;
    /** Nobody waits any more. */
    clearedUs: number | null;
    /** The condition ended. */
    endedUs: number;
  };
  /** Page faults of the handler from the event to the first SIGKILL. */
  faults: { minor: number; major: number } | null;
  /** How often its thread slept (a read or a lock that blocked), or lost its CPU to others, meanwhile. */
  contextSwitches: { voluntary: number; involuntary: number } | null;
  /** Pauses of V8's garbage collector meanwhile. */
  collections: Collections | null;
  /** Usage and limit when it opened, jobs, and what was decided on it. */
  snapshot: Snapshot | null;
  decisions: (Decision & { rung: string; atUs: number })[];
  /** A sentence for each job. */
  explanation: string[];
  victims: Victim[];
  /** What the kernel's killer took, after a hand-over or because it was quicker. */
  kernelVictims: KernelVictim[];
  /** Threads seen waiting, by job; looked up while an answer was awaited, or before a hand-over. */
  waiters: ({ job: string } & Waiter)[];
  steps: Step[];
  /** How often waiters were woken by us that had slept on with memory there. */
  pokes: number;
  reserve: ReserveCounters;
  /** Overcharge windows that were asked for. */
  windows: WindowRecord[];
}
