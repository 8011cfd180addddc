/**
 * A memory hierarchy in process: memcgs with limits, processes that grow, wait and die, and the kernel's own killer, as
 * far as the ladder can tell. The demo runs on it where there is no cgroup v1, and so do the tests of the ladder.
 */
import type { Clock } from '../clock.js';
import { ReprieveError } from '../errors.js';
import { type Guard, NO_GUARD } from '../guard/guard.js';
import { NO_LEDGER } from '../guard/ledger.js';
import { PAGE } from '../units.js';
import {
  fullSlack,
  type Hierarchy,
  type Killing,
  type Kills,
  type Listener,
  type Memcg,
  type MemoryUse,
  type OomListener,
  type OomState,
  type Process,
  type TreeChange,
  type Waiter,
} from './cgroup.js';

/** Identities are never shared, whatever hierarchy they are of. */
let nextInode = 1;

/** Node's timers and performance.now(): for a simulation in real time. */
export const wallClock: Clock = {
  nowUs: () => performance.now() * 1000,
  after(ms, run) {
    const timer = setTimeout(run, ms);
    return () => clearTimeout(timer);
  },
};

/** A clock that goes only when it is told to, from timer to timer. */
export class VirtualClock implements Clock {
  #now = 0;
  #order = 0;
  readonly #timers = new Map<number, { atUs: number; run: () => void }>();

  nowUs(): number {
    return this.#now;
  }

  after(ms: number, run: () => void): () => void {
    const key = this.#order++;
    this.#timers.set(key, { atUs: this.#now + Math.max(0, ms) * 1000, run });
    return () => this.#timers.delete(key);
  }

  /** Runs every timer up to `ms` from now, and what promises have to do between them. */
  async advance(ms: number): Promise<void> {
    const end = this.#now + ms * 1000;
    for (;;) {
      await new Promise(setImmediate);
      let next: [number, { atUs: number; run: () => void }] | undefined;
      for (const timer of this.#timers) {
        if (timer[1].atUs <= end && (next === undefined || timer[1].atUs < next[1].atUs)) next = timer;
      }
      if (next === undefined) break;
      this.#timers.delete(next[0]);
      this.#now = Math.max(this.#now, next[1].atUs);
      next[1].run();
    }
    this.#now = end;
  }
}

/** A process of the simulation, with what a test or a demo may do to it. */
export class SimulatedProcess {
  anon = 0;
  scoreAdj = 0;
  /** Got SIGKILL, and is on its way out. */
  dying = false;
  /** The kernel's killer took its memory, and does not count on it again. */
  reaped = false;
  gone = false;
  /** Waits for that many bytes in the memcg that is over its limit. */
  waiting: { over: SimulatedMemcg; bytes: number; sinceUs: number } | null = null;
  /** Longest wait so far, in microseconds. */
  longestWaitUs = 0;
  /** From SIGKILL to gone, in milliseconds; Infinity: it never goes. */
  dyingMs = 1;

  constructor(
    readonly pid: number,
    readonly name: string,
    readonly started: number,
    readonly memcg: SimulatedMemcg,
  ) {}
}

export class SimulatedMemcg {
  limit = Number.POSITIVE_INFINITY;
  shmem = 0;
  file = 0;
  killDisabled: boolean;
  kills = 0;
  removed = false;
  readonly inode = nextInode++;
  readonly children = new Map<string, SimulatedMemcg>();
  readonly processes = new Set<SimulatedProcess>();
  readonly attributes = new Map<string, string>();
  /** Who has claimed it. */
  holder: unknown = null;

  constructor(
    readonly name: string,
    readonly parent: SimulatedMemcg | null,
  ) {
    // Inherited at mkdir, as in the kernel.
    this.killDisabled = parent?.killDisabled ?? false;
  }

  get path(): string {
    if (this.parent === null) return '/';
    return this.parent.parent === null ? `/${this.name}` : `${this.parent.path}/${this.name}`;
  }

