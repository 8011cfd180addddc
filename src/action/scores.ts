import { type Hierarchy, isAtOrBelow, type Process } from '../cgroup/cgroup.js';
import { isRevoked, isVanished } from '../errors.js';
import type { Entry } from '../guard/ledger.js';
import { type Nursery, pidsBelow, pidsIn } from '../snapshot/jobs.js';
import type { ProcessTree } from '../snapshot/tree.js';

/** The kernel never takes a process with this `oom_score_adj`: somebody's word, which is not ours to overrule. */
export const NEVER = -1000;

/** What somebody wants of a process. */
export interface Wanted {
  home: Nursery;
  /** At least this `oom_score_adj`, or what to make of the process. */
  score: number | ((process: Process) => number);
}

/** A process whose `oom_score_adj` was looked at, and perhaps raised. */
interface Raised {
  started: number;
  /** What it had before anybody raised it. */
  was: number;
  /** What it holds now, as far as we know. */
  written: number;
  /** Of all that ever wanted it; the first one is written down. */
  homes: Nursery[];
  /** Null if it had enough itself. */
  entry: Entry | null;
  wanted: Map<object, number>;
}

/** Values that were written there: whoever is born of a raised process inherits one of them. */
interface Home {
  nursery: Nursery;
  /** None for a tree, of which nothing is left to find its processes by once we are gone. */
  entry: Entry | null;
  /** Processes that are raised there. */
  members: Set<number>;
  /** By what was written. */
  elders: Map<number, { was: number; raisedAt: number }>;
}

/**
 * Every `oom_score_adj` that a handler has raised, by process: one register for all its watches, as a process may be
 * wanted by several. Values are only raised, written down first, and put back, also on processes that were born since.
 */
export class ScoreRegister {
  readonly #hierarchy: Hierarchy;
  readonly #raised = new Map<number, Raised>();
  readonly #homes = new Map<string, Home>();
  /** Processes whose value could not be written. */
  failures = 0;

  constructor(hierarchy: Hierarchy) {
    this.#hierarchy = hierarchy;
  }

