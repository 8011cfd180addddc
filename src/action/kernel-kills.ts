import type { Memcg } from '../cgroup/cgroup.js';
import { isVanished } from '../errors.js';
import type { KernelVictim } from '../report/report.js';
import { identityOf, type JobGroup, type LiveJob, pidsOf } from '../snapshot/jobs.js';

interface Seen {
  /** What the kernel had counted for its memcg; null for a job that is none. */
  kills: number | null;
  pids: readonly number[];
}

/** What the kernel's own killer takes in a scope whose tasks it does not let wait. */
export class KernelKills {
  readonly #scope: Memcg;
  readonly #groups: () => readonly JobGroup[];
  #total: number;
  #seen = new Map<string, Seen>();

  constructor(scope: Memcg, groups: () => readonly JobGroup[]) {
    this.#scope = scope;
    this.#groups = groups;
    this.#total = scope.kills();
    this.note();
  }

  /** True if it took somebody since. */
  get any(): boolean {
    return this.#scope.kills() > this.#total;
  }

  /** Remembers who is there, if nobody was taken since. */
  note(): void {
    if (!this.any) this.#note();
  }

  #note(): void {
    this.#total = this.#scope.kills();
    this.#seen = new Map(this.#jobs().map((job) => [identityOf(job), look(job)]));
  }

  #jobs() {
    return this.#groups().flatMap((jobs) => jobs.live());
  }

  /**
   * Whom it took since, by job: by the counts of their memcgs, and where a job is none by who is gone. The rest, of jobs that
   * came and went between two looks, has no name.
   */
  take(): KernelVictim[] {
    const taken = this.#scope.kills() - this.#total;
    if (taken <= 0) return [];
    const victims = this.#jobs().flatMap((job) => {
      const before = this.#seen.get(identityOf(job));
      const now = look(job);
      const left = new Set(now.pids);
      const pids = before?.pids.filter((pid) => !left.has(pid)) ?? [];
      const processes = now.kills === null ? pids.length : now.kills - (before?.kills ?? 0);
      return processes > 0 ? [{ job: job.name, pids, processes }] : [];
    });
    const named = victims.reduce((sum, { processes }) => sum + processes, 0);
    if (named < taken) victims.push({ job: 'jobs unknown', pids: [], processes: taken - named });
    this.#note();
    return victims;
  }
}

function look(job: LiveJob): Seen {
  try {
    return job.kind === 'memcg' ? { kills: job.memcg.kills(), pids: [] } : { kills: null, pids: pidsOf(job) };
  } catch (error) {
    if (isVanished(error)) return { kills: 0, pids: [] };
    throw error;
  }
}