  /** This memcg and all below. */
  *below(): Generator<SimulatedMemcg> {
    yield this;
    for (const child of this.children.values()) yield* child.below();
  }

  *above(): Generator<SimulatedMemcg> {
    for (let memcg: SimulatedMemcg | null = this; memcg !== null; memcg = memcg.parent) yield memcg;
  }

  get memory(): MemoryUse {
    const use = { anon: 0, swap: 0, shmem: 0, file: 0 };
    for (const memcg of this.below()) {
      use.shmem += memcg.shmem;
      use.file += memcg.file;
      for (const process of memcg.processes) use.anon += process.anon;
    }
    return use;
  }

  get usage(): number {
    const { anon, shmem, file } = this.memory;
    return anon + shmem + file;
  }
}

/** Where the simulation leaves the path of a real kernel; each off by default. */
export interface Misbehaviour {
  /** True loses a waiter: it is not woken though memory came back (Linux since 6.5). */
  losesWaiter?: () => boolean;
}

export class SimulatedHierarchy implements Hierarchy {
  readonly kind = 'simulated';
  readonly ledger = NO_LEDGER;
  readonly guard: Guard = NO_GUARD;
  readonly root: SimulatedMemcg;
  readonly #signals = new Map<SimulatedMemcg, Set<(atUs: number) => void>>();
  readonly #trees = new Map<SimulatedMemcg, Set<(change: TreeChange) => void>>();
  readonly #killings = new Set<SimulatedKilling>();
  readonly #processes = new Map<number, SimulatedProcess>();
  #nextPid = 100;
  /** Memcgs, processes and killings that reprieve holds open, to find what it never closes. */
  readonly held = new Set<object>();

  constructor(
    readonly clock: Clock,
    readonly misbehaviour: Misbehaviour = {},
  ) {
    this.root = new SimulatedMemcg('', null);
  }

  // --- What a test or a demo does ---

  /** Makes a memcg and those missing above it, or sets the limit of one that is there: a raised limit wakes waiters. */
  make(path: string, limit = Number.POSITIVE_INFINITY): SimulatedMemcg {
    let memcg = this.root;
    for (const name of path.split('/').filter((part) => part !== '')) {
      let child = memcg.children.get(name);
      if (child === undefined) {
        child = new SimulatedMemcg(name, memcg);
        memcg.children.set(name, child);
        this.#tell(memcg, { name, kind: 'created' });
      }
      memcg = child;
    }
    memcg.limit = limit;
    this.#wake(memcg);
    return memcg;
  }

  /** Removes an empty memcg; what stays charged goes to its parent, as in the kernel. */
  remove(memcg: SimulatedMemcg): void {
    const { parent } = memcg;
    if (parent === null || memcg.processes.size > 0 || memcg.children.size > 0)
      throw new Error(`${memcg.path} is busy`);
    parent.children.delete(memcg.name);
    parent.shmem += memcg.shmem;
    parent.file += memcg.file;
    memcg.removed = true;
    this.#signal(memcg);
    this.#tell(parent, { name: memcg.name, kind: 'removed' });
  }