  /** Makes this all that `holder` wants raised. Of several holders the highest counts. */
  apply(holder: object, wanted: ReadonlyMap<number, Wanted>): void {
    // First those that are wanted: what is new among them may be born of one that is gone.
    for (const [pid, { home, score }] of wanted) this.#raise(holder, pid, home, score);
    const left = new Map<string, Nursery>();
    const lowered = new Set<number>();
    for (const [pid, raised] of [...this.#raised]) {
      // One that nobody wants any more could not be put back before.
      if (wanted.has(pid) || (!raised.wanted.delete(holder) && raised.wanted.size > 0)) continue;
      for (const home of raised.homes) left.set(keyOf(home), home);
      lowered.add(pid);
      this.#lower(pid, raised);
    }
    for (const home of left.values()) this.#sweep(home, lowered);
  }

  #raise(holder: object, pid: number, home: Nursery, score: Wanted['score']): void {
    const known = this.#raised.get(pid);
    if (known !== undefined && known.wanted.get(holder) === score) return;
    this.#with(pid, (process) => {
      let raised = known;
      const value = process.scoreAdj();
      if (raised !== undefined && (raised.started !== process.started || raised.written !== value)) {
        this.#forget(pid, raised); // another process, or somebody else's word since
        raised = undefined;
      }
      if (raised === undefined) {
        if (value === NEVER) return;
        const was = this.#inherited(home, process, value) ?? value;
        raised = { started: process.started, was, written: value, homes: [], entry: null, wanted: new Map() };
      }
      if (!raised.homes.some((other) => keyOf(other) === keyOf(home))) raised.homes.push(home);
      raised.wanted.set(holder, typeof score === 'number' ? score : score(process));
      this.#write(process, raised);
      this.#raised.set(pid, raised);
    });
  }

  /**
   * The `oom_score_adj` that a process had before it was raised, or before whatever it is born of was. Who has by itself
   * what something else was raised to counts as born of that.
   * @throws ReprieveError ERR_REPRIEVE_VANISHED once the process is gone
   */
  before(process: Process): number {
    const value = process.scoreAdj();
    const raised = this.#raised.get(process.pid);
    if (raised?.started === process.started && raised.written === value) return raised.was;
    return this.#inheritedFrom([...this.#homes.values()], process, value) ?? value;
  }

  /** What a process in that nursery had before its parent was raised; null if it was not born since. */
  #inherited(nursery: Nursery, process: Process, value: number): number | null {
    const homes = [...this.#homes.values()].filter((home) => covers(home.nursery, nursery, process));
    return this.#inheritedFrom(homes, process, value);
  }

  #inheritedFrom(homes: readonly Home[], { started }: Process, value: number): number | null {
    const found: number[] = [];
    for (const { elders } of homes) {
      const elder = elders.get(value);
      if (elder !== undefined && started >= elder.raisedAt - 1) found.push(elder.was);
    }
    return found.length > 0 ? Math.min(...found) : null;
  }

  /** Brings a process to what is wanted of it now. */
  #write(process: Process, raised: Raised): void {
    const { was, homes, entry: before } = raised;
    const target = Math.max(was, ...raised.wanted.values());
    const raisedAt = this.#hierarchy.startTime();
    try {
      if (target === was) raised.entry = null;
      else if (target !== raised.written || before === null)
        raised.entry = this.#writeDown(process, raised, target, raisedAt);
      else for (const nursery of homes) this.#homeOf(nursery);
      if (target !== raised.written) process.setScoreAdj(target);
    } catch (error) {
      if (raised.entry !== before) raised.entry?.clear();
      raised.entry = before;
      for (const nursery of homes) this.#dropEmptyHome(nursery);
      throw error;
    }
    raised.written = target;
    if (raised.entry !== before) before?.clear();
    if (target === was) return;
    for (const nursery of homes) {
      const { members, elders } = this.#homeOf(nursery);
      members.add(process.pid);
      const elder = elders.get(target) ?? { was, raisedAt };
      elders.set(target, { was: Math.min(was, elder.was), raisedAt: Math.min(raisedAt, elder.raisedAt) });
    }
  }

  #writeDown(process: Process, { started, was, homes }: Raised, wrote: number, raisedAt: number): Entry {
    const [first] = homes.map((nursery) => this.#homeOf(nursery));
    const home = first !== undefined && 'memcg' in first.nursery ? first.nursery.memcg.inode : 0;
    return this.#hierarchy.ledger.score({ pid: process.pid, started, raisedAt, was, wrote, home });
  }

  #homeOf(nursery: Nursery): Home {
    const key = keyOf(nursery);
    let home = this.#homes.get(key);
    if (home === undefined) {
      const entry = 'memcg' in nursery ? this.#hierarchy.ledger.home(nursery.memcg, nursery.deep) : null;
      home = { nursery, entry, members: new Set(), elders: new Map() };
      this.#homes.set(key, home);
    }
    return home;
  }

  /** One holder less wants it raised. */
  #lower(pid: number, raised: Raised): void {
    const done = this.#with(pid, (process) => {
      if (process.started !== raised.started || process.scoreAdj() !== raised.written) return;
      if (raised.wanted.size > 0) this.#write(process, raised);
      else if (raised.was !== raised.written) process.setScoreAdj(raised.was);
    });
    if (done && raised.wanted.size === 0) this.#forget(pid, raised);
  }

  #forget(pid: number, raised: Raised): void {
    this.#raised.delete(pid);
    raised.entry?.clear();
    for (const home of raised.homes) this.#homes.get(keyOf(home))?.members.delete(pid);
  }

  /** Puts back what processes inherited that nobody knows of. */
  #sweep(nursery: Nursery, lowered: ReadonlySet<number>): void {
    // Twice: a child that is forked between the listing and the write of its parent inherits the raised value.
    const given = new Set(lowered); // what they hold now is not to be looked at again
    for (let round = 0; round < 2; round++) {
      for (const pid of pidsOfNursery(nursery)) {
        if (this.#raised.has(pid) || given.has(pid)) continue;
        this.#with(pid, (process) => {
          const was = this.#inherited(nursery, process, process.scoreAdj());
          if (was === null) return;
          process.setScoreAdj(was);
          given.add(pid);
        });
      }
    }
    this.#dropEmptyHome(nursery);
  }

  #dropEmptyHome(nursery: Nursery): void {
    const home = this.#homes.get(keyOf(nursery));
    if (home === undefined || home.members.size > 0) return;
    this.#homes.delete(keyOf(nursery));
    home.entry?.clear();
  }

  /** One process; one that is gone is passed over. False if it failed, which must not keep the others. */
  #with(pid: number, run: (process: Process) => void): boolean {
    let process: Process | null = null;
    try {
      process = this.#hierarchy.openProcess(pid);
      if (process !== null) run(process);
      return true;
    } catch (error) {
      if (isVanished(error)) return true;
      if (!isRevoked(error)) this.failures++;
      return false;
    } finally {
      process?.close();
    }
  }
}

let nextTree = 1;
const treeKeys = new WeakMap<ProcessTree, number>();

function keyOf(nursery: Nursery): string {
  if ('memcg' in nursery) return `${nursery.memcg.inode}${nursery.deep ? ' deep' : ''}`;
  const key = treeKeys.get(nursery.tree) ?? nextTree++;
  treeKeys.set(nursery.tree, key);
  return `tree ${key}`;
}

/** Whether what is born in `home` may be found in `nursery`, where that process is. */
function covers(home: Nursery, nursery: Nursery, { pid, started }: Process): boolean {
  if ('tree' in home) return home.tree.isKin(pid, started);
  if ('tree' in nursery) return false;
  return home.deep ? isAtOrBelow(nursery.memcg.path, home.memcg.path) : nursery.memcg.inode === home.memcg.inode;
}

/** None if the memcg is gone. */
function pidsOfNursery(nursery: Nursery): number[] {
  if ('tree' in nursery) return nursery.tree.kin();
  try {
    return nursery.deep ? pidsBelow(nursery.memcg) : pidsIn(nursery.memcg);
  } catch (error) {
    if (isVanished(error)) return [];
    throw error;
  }
}
