import { readdirSync } from 'node:fs';
import { type Hierarchy, isWindow, type Memcg, type Process, type TreeChange } from '../cgroup/cgroup.js';
import { Subtree } from '../cgroup/subtree.js';
import { isVanished } from '../errors.js';
import { Forest } from './forest.js';
import { Growth } from './growth.js';
import { identityOf, type JobGroup, type LiveJob, type MemcgJob, type Nursery, pidsIn, sampleJob } from './jobs.js';
import { whyOutOfReach } from './reach.js';
import type { JobRules } from './settings.js';
import { diesWith, type Job } from './snapshot.js';

/** Processes of a memcg whose `oom_score_adj` is looked at for a hint. */
const MOST_ASKED = 16;

/** What the jobs of a machine are found with. */
export interface MachineSetup {
  hierarchy: Hierarchy;
  /** The root memcg, which is closed by the caller; null on a machine without memory cgroups. */
  root: Memcg | null;
  rules: JobRules;
  /** Processes beside the handler whose job must not die: the guard. */
  spared: () => ReadonlySet<number>;
  /** The `oom_score_adj` that a process had before it, or what it is born of, was raised. */
  scoreBefore: (process: Process) => number;
  warn: (message: string) => unknown;
}

/** What was found counts for so long, in microseconds, */
const FRESH_US = 200_000;
/** or for so many times as long as it took: longer than it is until the next look where memory is nearly used up. */
const FRESH_LOOKS = 12;
/** The same of how much they hold. */
const MEASURED_US = 50_000;

interface KnownMemcg {
  job: MemcgJob;
  scoreAdj: number | null;
  spared: string | null;
}

/**
 * The jobs of a whole machine. With memory cgroups: each that a rule names, and else the topmost that hold processes
 * themselves, so that systemd's slices are passed through. What is left, which is everything on a machine without memory
 * cgroups, is jobs of processes.
 */
export class MachineJobs implements JobGroup {
  readonly #setup: MachineSetup;
  readonly #subtree: Subtree | null;
  readonly #forest: Forest;
  readonly #growth = new Growth();
  #lookedUs = 0;
  #tookUs = 0;
  #stale = true;
  #memcgs = new Map<number, KnownMemcg>();
  /** Memcgs that hold processes themselves, and are no job: the root, and those above a memcg that a rule names. */
  #open: Memcg[] = [];