  spawn(memcg: SimulatedMemcg, name: string, anon = 0): SimulatedProcess {
    const process = new SimulatedProcess(this.#nextPid++, name, this.clock.nowUs(), memcg);
    memcg.processes.add(process);
    this.#processes.set(process.pid, process);
    this.grow(process, anon);
    return process;
  }

  fork(parent: SimulatedProcess): SimulatedProcess {
    const child = this.spawn(parent.memcg, parent.name);
    child.scoreAdj = parent.scoreAdj;
    return child;
  }

  /** The process touches memory; it waits, or somebody dies, if there is none. False while it waits, or if it is gone. */
  grow(process: SimulatedProcess, bytes: number): boolean {
    if (process.gone || process.dying || process.waiting !== null) return false;
    let need = Math.ceil(bytes / PAGE) * PAGE;
    for (;;) {
      if (this.#over(process.memcg, need) === null) {
        process.anon += need;
        return true;
      }
      // Page by page, as faults come: what fits is charged, and the page that does not finds who is full.
      const room = Math.min(...[...process.memcg.above()].map(({ limit, usage }) => limit - usage));
      const fits = Math.max(0, Math.floor(room / PAGE) * PAGE);
      process.anon += fits;
      need -= fits;
      const over = this.#over(process.memcg, PAGE);
      if (over === null) continue; // page cache was dropped above
      const killed = !over.killDisabled && this.#kernelKill(over);
      if (killed || over.killDisabled) this.#signal(over);
      if (!killed) {
        process.waiting = { over, bytes: need, sinceUs: this.clock.nowUs() };
        return false;
      }
      if (process.gone || process.dying) return false;
    }
  }

  /** The process gives memory back. */
  shrink(process: SimulatedProcess, bytes: number): void {
    process.anon = Math.max(0, process.anon - bytes);
    this.#wake(process.memcg);
  }

  /** The process ends by itself. */
  exit(process: SimulatedProcess): void {
    if (process.gone) return;
    this.#waited(process);
    process.gone = true;
    process.anon = 0;
    process.memcg.processes.delete(process);
    this.#processes.delete(process.pid);
    for (const killing of this.#killings) killing.exited(process);
    this.#wake(process.memcg);
  }

  /** SIGKILL. */
  kill(process: SimulatedProcess): void {
    if (process.dying || process.gone) return;
    process.dying = true;
    this.#waited(process);
    if (Number.isFinite(process.dyingMs)) this.clock.after(process.dyingMs, () => this.exit(process));
  }

  /** Page cache that the kernel can drop goes first. */
  #over(memcg: SimulatedMemcg, bytes: number): SimulatedMemcg | null {
    for (const level of memcg.above()) {
      if (level.usage + bytes <= level.limit) continue;
      for (const below of level.below()) below.file = 0;
      if (level.usage + bytes > level.limit) return level;
    }
    return null;
  }

  /** The kernel's own killer: the largest by oom_badness(). False if there is nobody it may take. */
  #kernelKill(over: SimulatedMemcg): boolean {
    let worst: SimulatedProcess | null = null;
    let most = Number.NEGATIVE_INFINITY;
    for (const memcg of over.below()) {
      for (const process of memcg.processes) {
        if (process.reaped || process.scoreAdj === -1000) continue;
        const badness = process.anon + (process.scoreAdj * over.limit) / 1000;
        if (badness > most) [worst, most] = [process, badness];
      }
    }
    if (worst === null) return false;
    // The kernel's reaper takes the memory at once, also that of a process that is dying already.
    worst.reaped = true;
    if (worst.dying) {
      this.shrink(worst, worst.anon);
      return true;
    }
    over.kills++;
    worst.dying = true;
    this.exit(worst);
    return true;
  }

