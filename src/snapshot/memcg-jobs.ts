import { type Hierarchy, isAtOrBelow, isWindow, type Memcg, openChild, type TreeChange } from '../cgroup/cgroup.js';
import { isThere } from '../cgroup/subtree.js';
import { isVanished } from '../errors.js';
import { type JobGroup, type LiveJob, type MemcgJob, type Nursery, type ProcessJob, sampleJob } from './jobs.js';
import { readFacts } from './processes.js';
import type { JobRules } from './settings.js';
import type { Job } from './snapshot.js';

/**
 * The jobs of one memcg: its child memcgs, and each process that sits in it directly. Descriptors are opened when a job
 * appears, so that sampling at an OOM opens nothing but the list of processes.
 */
export class MemcgJobs implements JobGroup {
  readonly #hierarchy: Hierarchy;
  readonly #memcg: Memcg;
  readonly #base: string;
  readonly #rules: JobRules;
  readonly #memcgs = new Map<string, MemcgJob>();
  readonly #processes = new Map<number, ProcessJob>();

  /** @param base path of the watched scope: names, which globs match, are relative to it */
  constructor(hierarchy: Hierarchy, memcg: Memcg, base: string, rules: JobRules) {
    this.#hierarchy = hierarchy;
    this.#memcg = memcg;
    this.#base = base;
    this.#rules = rules;
    this.refresh();
  }

  /** Finds the child memcgs anew. */
  refresh(): void {
    const names = new Set(this.#memcg.children());
    for (const name of this.#memcgs.keys()) names.add(name);
    for (const name of names) this.#look(name);
  }

  /** Something changed below the memcg. */
  changed({ name, kind }: TreeChange): void {
    if (kind === 'overflow') return this.refresh();
    const job = this.#memcgs.get(name);
    if (kind !== 'attributes') this.#look(name);
    else if (job !== undefined) job.settings = this.#rules.resolve(job);
  }

  #look(name: string): void {
    const known = this.#memcgs.get(name);
    if (known !== undefined) {
      if (isThere(known.memcg)) return;
      known.memcg.close();
      this.#memcgs.delete(name);
    }
    const memcg = name === '' || isWindow(name) ? null : openChild(this.#memcg, name);
    if (memcg === null) return;
    const jobName = this.#nameOf(memcg.path);
    const settings = this.#rules.resolve({ name: jobName, memcg });
    this.#memcgs.set(name, { kind: 'memcg', id: memcg.path, name: jobName, born: memcg.inode, settings, memcg });
  }

  #refreshProcesses(): void {
    const pids = new Set(this.#memcg.pids());
    for (const [pid, job] of this.#processes) {
      if (!pids.has(pid)) this.#drop(job);
    }
    for (const pid of pids) {
      if (this.#processes.has(pid)) continue;
      const opened = this.#hierarchy.openProcess(pid);
      if (opened === null) continue;
      const { name, started } = opened;
      const facts = this.#rules.asksProcesses ? readFacts(opened) : null;
      const settings = this.#rules.resolve({ name, facts });
      this.#processes.set(pid, { kind: 'process', id: `pid:${pid}`, name, born: started, settings, process: opened });
    }
  }

  #drop(job: ProcessJob): void {
    job.process.close();
    this.#processes.delete(job.process.pid);
  }

  #nameOf(path: string): string {
    return isAtOrBelow(path, this.#base) ? path.slice(this.#base.length + 1) : path;
  }

  live(): LiveJob[] {
    this.#refreshProcesses();
    return [...this.#memcgs.values(), ...this.#processes.values()];
  }

  find(id: string): LiveJob | undefined {
    for (const job of this.#memcgs.values()) if (job.id === id) return job;
    for (const job of this.#processes.values()) if (job.id === id) return job;
    return undefined;
  }

  sample(killed: ReadonlySet<string>): Job[] {
    const jobs: Job[] = [];
    for (const job of this.live()) {
      try {
        jobs.push(sampleJob(job, killed));
      } catch (error) {
        if (!isVanished(error)) throw error;
        // The number of a process that is gone may be another's by the next look.
        if (job.kind === 'process') this.#drop(job);
      }
    }
    return jobs;
  }

  nurseryOf(job: LiveJob): Nursery {
    return job.kind === 'memcg' ? { memcg: job.memcg, deep: true } : { memcg: this.#memcg, deep: false };
  }

  close(): void {
    for (const job of this.#memcgs.values()) job.memcg.close();
    for (const job of this.#processes.values()) job.process.close();
    this.#memcgs.clear();
    this.#processes.clear();
  }
}
