import { show } from '../errors.js';
import type { Job, Snapshot } from '../snapshot/snapshot.js';

/** Kill a whole job: every process of it. */
export interface KillDecision {
  action: 'kill';
  /** `id` of a job of the snapshot. */
  victim: string;
  /** A sentence for the report. */
  because: string;
}

/** Do nothing for a while, then be asked again; all waits of a rung together are bounded by `clearWithin`. */
export interface WaitDecision {
  action: 'wait';
  /** Milliseconds, more than 0. */
  ms: number;
  victim?: undefined;
  because: string;
}

/** Give the memcg back to the kernel's own OOM killer. */
export interface KernelDecision {
  action: 'kernel';
  victim?: undefined;
  because: string;
}

export type Decision = KillDecision | WaitDecision | KernelDecision;

/** What a policy gets beside the snapshot. */
export interface PolicyContext {
  /** Aborted when the policy's answer is not awaited any more. */
  signal: AbortSignal;
  /** Memory to work in while the condition is open. */
  reserve: import('../reserve/account.js').Reserve;
}

/** Decides what happens. Pure: no I/O, no clock; then it can be tested, replayed and explained. */
export type Policy = (snapshot: Snapshot, context: PolicyContext) => Decision | Promise<Decision>;

/** The job that a decision may name, or the sentence why it may not. */
export function findVictim(snapshot: Snapshot, id: unknown): Job | string {
  const job = snapshot.jobs.find((candidate) => candidate.id === id);
  if (job === undefined) return `there is no job ${show(id)} in the snapshot`;
  if (job.protected) return `job ${job.name} is protected`;
  if (job.killed) return `job ${job.name} was killed already`;
  return job;
}

/** What is wrong with a policy's answer, as a sentence; null if it can be carried out. */
export function checkDecision(decision: unknown, snapshot: Snapshot): string | null {
  if (typeof decision !== 'object' || decision === null) return `the answer is no decision: ${show(decision)}`;
  const { action, victim, ms } = decision as Record<string, unknown>;
  switch (action) {
    case 'kill': {
      const found = findVictim(snapshot, victim);
      return typeof found === 'string' ? found : null;
    }
    case 'wait':
      return typeof ms === 'number' && ms > 0 && Number.isFinite(ms)
        ? null
        : `the wait is no time in milliseconds: ${show(ms)}`;
    case 'kernel':
      return null;
    default:
      return `there is no action ${show(action)}; expected 'kill', 'wait' or 'kernel'`;
  }
}
