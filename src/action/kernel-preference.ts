import type { Hierarchy, Process } from '../cgroup/cgroup.js';
import { isVanished } from '../errors.js';
import { firstTier, rankForKernel } from '../policy/lowest-priority.js';
import { identityOf, type Jobs, type LiveJob, pidsOf } from '../snapshot/jobs.js';

/**
 * With this `oom_score_adj` a process counts as larger by the whole limit (oom_badness() in mm/oom_kill.c), so that it
 * goes before any process that has none, however large.
 */
const FIRST_TO_DIE = 1000;

/** The kernel never takes such a process: somebody's word, which is not ours to overrule. */
export const NEVER = -1000;

interface Original {
  started: number;
  /** What it had. */
  value: number;
  /** What we wrote last. */
  written: number;
}

interface Raised {
  job: LiveJob;
  /** By process number. */
  originals: Map<number, Original>;
}

/**
 * Prepares the kernel's own choice: the processes of the jobs that would die first get a high `oom_score_adj`, so that a
 * hand-over takes one of them. Values are only raised, and put back; a process that was born of a raised one inherited
 * the value and gets its job's lowest original back.
 */
export class KernelPreference {
  readonly #hierarchy: Hierarchy;
  readonly #raised = new Map<string, Raised>();
  /** Processes whose value could not be written. */
  failures = 0;

  constructor(hierarchy: Hierarchy) {
    this.#hierarchy = hierarchy;
  }

  /**
   * While nothing is out of memory: raises the jobs of the first tier, and puts back those that are not in it any more.
   * Where there is nobody else to prefer them to, they are left alone: an out-of-memory above would take them first.
   */
  prepare(groups: readonly Jobs[]): void {
    const live = liveJobs(groups);
    const tier = firstTier(groups.flatMap((jobs) => jobs.sample(new Set())));
    const first = new Set(tier.length < live.size ? tier.map(identityOf) : []);
    for (const [identity, raised] of this.#raised) if (!first.has(identity)) this.#restore(identity, raised);
    for (const identity of first) {
      const job = live.get(identity);
      if (job !== undefined) this.#raise(identity, job, () => FIRST_TO_DIE);
    }
  }

  /**
   * Before a hand-over: puts all jobs that may die in their order. Counted with its size, a process of the first gets at
   * least the limit, those of the next ones less by steps, down to what the largest process of the others has by itself:
   * wide steps, as those that wait grow with what the first kill brings back.
   */
  prepareHandOver(groups: readonly Jobs[], killed: ReadonlySet<string>, limit: number): void {
    this.restoreAll();
    const live = liveJobs(groups);
    const sampled = groups.flatMap((jobs) => jobs.sample(killed));
    const ranked = rankForKernel(sampled);
    const spared = Math.max(0, ...sampled.filter((job) => job !== ranked[0]).map(({ anon }) => anon));
    const floor = Math.min(1, spared / limit);
    for (const [rank, job] of ranked.entries()) {
      const found = live.get(identityOf(job));
      const target = 1 - ((1 - floor) * rank) / ranked.length;
      const score = (process: Process) =>
        rank === 0 ? FIRST_TO_DIE : Math.floor(FIRST_TO_DIE * Math.max(0, target - process.memory().anon / limit));
      if (found !== undefined) this.#raise(identityOf(job), found, score);
    }
  }

  restoreAll(): void {
    for (const [identity, raised] of this.#raised) this.#restore(identity, raised);
  }

  #raise(identity: string, job: LiveJob, score: (process: Process) => number): void {
    let raised = this.#raised.get(identity);
    if (raised === undefined) {
      raised = { job, originals: new Map() };
      this.#raised.set(identity, raised);
    }
    const { originals } = raised;
    const pids = new Set(pidsOf(job));
    const elders = [...originals.values()]; // those too that are gone: their children are not
    for (const [pid, original] of originals) {
      if (pids.has(pid)) continue;
      // It is gone, or it is another job's now.
      originals.delete(pid);
      this.#with(pid, (process) => putBack(process, original));
    }
    for (const pid of pids) {
      if (originals.has(pid)) continue;
      this.#with(pid, (process) => {
        const value = process.scoreAdj();
        if (value === NEVER) return;
        // Born of one that we raised: its original is that of its elders.
        const inherited = elders.some(({ written }) => written === value);
        const written = Math.max(value, score(process));
        if (written > value) process.setScoreAdj(written);
        originals.set(pid, { started: process.started, value: inherited ? lowestOf(elders) : value, written });
      });
    }
  }

  /** Those that we raised, wherever they are now, and those that were born of them in the job. */
  #restore(identity: string, { job, originals }: Raised): void {
    this.#raised.delete(identity);
    for (const [pid, original] of originals) this.#with(pid, (process) => putBack(process, original));
    const elders = [...originals.values()];
    if (elders.length === 0) return;
    const value = lowestOf(elders);
    // Twice: a child that is forked between the listing and the write of its parent inherits the raised value.
    for (let round = 0; round < 2; round++) {
      for (const pid of pidsOf(job)) {
        if (originals.has(pid)) continue;
        this.#with(pid, (process) => {
          for (const { written } of elders) putBack(process, { started: process.started, value, written });
        });
      }
    }
  }

  /** One process; one that is gone is passed over, and one that fails must not keep the others. */
  #with(pid: number, run: (process: Process) => void): void {
    let process: Process | null = null;
    try {
      process = this.#hierarchy.openProcess(pid);
      if (process !== null) run(process);
    } catch (error) {
      if (!isVanished(error)) this.failures++;
    } finally {
      process?.close();
    }
  }
}

/** Unless it is another process by now, or holds somebody else's word. */
function putBack(process: Process, { started, value, written }: Original): void {
  if (process.started === started && value !== written && process.scoreAdj() === written) process.setScoreAdj(value);
}

function liveJobs(groups: readonly Jobs[]): Map<string, LiveJob> {
  return new Map(groups.flatMap((jobs) => jobs.live().map((job) => [identityOf(job), job])));
}

function lowestOf(originals: readonly Original[]): number {
  return originals.reduce((lowest, { value }) => Math.min(lowest, value), FIRST_TO_DIE);
}
