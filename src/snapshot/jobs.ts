import {
  closeAll,
  type Hierarchy,
  isAtOrBelow,
  isWindow,
  type Memcg,
  openChild,
  openDescendants,
  type Process,
  type TreeChange,
} from '../cgroup/cgroup.js';
import { isThere } from '../cgroup/subtree.js';
import { isVanished } from '../errors.js';
import type { JobRules, ResolvedSettings } from './settings.js';
import type { Job } from './snapshot.js';

/** A job with the descriptors that it is read and killed through. */
export type LiveJob = {
  readonly id: string;
  readonly name: string;
  readonly born: number;
  settings: ResolvedSettings;
} & ({ readonly kind: 'memcg'; readonly memcg: Memcg } | { readonly kind: 'process'; readonly process: Process });

/** Names a job for good: a memcg made anew at the same path, or a process with the same number, is another job. */
export function identityOf(job: { id: string; born: number }): string {
  return `${job.id}#${job.born}`;
}

/**
 * The jobs of one memcg: its child memcgs, and each process that sits in it directly. Descriptors are opened when a job
 * appears, so that sampling at an OOM opens nothing but the list of processes.
 */
export class Jobs {
  readonly #hierarchy: Hierarchy;
  readonly memcg: Memcg;
  readonly #base: string;
  readonly #rules: JobRules;
  readonly #memcgs = new Map<string, LiveJob & { kind: 'memcg' }>();
  readonly #processes = new Map<number, LiveJob & { kind: 'process' }>();

  /** @param base path of the watched scope: names, which globs match, are relative to it */
  constructor(hierarchy: Hierarchy, memcg: Memcg, base: string, rules: JobRules) {
    this.#hierarchy = hierarchy;
    this.memcg = memcg;
    this.#base = base;
    this.#rules = rules;
    this.refresh();
  }

  /** Finds the child memcgs anew. */
  refresh(): void {
    const names = new Set(this.memcg.children());
    for (const name of this.#memcgs.keys()) names.add(name);
    for (const name of names) this.#look(name);
  }

  /** Something changed below the memcg. */
  changed({ name, kind }: TreeChange): void {
    if (kind === 'overflow') return this.refresh();
    const job = this.#memcgs.get(name);
    if (kind !== 'attributes') this.#look(name);
    else if (job !== undefined) job.settings = this.#rules.resolve(job.name, job.memcg);
  }

  #look(name: string): void {
    const known = this.#memcgs.get(name);
    if (known !== undefined) {
      if (isThere(known.memcg)) return;
      known.memcg.close();
      this.#memcgs.delete(name);
    }
    const memcg = name === '' || isWindow(name) ? null : openChild(this.memcg, name);
    if (memcg === null) return;
    const jobName = this.#nameOf(memcg.path);
    const settings = this.#rules.resolve(jobName, memcg);
    this.#memcgs.set(name, { kind: 'memcg', id: memcg.path, name: jobName, born: memcg.inode, settings, memcg });
  }

  #refreshProcesses(): void {
    const pids = new Set(this.memcg.pids());
    for (const [pid, job] of this.#processes) {
      if (!pids.has(pid)) this.#drop(job);
    }
    for (const pid of pids) {
      if (this.#processes.has(pid)) continue;
      const opened = this.#hierarchy.openProcess(pid);
      if (opened === null) continue;
      const settings = this.#rules.resolve(opened.name, null);
      const { name, started } = opened;
      this.#processes.set(pid, { kind: 'process', id: `pid:${pid}`, name, born: started, settings, process: opened });
    }
  }

  #drop(job: LiveJob & { kind: 'process' }): void {
    job.process.close();
    this.#processes.delete(job.process.pid);
  }

  #nameOf(path: string): string {
    return isAtOrBelow(path, this.#base) ? path.slice(this.#base.length + 1) : path;
  }

  /** Every job there is now. */
  live(): LiveJob[] {
    this.#refreshProcesses();
    return [...this.#memcgs.values(), ...this.#processes.values()];
  }

  /** The job of that id. */
  find(id: string): LiveJob | undefined {
    for (const job of this.#memcgs.values()) if (job.id === id) return job;
    for (const job of this.#processes.values()) if (job.id === id) return job;
    return undefined;
  }

  /** Reads every job's memory; `killed` holds identities. A job that vanishes meanwhile is left out. */
  sample(killed: ReadonlySet<string>): Job[] {
    const jobs: Job[] = [];
    for (const job of this.live()) {
      try {
        const { anon, swap, shmem, file } = (job.kind === 'memcg' ? job.memcg : job.process).memory();
        const { id, name, kind, born, settings } = job;
        const { priority, overPriority, reservation, protected: isProtected, from } = settings;
        jobs.push({
          id,
          name,
          kind,
          priority,
          overPriority,
          reservation,
          protected: isProtected,
          settings: from,
          anon,
          swap,
          shmem,
          file,
          born,
          killed: killed.has(identityOf(job)),
        });
      } catch (error) {
        if (!isVanished(error)) throw error;
        // The number of a process that is gone may be another's by the next look.
        if (job.kind === 'process') this.#drop(job);
      }
    }
    return jobs;
  }

  close(): void {
    for (const job of this.#memcgs.values()) job.memcg.close();
    for (const job of this.#processes.values()) job.process.close();
    this.#memcgs.clear();
    this.#processes.clear();
  }
}

/** Processes directly in a memcg; none if it is gone. */
export function pidsIn(memcg: Memcg): number[] {
  try {
    return memcg.pids();
  } catch (error) {
    if (isVanished(error)) return [];
    throw error;
  }
}

/** Processes of a job, those of memcgs below it included. */
export function pidsOf(job: LiveJob): number[] {
  if (job.kind === 'process') return [job.process.pid];
  const below = openDescendants(job.memcg);
  const pids = [job.memcg, ...below].flatMap(pidsIn);
  closeAll(below);
  return pids;
}
