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

  /** While nothing is out of memory: raises the jobs of the first tier, and puts back those that are not in it any more. */
  prepare(groups: readonly Jobs[]): void {
    const live = liveJobs(groups);
    const first = new Set(firstTier(groups.flatMap((jobs) => jobs.sample(new Set()))).map(identityOf));
    for (const [identity, raised] of this.#raised) if (!first.has(identity)) this.#restore(identity, raised);
    for (const identity of first) {
      const job = live.get(identity);
      if (job !== undefined) this.#raise(identity, job, () => FIRST_TO_DIE);
    }
  }

  /**
   * Before a hand-over: puts all jobs that may die in their order. Counted with its size, a process of the first gets at
   * least the limit, those of the next ones less by steps, down to what the largest process of the others has by itself.
   */
  prepareHandOver(groups: readonly Jobs[], killed: ReadonlySet<string>, limit: number): void {
    this.restoreAll();
    const live = liveJobs(groups);
    const sampled = groups.flatMap((jobs) => jobs.sample(killed));
    const ranked = rankForKernel(sampled);
    const spared = Math.max(0, ...sampled.filter((job) => !ranked.slice(0, 1).includes(job)).map(({ anon }) => anon));
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
    const elders = [...originals.values()];
    this.#each(job, originals, (process) => {
      const value = process.scoreAdj();
      if (value === NEVER) return;
      // Born of one that we raised: its original is that of its elders.
      const inherited = elders.some(({ written }) => written === value);
      const original = inherited ? lowestOf(elders) : value;
      const written = Math.max(value, score(process));
      if (written > value) process.setScoreAdj(written);
      originals.set(process.pid, { started: process.started, value: original, written });
    });
  }

  #restore(identity: string, { job, originals }: Raised): void {
    this.#raised.delete(identity);
    if (originals.size === 0) return;
    const elders = [...originals.values()];
    // Twice: a child that is forked between the listing and the write of its parent inherits the raised value.
    for (let round = 0; round < 2; round++) {
      this.#each(job, new Map(), (process) => {
        const value = process.scoreAdj();
        const known = originals.get(process.pid);
        const original =
          known?.started === process.started
            ? known
            : { value: lowestOf(elders), written: elders.find(({ written }) => written === value)?.written };
        // Not as we left it: somebody else's word.
        if (original.written === value && original.value !== value) process.setScoreAdj(original.value);
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

function liveJobs(groups: readonly Jobs[]): Map<string, LiveJob> {
  return new Map(groups.flatMap((jobs) => jobs.live().map((job) => [identityOf(job), job])));
}

function lowestOf(originals: readonly Original[]): number {
  return Math.min(...originals.map(({ value }) => value));
}
