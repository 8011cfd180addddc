import { diesWith, type Job, type Snapshot } from '../snapshot/snapshot.js';
import { formatBytes } from '../units.js';
import type { KernelDecision, KillDecision } from './decision.js';

/** True for a job that uses more than it was promised, of the memory that dies with it. */
function isOver(job: Job): boolean {
  return diesWith(job) > job.reservation;
}

/** Even a job that only fills tmpfs or the page cache has stacks and heaps: less than this is not worth its death. */
const WORTH_KILLING = 2 ** 20;

/** True if killing the job is allowed and would bring memory back. */
export function isCandidate(job: Job): boolean {
  if (job.protected || job.killed) return false;
  const back = diesWith(job);
  return back >= WORTH_KILLING || (back > 0 && back >= job.shmem + job.file);
}

/** 0 for a job above its reservation, 1 for one within, or one that has an `overPriority` to be ranked by instead. */
function rankClass(job: Job): number {
  return isOver(job) && job.overPriority === null ? 0 : 1;
}

/** The priority by which a job is ranked now. */
function effectivePriority(job: Job): number {
  return isOver(job) && job.overPriority !== null ? job.overPriority : job.priority;
}

function overage(job: Job): number {
  return Math.max(0, diesWith(job) - job.reservation);
}

/**
 * Total order of jobs, first to die first: above its reservation before within it; lower priority; larger overage; more
 * memory that dies with it; younger; id.
 */
export function compareJobs(a: Job, b: Job): number {
  return (
    rankClass(a) - rankClass(b) ||
    effectivePriority(a) - effectivePriority(b) ||
    overage(b) - overage(a) ||
    diesWith(b) - diesWith(a) ||
    b.born - a.born ||
    (a.id < b.id ? -1 : a.id > b.id ? 1 : 0)
  );
}

/** The candidates, first to die first. */
export function rankJobs(jobs: readonly Job[]): Job[] {
  return jobs.filter(isCandidate).sort(compareJobs);
}

/**
 * A job that may die, or may grow until it has to; one that holds tmpfs or page cache is left out. The files that
 * processes have mapped are their programs, mostly, and no cache of their own.
 */
function mayComeToDie(job: Job): boolean {
  const stays = job.shmem + (job.kind === 'memcg' ? job.file : 0);
  return isCandidate(job) || (!job.protected && !job.killed && stays < WORTH_KILLING);
}

/**
 * Those that go before all others whatever their size: of the first one's class and priority. A job that holds next to
 * nothing counts as well: it may be the one that grows.
 */
export function firstTier(jobs: readonly Job[]): Job[] {
  const ranked = jobs
    .filter(mayComeToDie)
    .map((job) => ({ ...job, anon: Math.max(job.anon, 1) }))
    .sort(compareJobs);
  const [first] = ranked;
  if (first === undefined) return [];
  return ranked.filter(
    (job) => rankClass(job) === rankClass(first) && effectivePriority(job) === effectivePriority(first),
  );
}

/**
 * Those that the guard may kill, first to die first. It ranks them again by what they use then: what matters here is who
 * is among the first.
 */
export function rankForGuard(jobs: readonly Job[]): Job[] {
  const free = jobs.filter((job) => !job.protected).map((job) => ({ ...job, anon: Math.max(job.anon, 1) }));
  const last = new Set(free.filter((job) => !mayComeToDie(job)));
  return [...free.filter((job) => !last.has(job)).sort(compareJobs), ...[...last].sort(compareJobs)];
}

/** The order in which the kernel should take jobs: the candidates, then the others that are not protected. */
export function rankForKernel(jobs: readonly Job[]): Job[] {
  const others = jobs.filter((job) => !job.protected && !job.killed && !isCandidate(job)).sort(compareJobs);
  return [...rankJobs(jobs), ...others];
}

