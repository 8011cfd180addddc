import type { Hierarchy, Process } from '../cgroup/cgroup.js';
import { isVanished } from '../errors.js';
import { firstTier } from '../policy/lowest-priority.js';
import { identityOf, type Jobs, type LiveJob, pidsOf } from '../snapshot/jobs.js';

/**
 * With this `oom_score_adj` a process counts as larger by the whole limit (oom_badness() in mm/oom_kill.c), so that it
 * goes before any process without it, however large that one is.
 */
const FIRST_TO_DIE = 1000;

interface Raised {
  job: LiveJob;
  /** What the processes had, by number and start time. */
  originals: Map<number, { started: number; value: number }>;
}

/**
 * Prepares the kernel's own choice: the processes of the jobs that would die first get the highest `oom_score_adj`, so
 * that a hand-over takes one of them. Values are only raised, and put back; a process that was born of a raised one
 * inherited the value and gets its job's lowest original back.
 */
export class KernelPreference {
  readonly #hierarchy: Hierarchy;
  readonly #raised = new Map<string, Raised>();
  /** Processes whose value could not be written. */
  failures = 0;

  constructor(hierarchy: Hierarchy) {
    this.#hierarchy = hierarchy;
  }

  /** Raises the jobs that rank first now, and puts back those that do not any more. */
  prepare(groups: readonly Jobs[], killed: ReadonlySet<string>, when: 'now' | 'later'): void {
    const live = new Map(groups.flatMap((jobs) => jobs.live().map((job) => [identityOf(job), job] as const)));
    const first = new Set(
      firstTier(
        groups.flatMap((jobs) => jobs.sample(killed)),
        when,
      ).map(identityOf),
    );
    for (const [identity, raised] of this.#raised) if (!first.has(identity)) this.#restore(identity, raised);
    for (const identity of first) {
      const job = live.get(identity);
      if (job !== undefined) this.#raise(identity, job);
    }
  }

  restoreAll(): void {
    for (const [identity, raised] of this.#raised) this.#restore(identity, raised);
  }

  #raise(identity: string, job: LiveJob): void {
    let raised = this.#raised.get(identity);
    if (raised === undefined) {
      raised = { job, originals: new Map() };
      this.#raised.set(identity, raised);
    }
    const { originals } = raised;
    this.#each(job, originals, (process) => {
      const value = process.scoreAdj();
      // Born of one that we raised: its original is that of its elders.
      const inherited = value === FIRST_TO_DIE && originals.size > 0;
      originals.set(process.pid, {
        started: process.started,
        value: inherited ? lowestOf(originals) : value,
      });
      if (value < FIRST_TO_DIE) process.setScoreAdj(FIRST_TO_DIE);
    });
  }

  #restore(identity: string, { job, originals }: Raised): void {
    this.#raised.delete(identity);
    if (originals.size === 0) return;
    const born = lowestOf(originals);
    // Twice: a child that is forked between the listing and the write of its parent inherits the raised value.
    for (let round = 0; round < 2; round++) {
      this.#each(job, new Map(), (process) => {
        if (process.scoreAdj() !== FIRST_TO_DIE) return; // not as we left it: somebody else's word
        const original = originals.get(process.pid);
        const value = original?.started === process.started ? original.value : born;
        if (value !== FIRST_TO_DIE) process.setScoreAdj(value);
      });
    }
  }

  /** Runs over a job's processes but the known ones. A process that is gone meanwhile is passed over. */
  #each(job: LiveJob, known: ReadonlyMap<number, unknown>, run: (process: Process) => void): void {
    const attempt = (process: Process) => {
      try {
        run(process);
      } catch (error) {
        if (!isVanished(error)) this.failures++;
      }
    };
    if (job.kind === 'process') {
      if (!known.has(job.process.pid)) attempt(job.process);
      return;
    }
    for (const pid of pidsOf(job)) {
      if (known.has(pid)) continue;
      const process = this.#hierarchy.openProcess(pid);
      if (process === null) continue;
      attempt(process);
      process.close();
    }
  }
}

function lowestOf(originals: ReadonlyMap<number, { value: number }>): number {
  return Math.min(...[...originals.values()].map(({ value }) => value));
}
