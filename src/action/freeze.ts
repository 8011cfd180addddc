/**
 * Freezing jobs, so that they take no memory while somebody else may: each by itself, never by a cgroup above two of them,
 * as then none could be thawed alone.
 */
import type { Freezer, MadeGroup, Running } from '../cgroup/freezer.js';
import { identityOf, type LiveJob, pidsOf } from '../snapshot/jobs.js';

/** Threads that are named when they do not stop, at most. */
const MOST_NAMED = 8;

/** How a job is frozen: by the freezer cgroup that it has, by one that was made for it, or somebody had frozen it before. */
export type Freezing = 'own' | 'made' | 'before';

/** A freezer cgroup that stands still. */
interface Group {
  path: string;
  job: LiveJob;
  how: Freezing;
  made: MadeGroup | null;
}

/** A thread that did not stop. */
export interface StillRunning extends Running {
  job: string;
}

let nextGroup = 1;

/** Jobs that are frozen, from the first `freeze` to `release`. */
export class FrozenJobs {
  readonly #freezer: Freezer;
  readonly #jobs: () => LiveJob[];
  readonly #spared: ReadonlySet<number>;
  readonly #groups = new Map<string, Group>();
  /** Thawed for good: killed, and dying. */
  readonly #thawed = new Set<string>();
  /** Processes whose first thread has ended: the others were moved, and it stays behind. */
  readonly #headless = new Set<number>();
  readonly #leaving: MadeGroup[] = [];

  /**
   * @param jobs lists them, as they are now
   * @param spared processes that no group may hold: the handler, the guard
   */
  constructor(freezer: Freezer, jobs: () => LiveJob[], spared: ReadonlySet<number>) {
    this.#freezer = freezer;
    this.#jobs = jobs;
    this.#spared = spared;
  }

  /** How each job is frozen. */
  get how(): { job: string; how: Freezing }[] {
    return [...this.#groups.values()].map(({ job, how }) => ({ job: job.name, how }));
  }

  /**
   * Freezes every process of the jobs that is not frozen yet; call it again until it finds none, as they fork.
   * @returns how many were found
   * @throws ReprieveError, or the system's error; what was frozen stays so until `release`
   */
  freeze(): number {
    let found = 0;
    for (const job of this.#jobs()) {
      if (!this.#thawed.has(identityOf(job))) found += this.#freezeJob(job);
    }
    return found;
  }

  #freezeJob(job: LiveJob): number {
    const loose = new Map<string, number[]>();
    const pids = pidsOf(job);
    const held = new Set([...this.#groups.values()].flatMap((group) => this.#heldBy(group, job)));
    for (const pid of pids) {
      if (held.has(pid) || this.#headless.has(pid)) continue;
      const path = this.#freezer.pathOf(pid);
      if (path === null) continue; // gone
      if (path === undefined)
        throw new Error(`process ${pid} of job ${job.name} is in a freezer cgroup that is not seen from here`);
      if (this.#spared.has(pid)) throw new Error(`process ${pid} of job ${job.name} is the handler's own`);
      loose.set(path, [...(loose.get(path) ?? []), pid]);
    }
    for (const [path, inIt] of loose) this.#freezeIn(job, new Set(pids), path, inIt);
    return loose.size;
  }

  #heldBy(group: Group, job: LiveJob): number[] {
    return isOf(group, job) ? this.#freezer.processes(group.path) : [];
  }

  #freezeIn(job: LiveJob, all: ReadonlySet<number>, path: string, pids: readonly number[]): void {
    const add = (group: Omit<Group, 'job'>) => this.#groups.set(group.path, { ...group, job });
    if (this.#freezer.state(path) !== 'THAWED') return void add({ path, how: 'before', made: null });
    if (path !== '/' && this.#freezer.processes(path).every((pid) => all.has(pid))) {
      this.#freezer.freeze(path);
      return void add({ path, how: 'own', made: null });
    }
    const known = [...this.#groups.values()].find((group) => isOf(group, job) && group.made?.home === path);
    const made = known?.made ?? this.#freezer.make(path, `reprieve-frozen-${process.pid}-${nextGroup++}`);
    if (known === undefined) {
      add({ path: made.path, how: 'made', made });
      // First, so that whoever comes in stops, and what it forks as well.
      this.#freezer.freeze(made.path);
    }
    for (const pid of pids) {
      this.#freezer.move(pid, made.path);
      if (this.#freezer.isHeadless(pid)) this.#headless.add(pid);
    }
  }

  /** Threads that may still take memory; empty once all have stopped, or wait for memory and will stop when they are woken. */
  running(): StillRunning[] {
    const running: StillRunning[] = [];
    for (const { path, job } of this.#groups.values()) {
      if (running.length >= MOST_NAMED) break;
      for (const thread of this.#freezer.running(path, MOST_NAMED - running.length))
        running.push({ job: job.name, ...thread });
    }
    return running;
  }

  /** The name of a job that somebody else has thawed meanwhile; null as a rule. */
  thawedByOthers(): string | null {
    for (const { path, job } of this.#groups.values()) {
      if (this.#freezer.state(path) === 'THAWED' && this.#freezer.processes(path).length > 0) return job.name;
    }
    return null;
  }

  /** Thaws one job alone: one that was killed dies only then. */
  thaw(job: LiveJob): void {
    this.#thawed.add(identityOf(job));
    for (const group of this.#groups.values()) if (isOf(group, job)) this.#thawGroup(group);
  }

  #thawGroup(group: Group): void {
    if (group.how !== 'before') this.#freezer.thaw(group.path);
    if (group.made !== null) this.#leaving.push(group.made);
    this.#groups.delete(group.path);
  }

  /**
   * Thaws all that was frozen by us; processes that were moved go back.
   * @returns true when nothing is left to be done: what just dies is moved with the next call
   * @throws what the last of those that failed threw, when all the others are done
   */
  release(): boolean {
    let failure: unknown;
    const attempt = (step: () => void) => {
      try {
        step();
      } catch (error) {
        failure = error;
      }
    };
    for (const group of this.#groups.values()) attempt(() => this.#thawGroup(group));
    const left = this.#leaving.splice(0).filter((made) => {
      let done = false;
      attempt(() => {
        done = this.#freezer.unmake(made);
      });
      return !done;
    });
    this.#leaving.push(...left);
    if (failure !== undefined) throw failure;
    return this.#leaving.length === 0;
  }
}

function isOf(group: Group, job: LiveJob): boolean {
  return identityOf(group.job) === identityOf(job);
}
