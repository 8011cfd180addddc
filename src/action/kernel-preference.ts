import type { Process } from '../cgroup/cgroup.js';
import { firstTier, rankForKernel } from '../policy/lowest-priority.js';
import { identityOf, type JobGroup, type LiveJob, type Nursery, pidsOf } from '../snapshot/jobs.js';
import type { Job } from '../snapshot/snapshot.js';
import type { OomGroups } from './oom-groups.js';
import type { ScoreRegister, Wanted } from './scores.js';

/**
 * With this `oom_score_adj` a process counts as larger by the whole limit (oom_badness() in mm/oom_kill.c), so that it
 * goes before any process that has none, however large.
 */
const FIRST_TO_DIE = 1000;

/**
 * Prepares the kernel's own choice for one watch: the processes of the jobs that would die first get a high
 * `oom_score_adj`, so that a hand-over takes one of them.
 */
export class KernelPreference {
  readonly #scores: ScoreRegister;
  readonly #groups: OomGroups | null;

  readonly #rival: number;

  /**
   * @param groups null where the kernel knows no jobs that die whole
   * @param rival what a job holds, in bytes, that the kernel might prefer: without such a one nothing is prepared
   */
  constructor(scores: ScoreRegister, groups: OomGroups | null, rival = 0) {
    this.#scores = scores;
    this.#groups = groups;
    this.#rival = rival;
  }

  /**
   * While nothing is out of memory: raises the jobs of the first tier, and puts back those that are not in it any more.
   * Where there is nobody else to prefer them to, they are left alone: an out-of-memory above would take them first.
   */
  prepare(groups: readonly JobGroup[], sampled: readonly Job[]): void {
    const live = liveJobs(groups);
    const tier = firstTier(sampled);
    const wanted = new Map<number, Wanted>();
    const inTier = new Set(tier.map(identityOf));
    const hasRival = sampled.some((job) => !inTier.has(identityOf(job)) && job.anon >= this.#rival);
    const first = hasRival ? tier : [];
    for (const job of first) want(wanted, live.get(identityOf(job)), FIRST_TO_DIE);
    this.#scores.apply(this, wanted);
    this.#groups?.apply(this, memcgsOf(first));
  }

  /**
   * Before a hand-over: puts all jobs that may die in their order. Counted with its size, a process of the first gets at
   * least the limit, those of the next ones less by steps, down to what the largest process of the others has by itself:
   * wide steps, as those that wait grow with what the first kill brings back.
   */
  prepareHandOver(groups: readonly JobGroup[], killed: ReadonlySet<string>, limit: number): void {
    const live = liveJobs(groups);
    const sampled = groups.flatMap((jobs) => jobs.sample(killed));
    const ranked = rankForKernel(sampled);
    const spared = Math.max(0, ...sampled.filter((job) => job !== ranked[0]).map(({ anon }) => anon));
    const floor = Math.min(1, spared / limit);
    const wanted = new Map<number, Wanted>();
    for (const [rank, job] of ranked.entries()) {
      const target = 1 - ((1 - floor) * rank) / ranked.length;
      const score = (process: Process) =>
        Math.floor(FIRST_TO_DIE * Math.max(0, target - process.memory().anon / limit));
      want(wanted, live.get(identityOf(job)), rank === 0 ? FIRST_TO_DIE : score);
    }
    this.#scores.apply(this, wanted);
    this.#groups?.apply(this, memcgsOf(ranked));
  }

  restoreAll(): void {
    this.#scores.apply(this, new Map());
    this.#groups?.apply(this, []);
  }
}

function memcgsOf(jobs: readonly Job[]): string[] {
  return jobs.flatMap(({ kind, id }) => (kind === 'memcg' ? [id] : []));
}

interface Housed {
  job: LiveJob;
  home: Nursery;
}

function liveJobs(groups: readonly JobGroup[]): Map<string, Housed> {
  return new Map(
    groups.flatMap((jobs) =>
      jobs.live().map((job): [string, Housed] => [identityOf(job), { job, home: jobs.nurseryOf(job) }]),
    ),
  );
}

function want(wanted: Map<number, Wanted>, housed: Housed | undefined, score: Wanted['score']): void {
  if (housed === undefined) return;
  for (const pid of pidsOf(housed.job)) wanted.set(pid, { home: housed.home, score });
}