  /** @throws ReprieveError if the memory cgroups cannot be opened and listened to; nothing stays open then */
  constructor(setup: MachineSetup) {
    this.#setup = setup;
    const { hierarchy, root, warn } = setup;
    this.#forest = new Forest({
      ...setup,
      list: () => (root === null ? allProcesses() : this.#open.flatMap(pidsIn)),
    });
    this.#subtree =
      root === null
        ? null
        : new Subtree(hierarchy, root, {
            created: () => this.#outdate(),
            removed: (memcg) => {
              this.#memcgs.delete(memcg.inode);
              this.#outdate();
            },
            changed: ({ path }, { kind, name }) => {
              if (kind === 'attributes') this.#resolveAt(name === '' ? path : `${path === '/' ? '' : path}/${name}`);
            },
            failed: (memcg, error) => void warn(`${memcg.path}, watched as system: ${(error as Error).message}`),
          });
    try {
      this.refresh();
    } catch (error) {
      this.close();
      throw error;
    }
  }

  #outdate(): void {
    this.#stale = true;
  }

  refresh(): void {
    this.#outdate();
    if (this.#subtree?.complete === false) this.#subtree.rescan();
    this.sample(new Set());
  }

  changed({ kind }: TreeChange): void {
    if (kind === 'overflow') this.refresh();
  }

  /** Looks for what is new, unless that was done a moment ago: who comes and goes matters less than the time it takes. */
  live(): LiveJob[] {
    const freshUs = Math.max(FRESH_US, FRESH_LOOKS * this.#tookUs);
    if (this.#stale || this.#setup.hierarchy.clock.nowUs() - this.#lookedUs > freshUs) this.look();
    return this.#all();
  }

  /** Looks for what is new. */
  look(): void {
    const { clock } = this.#setup.hierarchy;
    this.#stale = false;
    this.#lookedUs = clock.nowUs();
    this.#lookAtMemcgs();
    this.#forest.scan();
    this.#tookUs = clock.nowUs() - this.#lookedUs;
  }

  #all(): LiveJob[] {
    return [...[...this.#memcgs.values()].map(({ job }) => job), ...this.#forest.jobs()];
  }

  find(id: string): LiveJob | undefined {
    for (const { job } of this.#memcgs.values()) if (job.id === id) return job;
    return this.#forest.find(id);
  }

  sample(killed: ReadonlySet<string>): Job[] {
    const jobs: Job[] = [];
    const held = new Map<string, number>();
    for (const live of this.live()) {
      try {
        const job = sampleJob(live, killed);
        jobs.push(job);
        held.set(identityOf(job), diesWith(job));
      } catch (error) {
        if (!isVanished(error)) throw error;
      }
    }
    this.#growth.note(held, this.#setup.hierarchy.clock.nowUs());
    return jobs;
  }

  /**
   * Bytes per second of the memory that dies with a job, over the last half second to second and a half in which jobs were
   * sampled; a job that is new has grown since the look before. 0 for one that is not there.
   */
  growth(job: { id: string; born: number }): number {
    return this.#growth.of(identityOf(job));
  }

  /** Samples once more, for `growth`, unless that was done a moment ago. */
  measure(): void {
    if (this.#setup.hierarchy.clock.nowUs() - (this.#growth.notedUs ?? 0) > MEASURED_US) this.sample(new Set());
  }

  nurseryOf(job: LiveJob): Nursery {
    if (job.kind === 'memcg') return { memcg: job.memcg, deep: true };
    if (job.kind === 'tree') return { tree: job.tree };
    throw new TypeError(`${job.name} is no job of the machine`);
  }

  // --- Memory cgroups ---

  #lookAtMemcgs(): void {
    const { root } = this.#setup;
    if (root === null || this.#subtree === null) return;
    const below = new Map<string, Memcg[]>();
    for (const memcg of this.#subtree.all()) {
      if (isWindow(memcg.path)) continue;
      const parent = memcg.path.slice(0, memcg.path.lastIndexOf('/')) || '/';
      below.set(parent, [...(below.get(parent) ?? []), memcg]);
    }
    const look: Look = { below, named: new Map(), jobs: new Map(), open: [root] };
    for (const memcg of below.get('/') ?? []) this.#findNamed(memcg, look);
    for (const memcg of below.get('/') ?? []) this.#descend(memcg, look);
    this.#memcgs = look.jobs;
    this.#open = look.open;
  }

  /** Finds the topmost memcgs that rules name; true if there is one at or below this one. */
  #findNamed(memcg: Memcg, look: Look): boolean {
    if (this.#setup.rules.namesMemcg(nameOf(memcg), memcg.path)) look.named.set(memcg, 'itself');
    else if (childrenOf(memcg, look).filter((child) => this.#findNamed(child, look)).length > 0)
      look.named.set(memcg, 'below');
    return look.named.has(memcg);
  }

  #descend(memcg: Memcg, look: Look): void {
    const named = look.named.get(memcg);
    const isInhabited = named !== 'itself' && pidsIn(memcg).length > 0;
    if (named === 'itself' || (isInhabited && named === undefined)) {
      const pids = pidsAtOrBelow(memcg, look);
      if (pids.length > 0) this.#keep(memcg, pids, look);
      return;
    }
    if (isInhabited) look.open.push(memcg);
    for (const child of childrenOf(memcg, look)) this.#descend(child, look);
  }

  #keep(memcg: Memcg, pids: readonly number[], look: Look): void {
    try {
      const known = this.#memcgs.get(memcg.inode) ?? this.#begin(memcg, pids);
      const spared = this.#sparedAmong(pids);
      if (spared !== known.spared) {
        known.spared = spared;
        this.#resolve(known);
      }
      look.jobs.set(memcg.inode, known);
    } catch (error) {
      if (!isVanished(error)) throw error;
    }
  }

  #begin(memcg: Memcg, pids: readonly number[]): KnownMemcg {
    const name = nameOf(memcg);
    const scoreAdj = this.#scoreOf(pids);
    const settings = this.#setup.rules.resolve({ name, memcg, scoreAdj: () => scoreAdj });
    const job: MemcgJob = { kind: 'memcg', id: memcg.path, name, born: memcg.inode, settings, memcg };
    return { job, scoreAdj, spared: null };
  }

  #resolve({ job, scoreAdj, spared }: KnownMemcg): void {
    job.settings = this.#setup.rules.resolve({ name: job.name, memcg: job.memcg, spared, scoreAdj: () => scoreAdj });
  }

  #resolveAt(path: string): void {
    for (const known of this.#memcgs.values()) if (known.job.memcg.path === path) this.#resolve(known);
  }

  #sparedAmong(pids: readonly number[]): string | null {
    if (pids.includes(1)) return 'process 1 lives in it';
    const spared = this.#setup.spared();
    if (pids.includes(process.pid)) return 'the handler lives in it';
    if (pids.some((pid) => spared.has(pid))) return 'the guard lives in it';
    return whyOutOfReach(pids);
  }

  /** What all of its processes were given; null where they differ: nothing tells then which of them is meant. */
  #scoreOf(pids: readonly number[]): number | null {
    let score: number | null = null;
    for (const pid of pids.slice(0, MOST_ASKED)) {
      const process = this.#setup.hierarchy.openProcess(pid);
      if (process === null) continue;
      try {
        const before = this.#setup.scoreBefore(process);
        if (score !== null && before !== score) return null;
        score = before;
      } catch (error) {
        if (!isVanished(error)) throw error;
      } finally {
        process.close();
      }
    }
    return score;
  }

  close(): void {
    this.#subtree?.close();
    this.#forest.close();
    this.#memcgs.clear();
  }
}

interface Look {
  /** Children by path. */
  below: Map<string, Memcg[]>;
  /** Which ones a rule names, and which have such a one below them. */
  named: Map<Memcg, 'itself' | 'below'>;
  jobs: Map<number, KnownMemcg>;
  open: Memcg[];
}

function childrenOf({ path }: Memcg, { below }: Look): Memcg[] {
  return below.get(path) ?? [];
}

function pidsAtOrBelow(memcg: Memcg, look: Look): number[] {
  return [...pidsIn(memcg), ...childrenOf(memcg, look).flatMap((child) => pidsAtOrBelow(child, look))];
}

function nameOf({ path }: Memcg): string {
  return path.slice(1);
}

function allProcesses(): number[] {
  return readdirSync('/proc').flatMap((name) => (/^\d+$/.test(name) ? [Number(name)] : []));
}