  #waited(process: SimulatedProcess): void {
    if (process.waiting === null) return;
    process.longestWaitUs = Math.max(process.longestWaitUs, this.clock.nowUs() - process.waiting.sinceUs);
    process.waiting = null;
  }

  /** Memory came back in this memcg, or the killer: those who wait there or above try again. */
  #wake(memcg: SimulatedMemcg, losable = true): void {
    const levels = new Set(memcg.above());
    for (const process of [...this.#processes.values()]) {
      const { waiting } = process;
      if (waiting === null || !(levels.has(waiting.over) || [...waiting.over.above()].includes(memcg))) continue;
      if (losable && this.misbehaviour.losesWaiter?.()) continue;
      const { sinceUs } = waiting;
      this.#waited(process);
      this.grow(process, waiting.bytes);
      const again = process.waiting as SimulatedProcess['waiting'];
      if (again !== null) again.sinceUs = sinceUs; // one wait, as far as the process can tell
    }
  }

  #signal(memcg: SimulatedMemcg): void {
    for (const below of memcg.below()) {
      for (const signal of this.#signals.get(below) ?? []) {
        this.clock.after(0, () => {
          if (this.#signals.get(below)?.has(signal)) signal(this.clock.nowUs());
        });
      }
    }
  }

  #tell(memcg: SimulatedMemcg, change: TreeChange): void {
    for (const listener of [...(this.#trees.get(memcg) ?? [])]) listener(change);
  }

  // --- What reprieve does ---

  open(path: string): Memcg {
    let memcg: SimulatedMemcg | undefined = this.root;
    for (const name of path.split('/').filter((part) => part !== '')) memcg = memcg?.children.get(name);
    if (memcg === undefined) throw new ReprieveError('ERR_REPRIEVE_NOT_A_MEMCG', `There is no simulated memcg ${path}`);
    return this.#handle(memcg);
  }

  #handle(memcg: SimulatedMemcg): SimulatedHandle {
    return new SimulatedHandle(memcg, this.held, {
      open: (child) => this.#handle(child),
      waits: () => this.#waits(memcg),
      wake: () => this.#wake(memcg, false),
    });
  }

  #waits(memcg: SimulatedMemcg): boolean {
    const levels = [...memcg.above()];
    return [...this.#processes.values()].some(({ waiting }) => waiting && levels.includes(waiting.over));
  }

  startTime(): number {
    return this.clock.nowUs();
  }

  openProcess(pid: number): Process | null {
    const process = this.#processes.get(pid);
    return process === undefined ? null : new SimulatedProcessHandle(process, this.held);
  }

  openMachine(): Memcg {
    throw new ReprieveError('ERR_REPRIEVE_UNSUPPORTED', "The simulation has no scope 'system'");
  }

  prepareHold(): void {}

  listenOom(memcg: Memcg, signal: (atUs: number) => void): OomListener {
    const { there } = memcg as SimulatedHandle;
    const { close } = addTo(this.#signals, there, signal);
    if (this.#waits(there)) this.#signal(there);
    const isOpen = () => this.#signals.get(there)?.has(signal);
    // Not by the clock: whoever waits for a drill need not let time go by.
    return { close, trigger: () => void setImmediate(() => isOpen() && signal(this.clock.nowUs())) };
  }

  listenNear(): Listener {
    return { close() {} }; // only a hint, and the simulation has no caches to warm
  }

  listenTree(memcg: Memcg, change: (change: TreeChange) => void): Listener {
    return addTo(this.#trees, (memcg as SimulatedHandle).there, change);
  }

  drainTree(): void {} // delivered at once

  listWaiters(memcg: Memcg, most: number): Waiter[] {
    return [...(memcg as SimulatedHandle).there.processes]
      .filter(({ waiting }) => waiting !== null)
      .slice(0, most)
      .map(({ pid, name }) => ({ pid, tid: pid, name }));
  }

  startKilling(exited: () => void, dry = false): Killing {
    const killing = new SimulatedKilling(
      (process) => dry || this.kill(process),
      () => this.clock.after(0, exited),
      () => {
        this.#killings.delete(killing);
        this.held.delete(killing);
      },
    );
    this.#killings.add(killing);
    this.held.add(killing);
    return killing;
  }

  keepProcesses(): void {}

  keepAlive(): void {}

  close(): void {
    this.#signals.clear();
    this.#trees.clear();
  }
}

function addTo<K, V>(map: Map<K, Set<V>>, key: K, value: V): Listener {
  const set = map.get(key) ?? new Set();
  map.set(key, set.add(value));
  return { close: () => void set.delete(value) };
}

class SimulatedHandle implements Memcg {
  readonly parks = true;
  readonly path: string;
  readonly inode: number;
  readonly owner = 0;

  constructor(
    private readonly target: SimulatedMemcg,
    private readonly held: Set<object>,
    private readonly kernel: { open: (child: SimulatedMemcg) => Memcg; waits: () => boolean; wake: () => void },
  ) {
    this.path = target.path;
    this.inode = target.inode;
    held.add(this);
  }

  get there(): SimulatedMemcg {
    if (!this.target.removed && this.held.has(this)) return this.target;
    throw new ReprieveError('ERR_REPRIEVE_VANISHED', `The simulated memcg ${this.path} was removed, or closed here`);
  }

  oomState(): OomState {
    return { killDisabled: this.there.killDisabled, underOom: this.kernel.waits() };
  }

  kills(): Kills {
    const { kills } = this.there;
    return { counted: kills, processes: kills };
  }

  usage(): number {
    return this.there.usage;
  }

  limit(): number {
    return this.there.limit;
  }

  isFull(): boolean {
    return this.usage() + fullSlack(this.limit()) >= this.limit();
  }

  memory(): MemoryUse {
    return this.there.memory;
  }

  isArmed(): boolean {
    return this.oomState().killDisabled;
  }

  setKillDisabled(disabled: boolean): void {
    this.there.killDisabled = disabled;
    if (!disabled) this.kernel.wake();
  }

  attribute(name: string): string | null {
    return this.there.attributes.get(name) ?? null;
  }

  claim(): boolean {
    const { there } = this;
    there.holder ??= this;
    return there.holder === this;
  }

  unclaim(): void {
    if (this.target.holder === this) this.target.holder = null;
  }

  children(): string[] {
    return [...this.there.children.keys()];
  }

  child(name: string): Memcg {
    const child = this.there.children.get(name);
    if (child !== undefined) return this.kernel.open(child);
    throw new ReprieveError('ERR_REPRIEVE_VANISHED', `The simulated memcg ${this.path}/${name} was removed`);
  }

  pids(): number[] {
    return [...this.there.processes].map(({ pid }) => pid);
  }

  /** None once it is removed or closed: a killing passes over it. */
  processes(): SimulatedProcess[] {
    return this.held.has(this) ? [...this.target.processes] : [];
  }

  kernelReserve(): null {
    return null;
  }

  close(): void {
    this.held.delete(this);
  }
}

class SimulatedProcessHandle implements Process {
  readonly pid: number;
  readonly name: string;
  readonly started: number;

  constructor(
    readonly target: SimulatedProcess,
    private readonly held: Set<object>,
  ) {
    this.pid = target.pid;
    this.name = target.name;
    this.started = target.started;
    held.add(this);
  }

  get #there(): SimulatedProcess {
    if (!this.target.gone && this.held.has(this)) return this.target;
    throw new ReprieveError('ERR_REPRIEVE_VANISHED', `The simulated process ${this.pid} is gone, or closed here`);
  }

  memory(): MemoryUse {
    return { anon: this.#there.anon, swap: 0, shmem: 0, file: 0 };
  }

  scoreAdj(): number {
    return this.#there.scoreAdj;
  }

  setScoreAdj(value: number): void {
    this.#there.scoreAdj = value;
  }

  close(): void {
    this.held.delete(this);
  }
}

class SimulatedKilling implements Killing {
  readonly #signalled = new Map<number, SimulatedProcess>();
  readonly unreachable = 0;
  readonly needsRounds = true;

  constructor(
    private readonly kill: (process: SimulatedProcess) => unknown,
    private readonly tell: () => void,
    private readonly end: () => void,
  ) {}

  get pids(): number[] {
    return [...this.#signalled.keys()];
  }

  round(memcgs: readonly Memcg[]): number {
    let signalled = 0;
    for (const memcg of memcgs as readonly SimulatedHandle[]) {
      for (const process of memcg.processes()) signalled += this.#signal(process);
    }
    return signalled;
  }

  signal(process: Process): number {
    return this.#signal((process as SimulatedProcessHandle).target);
  }

  #signal(process: SimulatedProcess): number {
    if (process.gone || this.#signalled.has(process.pid)) return 0;
    this.#signalled.set(process.pid, process);
    this.kill(process);
    return 1;
  }

  alive(): number {
    return [...this.#signalled.values()].filter(({ gone }) => !gone).length;
  }

  release(): [number, number] {
    return [0, 0];
  }

  exited(process: SimulatedProcess): void {
    if (this.#signalled.has(process.pid)) this.tell();
  }

  close(): void {
    this.end();
  }
}
