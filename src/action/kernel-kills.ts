import type { Kills, Memcg } from '../cgroup/cgroup.js';
import { isVanished } from '../errors.js';
import type { KernelVictim } from '../report/report.js';
import { identityOf, type JobGroup, type LiveJob, pidsOf } from '../snapshot/jobs.js';

interface Seen {
  /** What the kernel had taken of its memcg; null for a job that is none. */
  kills: Kills | null;
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
    this.#total = scope.kills().counted;
    this.note();
  }

  /** True if it took somebody since. */
  get any(): boolean {
    return this.#scope.kills().counted > this.#total;
  }

  /** Remembers who is there, if nobody was taken since. */
  note(): void {
    if (!this.any) this.#note();
  }

  #note(): void {
    this.#total = this.#scope.kills().counted;
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
    let unnamed = this.#scope.kills().counted - this.#total;
    if (unnamed <= 0) return [];
    const victims = this.#jobs().flatMap((job) => {
      const before = this.#seen.get(identityOf(job));
      const now = look(job);
      const left = new Set(now.pids);
      const pids = before?.pids.filter((pid) => !left.has(pid)) ?? [];
      const gone = { counted: pids.length, processes: pids.length };
      const { counted, processes } = now.kills === null ? gone : since(before?.kills, now.kills);
      if (processes <= 0) return [];
      unnamed -= counted;
      return [{ job: job.name, pids, processes }];
    });
    // Of a job that died whole, and whose memcg is gone by now, that is one too many.
    if (unnamed > 0) victims.push({ job: 'jobs unknown', pids: [], processes: unnamed });
    this.#note();
    return victims;
  }
}

function look(job: LiveJob): Seen {
  try {
    return job.kind === 'memcg' ? { kills: job.memcg.kills(), pids: [] } : { kills: null, pids: pidsOf(job) };
  } catch (error) {
    if (isVanished(error)) return { kills: { counted: 0, processes: 0 }, pids: [] };
    throw error;
  }
}

function since(before: Kills | null | undefined, now: Kills): Kills {
  return {
    counted: now.counted - (before?.counted ?? 0),
    processes: now.processes - (before?.processes ?? 0),
  };
}
