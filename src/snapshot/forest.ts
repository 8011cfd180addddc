import { readFileSync } from 'node:fs';
import type { Hierarchy, Process } from '../cgroup/cgroup.js';
import { pidfdOf } from '../cgroup/real.js';
import { isAdopted, nameOf, type Place, placeOf } from './grouping.js';
import type { TreeJob } from './jobs.js';
import { type ProcessFacts, readFacts } from './processes.js';
import { whyOutOfReach } from './reach.js';
import type { JobRules, ResolvedSettings } from './settings.js';
import { ProcessTree } from './tree.js';

/** Between fork and exec a process is not yet what it will be: one that is younger, in clock ticks, is read once more. */
const YOUNG_TICKS = 200;
/** One that is older may become another program, or take another name: how often that is looked for, in microseconds. */
const RENAMED_US = 900_000;

/** What the jobs of processes are found with. */
export interface ForestSetup {
  hierarchy: Pick<Hierarchy, 'clock' | 'openProcess' | 'startTime'>;
  rules: JobRules;
  /** The numbers of the processes that are to be in jobs here, now; kernel threads may be among them. */
  list: () => number[];
  /** Processes beside the handler whose job must not die: the guard. */
  spared: () => ReadonlySet<number>;
  /** The `oom_score_adj` that a process had before it, or what it is born of, was raised. */
  scoreBefore: (process: Process) => number;
}

interface Found {
  facts: ProcessFacts;
  /** Null for the handler itself, which is no member of its job. */
  process: Process | null;
}

interface Known extends Found {
  grove: Grove;
  /** Of whoever it was born of, when it was first seen. */
  from: Place | null;
  young: boolean;
}

/** A job, and how it came to be one. */
interface Grove {
  readonly place: Place;
  job: TreeJob;
  /** Of the first process that was found of it. */
  first: ProcessFacts;
  readonly scoreAdj: number | null;
  spared: string | null;
}

/**
 * Every job that is made of processes. What a process is put in a job by is read when it is first seen, and again when its name
 * has changed; it stays there whoever adopts it. A look opens nothing but the list of processes and those that are new in it.
 */
export class Forest {
  readonly #setup: ForestSetup;
  readonly #known = new Map<number, Known>();
  /** Kernel threads: held as well, so that their numbers are not another's unseen. */
  readonly #threads = new Map<number, Process>();
  readonly #groves = new Map<string, Grove>();
  #askedUs = 0;

  constructor(setup: ForestSetup) {
    this.#setup = setup;
  }