/** Kills the job that ranks lowest; hands over to the kernel when there is no candidate. */
export function lowestPriority(snapshot: Snapshot): KillDecision | KernelDecision {
  let first: Job | undefined;
  for (const job of snapshot.jobs) {
    if (isCandidate(job) && (first === undefined || compareJobs(job, first) < 0)) first = job;
  }
  if (first === undefined) return { action: 'kernel', because: 'no job may be killed and would bring memory back' };
  const victim = first;
  return {
    action: 'kill',
    victim: victim.id,
    // Put into words when somebody reads it: that is after the kill.
    get because() {
      return whyFirst(victim, snapshot.jobs);
    },
  };
}

function whyFirst(first: Job, jobs: readonly Job[]): string {
  const brings = `${formatBytes(diesWith(first))} die with it`;
  const next = rankJobs(jobs).find((job) => job !== first);
  if (next === undefined) return `it is the only job that may be killed and would bring memory back; ${brings}`;
  return `${whyBefore(first, next)}; ${brings}`;
}

/** Why `first` goes before `next`: the first criterion in which they differ; of `first` it speaks as 'it'. */
function whyBefore(first: Job, next: Job): string {
  const over = `it is ${formatBytes(overage(first))} above its reservation`;
  if (rankClass(first) !== rankClass(next)) {
    return isOver(next)
      ? `${over}, and ${next.name} is ranked by its overPriority`
      : `${over}, and ${next.name} is within its own`;
  }
  if (effectivePriority(first) !== effectivePriority(next)) {
    return `its priority ${effectivePriority(first)} is the lowest (next is ${next.name} with ${effectivePriority(next)})`;
  }
  return `of the same priority ${effectivePriority(first)} as ${next.name}, it ${finerDifference(first, next)}`;
}

/** Why `job` is spared for `first`: the same criterion, from the other side. */
function whySpared(job: Job, first: Job): string {
  if (rankClass(first) !== rankClass(job)) {
    const over = `${first.name} is ${formatBytes(overage(first))} above its reservation`;
    return isOver(job) ? `it is ranked by its overPriority, and ${over}` : `it is within its reservation, and ${over}`;
  }
  if (effectivePriority(first) !== effectivePriority(job)) {
    return `its priority ${effectivePriority(job)} is higher than ${first.name}'s ${effectivePriority(first)}`;
  }
  return `${first.name}, of the same priority ${effectivePriority(first)}, ${finerDifference(first, job)}`;
}

function finerDifference(first: Job, next: Job): string {
  const reserved = first.reservation > 0 || next.reservation > 0;
  if (overage(first) !== overage(next)) return reserved ? 'is further above its reservation' : 'holds more memory';
  if (diesWith(first) !== diesWith(next)) return 'holds more memory';
  return first.born !== next.born ? 'is younger, and as large' : 'is as large and as old, and comes first by name';
}

/**
 * A sentence for each job: who would die now by `lowestPriority`, and why not the others; in the order in which they
 * would. If somebody else was chosen, a sentence on that comes first.
 */
export function explain(snapshot: Snapshot, chosen?: { job: string; name: string; because: string }): string[] {
  const [first, ...spared] = rankJobs(snapshot.jobs);
  if (chosen !== undefined && chosen.job !== first?.id) {
    return [`${chosen.name} was chosen: ${chosen.because}. By lowestPriority:`, ...explain(snapshot)];
  }
  const others = snapshot.jobs.filter((job) => !isCandidate(job)).sort(compareJobs);
  return [
    ...(first === undefined ? [] : [`${first.name} dies first: ${whyFirst(first, snapshot.jobs)}.`]),
    ...(first === undefined ? [] : spared.map((job) => `${job.name} lives on: ${whySpared(job, first)}.`)),
    ...others.map((job) => `${job.name} is no candidate: ${whyNot(job)}.`),
  ];
}

function whyNot(job: Job): string {
  if (job.protected) return 'it is protected';
  if (job.killed) return 'it was killed already';
  const stays = job.shmem + job.file;
  if (diesWith(job) === 0 && stays === 0) return 'it holds no memory';
  return `its death would bring back ${formatBytes(diesWith(job))} only; ${formatBytes(stays)} are tmpfs or page cache`;
}