  jobs(): TreeJob[] {
    // The handler's own may have nobody else in it.
    return [...this.#groves.values()].map(({ job }) => job).filter(({ tree }) => tree.size > 0 || tree.isHunted);
  }

  find(id: string): TreeJob | undefined {
    return this.#groves.get(id)?.job;
  }

  /** Looks who has come and gone. */
  scan(): void {
    const listed = new Set(this.#setup.list());
    for (const [pid, process] of this.#threads)
      if (!listed.has(pid) || hasExited(process)) this.#dropThread(pid, process);
    for (const [pid, known] of this.#known) if (!listed.has(pid) || hasExited(known.process)) this.#drop(pid, known);
    const fresh = new Map<number, Found>();
    for (const pid of listed) {
      if (this.#known.has(pid) || this.#threads.has(pid)) continue;
      const found = this.#open(pid);
      if (found !== null) fresh.set(pid, found);
    }
    const now = this.#setup.hierarchy.clock.nowUs();
    const asks = now - this.#askedUs > RENAMED_US;
    if (asks) this.#askedUs = now;
    for (const known of this.#known.values()) {
      if (known.young || (asks && hasRenamed(known.facts))) this.#readAgain(known);
    }
    for (const pid of [...fresh.keys()]) this.#plant(pid, fresh);
    this.#tidy();
    this.#spare();
  }

  #open(pid: number): Found | null {
    if (pid === process.pid) return { facts: readFacts({ pid }) as ProcessFacts, process: null };
    const opened = this.#setup.hierarchy.openProcess(pid);
    if (opened === null) return null;
    const facts = readFacts(opened);
    if (facts === null || hasExited(opened)) {
      opened.close();
      return null;
    }
    if (!facts.isKernelThread) return { facts, process: opened };
    this.#threads.set(pid, opened);
    return null;
  }

  #readAgain(known: Known): void {
    const { process, grove, from } = known;
    const facts = readFacts(known.facts);
    if (facts === null || hasExited(process)) return; // the next look drops it
    known.facts = facts;
    known.young = this.#isYoung(facts);
    if (grove.job.tree.isHunted) return;
    grove.job.tree.remove(facts.pid);
    this.#enter(known, this.#groveOf(placeOf(facts, from, this.#setup.rules), known));
  }

  #enter(known: Known, grove: Grove): void {
    known.grove = grove;
    const { facts, process } = known;
    if (process !== null) grove.job.tree.add({ facts, process });
  }

  #isYoung({ started }: ProcessFacts): boolean {
    return this.#setup.hierarchy.startTime() - started < YOUNG_TICKS;
  }

  /** Puts a newcomer into its job; whoever it was born of first, whose number is not always the lower one. */
  #plant(pid: number, fresh: Map<number, Found>): void {
    const found = fresh.get(pid);
    if (found === undefined) return;
    fresh.delete(pid);
    const { facts } = found;
    this.#plant(facts.parent, fresh);
    const hunter = this.#hunterOf(facts);
    const bornIn = hunter ?? this.#bearerOf(facts);
    const from = bornIn?.place ?? null;
    const grove = hunter ?? this.#groveOf(placeOf(facts, from, this.#setup.rules), found);
    if (bornIn !== undefined && bornIn !== grove) bornIn.job.tree.bore(pid, facts.started);
    const known: Known = { ...found, grove, from, young: this.#isYoung(facts) };
    this.#known.set(pid, known);
    this.#enter(known, grove);
  }

  /** The job that is being killed and still bears: whoever is born of it then dies with it, whatever the rules say. */
  #hunterOf(facts: ProcessFacts): Grove | undefined {
    const parent = this.#known.get(facts.parent);
    if (parent?.grove.job.tree.isHunted && !isAdopted(facts, parent.facts)) return parent.grove;
    for (const grove of this.#groves.values()) if (grove.job.tree.isPrey(facts)) return grove;
    return undefined;
  }

  /** The job of whoever it was born of; of an orphan, that of the session or process group in which it is, if a member began it. */
  #bearerOf(facts: ProcessFacts): Grove | undefined {
    const parent = this.#known.get(facts.parent);
    if (parent !== undefined && !isAdopted(facts, parent.facts)) return parent.grove;
    for (const grove of this.#groves.values()) if (grove.job.tree.began(facts)) return grove;
    return undefined;
  }

  #groveOf(place: Place, { facts, process }: Found): Grove {
    const known = this.#groves.get(place.id);
    if (known !== undefined) {
      if (known.place.rule === place.rule || !place.descends) return known;
      // Its root has become another program: those that it bore meanwhile go with it.
      known.place.rule = place.rule;
      known.first = facts;
      known.job = { ...known.job, name: nameOf(place, facts) };
      known.job.settings = this.#settingsOf(known, known.job.name);
      return known;
    }
    const scoreAdj = place.rule === null && process !== null ? this.#setup.scoreBefore(process) : null;
    const grove = { place, first: facts, scoreAdj, spared: null };
    const name = nameOf(place, facts);
    const settings = this.#settingsOf(grove, name);
    const tree = new ProcessTree(() => this.scan());
    const job: TreeJob = { kind: 'tree', id: place.id, name, born: facts.started, settings, tree };
    const made = { ...grove, job };
    this.#groves.set(place.id, made);
    return made;
  }

  #settingsOf({ place, first, scoreAdj, spared }: Omit<Grove, 'job'>, name: string): ResolvedSettings {
    return this.#setup.rules.resolve({ name, facts: first, rule: place.rule, spared, scoreAdj: () => scoreAdj });
  }

  #drop(pid: number, { grove, process }: Known): void {
    grove.job.tree.remove(pid);
    process?.close();
    this.#known.delete(pid);
  }

  #dropThread(pid: number, process: Process): void {
    process.close();
    this.#threads.delete(pid);
  }

  #tidy(): void {
    const used = new Set([...this.#known.values()].flatMap(({ facts }) => [facts.group, facts.session]));
    const home = this.#known.get(process.pid)?.grove;
    for (const grove of this.#groves.values()) {
      const { tree } = grove.job;
      if (tree.size === 0 && !tree.isHunted && grove !== home) this.#groves.delete(grove.place.id);
      else tree.forget(this.#known, used);
    }
  }

  /** Whoever must not die: process 1, the handler, the guard. */
  #spare(): void {
    const spared = new Map<Grove | undefined, string>([[this.#known.get(1)?.grove, 'process 1 lives in it']]);
    for (const pid of this.#setup.spared()) spared.set(this.#known.get(pid)?.grove, 'the guard lives in it');
    spared.set(this.#known.get(process.pid)?.grove, 'the handler lives in it');
    for (const grove of this.#groves.values()) {
      const why = spared.get(grove) ?? whyOutOfReach(grove.job.tree.pids());
      if (why === grove.spared) continue;
      grove.spared = why;
      grove.job.settings = this.#settingsOf(grove, grove.job.name);
    }
  }

  close(): void {
    for (const { process } of this.#known.values()) process?.close();
    for (const process of this.#threads.values()) process.close();
    this.#known.clear();
    this.#threads.clear();
    this.#groves.clear();
  }
}

function hasRenamed({ pid, comm }: ProcessFacts): boolean {
  try {
    return readFileSync(`/proc/${pid}/comm`, 'utf8').slice(0, -1) !== comm;
  } catch {
    return false; // it is gone: the next look drops it
  }
}

function hasExited(process: Process | null): boolean {
  return process !== null && pidfdOf(process).exited();
}
