/**
 * What the memory controllers of both cgroup versions have in common, over the addon: memcgs by descriptors, one event set,
 * processes and their killing.
 */
import { uptime } from 'node:os';
import { type Clock, realClock } from '../clock.js';
import { fromSystem, ReprieveError, type SystemError } from '../errors.js';
import { type Epoch, NO_EPOCH, SharedEpoch } from '../guard/epoch.js';
import { type Guard, NO_GUARD } from '../guard/guard.js';
import { type Ledger, NO_LEDGER } from '../guard/ledger.js';
import {
  type Channel,
  type ControlFile,
  type Directory,
  type EventSet,
  type Killer,
  type NativeBinding,
  native,
  type Pidfd,
} from '../native.js';
import type { Marks } from '../source/shortage.js';
import type {
  Hierarchy,
  Killing,
  Kills,
  Listener,
  Memcg,
  MemoryUse,
  OomListener,
  OomState,
  Process,
  TreeChange,
  Waiter,
} from './cgroup.js';
import { Machine } from './machine.js';
import { openProcess, type RealProcess } from './process.js';

/** Start times of processes are in these (sysconf(_SC_CLK_TCK), the same wherever Linux runs Node). */
const TICKS_A_SECOND = 100;

/** How many tokens one wake-up can carry; more come with the next turn of the loop. */
const READY_CAPACITY = 1024;

/** A memcg of either version. */
export abstract class RealMemcg implements Memcg {
  readonly path: string;
  readonly inode: number;
  readonly owner: number;
  readonly directory: Directory;
  abstract readonly parks: boolean;
  closed = false;
  protected readonly epoch: Epoch;
  readonly #files = new Map<string, ControlFile>();

  constructor(directory: Directory, path: string, epoch: Epoch) {
    this.directory = directory;
    this.path = path;
    this.epoch = epoch;
    this.inode = directory.inode;
    this.owner = directory.uid;
  }

  /** A control file, opened at its first use. The drill of a watch uses each once before it is needed. */
  protected file(name: string, mode: 'read' | 'readwrite' = 'read'): ControlFile {
    let file = this.#files.get(name);
    if (file === undefined) {
      file = this.directory.openFile(name, mode);
      this.#files.set(name, file);
    }
    return file;
  }

  protected doing<T>(what: string, run: () => T): T {
    try {
      return run();
    } catch (error) {
      throw fromMemcg(error, `${what} of memcg ${this.path}`);
    }
  }

  abstract oomState(): OomState;
  abstract kills(): Kills;
  abstract usage(): number;
  abstract limit(): number;
  abstract isFull(): boolean;
  abstract setKillDisabled(disabled: boolean): void;

  isArmed(): boolean {
    return this.oomState().killDisabled;
  }

  abstract memory(): MemoryUse;
  protected abstract make(directory: Directory, path: string): RealMemcg;

  attribute(name: string): string | null {
    return this.doing(`reading the attribute ${name}`, () => this.directory.getAttribute(name));
  }

  claim(): boolean {
    return this.doing('claiming', () => this.directory.claim());
  }

  unclaim(): void {
    if (!this.closed) this.directory.unclaim();
  }

  children(): string[] {
    return this.doing('listing the children', () => this.directory.subdirectories());
  }

  child(name: string): Memcg {
    return this.doing(`opening the child ${name}`, () => {
      const path = this.path === '/' ? `/${name}` : `${this.path}/${name}`;
      return this.make(this.directory.openBeneath(name), path);
    });
  }

  pids(): number[] {
    // Opened anew each time: a kept descriptor of cgroup.procs gives a cached list.
    const text = this.doing('listing the processes', () => this.directory.readFile('cgroup.procs'));
    const pids: number[] = [];
    for (const line of text.split('\n')) if (line !== '') pids.push(Number(line));
    return pids;
  }

  kernelReserve(): ReturnType<Memcg['kernelReserve']> {
    return null;
  }

  close(): void {
    this.closed = true;
    for (const file of this.#files.values()) file.close();
    this.#files.clear();
    this.directory.close();
  }
}

/** ENOENT on a control file of an open directory means that the cgroup is gone: its files go with it. */
export function fromMemcg(error: unknown, doing: string): ReprieveError {
  const { code } = error as SystemError;
  // Closed: the registry of jobs saw it go while a victim was still followed.
  if (code === 'ENOENT' || code === 'ERR_REPRIEVE_CLOSED') {
    return new ReprieveError('ERR_REPRIEVE_VANISHED', `${doing}: the memcg was removed`, error);
  }
  return fromSystem(error, doing);
}

/** A memory hierarchy below a mount point. */
export abstract class RealHierarchy implements Hierarchy {
  abstract readonly kind: Hierarchy['kind'];
  readonly clock: Clock;
  readonly ledger: Ledger;
  /** Set once it has started. */
  guard: Guard = NO_GUARD;
  readonly point: string;
  protected readonly epoch: Epoch;
  protected readonly native: NativeBinding = native();
  protected readonly events: EventSet;
  readonly #root: Directory;
  readonly #fsType: number;
  readonly #kept = new this.native.KeptPidfds();
  readonly #ready = new Int32Array(READY_CAPACITY);
  readonly #listeners = new Map<number, (atUs: number) => void>();
  /** By token: inotify knows a directory once, however many listen to it. */
  readonly #trees = new Map<number, { inode: number; changes: Set<(change: TreeChange) => void> }>();

  /** @param fsType statfs(2) type that its directories have */
  constructor(point: string, fsType: number, ledger: Ledger = NO_LEDGER, epoch: Epoch = NO_EPOCH) {
    this.point = point;
    this.#fsType = fsType;
    this.ledger = ledger;
    this.epoch = epoch;
    // A timer that fires shows that the event loop turns.
    this.clock = {
      nowUs: realClock.nowUs,
      after: (ms, run) =>
        realClock.after(ms, () => {
          epoch.beat();
          run();
        }),
    };
    try {
      this.#root = new this.native.Directory(point);
    } catch (error) {
      throw fromSystem(error, `opening the memory hierarchy at ${point}`);
    }
    this.events = new this.native.EventSet(this.#ready, (count, atUs) => this.#dispatch(count, atUs));
    this.events.unref();
  }

  protected abstract make(directory: Directory, path: string): RealMemcg;
  protected abstract listenMemcg(memcg: Memcg, signal: (atUs: number) => void): OomListener;
  protected abstract listenMemcgNear(memcg: Memcg, near: () => void): Listener;
  abstract listWaiters(memcg: Memcg, most: number): Waiter[];

  open(path: string): Memcg {
    let directory: Directory;
    try {
      directory = path === '/' ? new this.native.Directory(this.point) : this.#root.openBeneath(path.slice(1));
    } catch (error) {
      const { code } = error as SystemError;
      if (code === 'ENOENT' || code === 'ENOTDIR' || code === 'ELOOP' || code === 'EXDEV') {
        throw new ReprieveError('ERR_REPRIEVE_NOT_A_MEMCG', `There is no memcg ${path} below ${this.point}`, error);
      }
      throw fromSystem(error, `opening memcg ${path}`);
    }
    if (directory.fsType !== this.#fsType) {
      directory.close();
      throw new ReprieveError(
        'ERR_REPRIEVE_NOT_A_MEMCG',
        `${this.point}${path} is not in a cgroup ${this.kind} file system`,
      );
    }
    return this.make(directory, path);
  }

  /** @throws ReprieveError ERR_REPRIEVE_SYSTEM */
  openMachine(marks: Marks): Memcg {
    try {
      return new Machine(this.clock, marks);
    } catch (error) {
      throw fromSystem(error, 'opening /proc');
    }
  }

  listenOom(memcg: Memcg, signal: (atUs: number) => void): OomListener {
    return memcg instanceof Machine ? memcg.listen(signal) : this.listenMemcg(memcg, signal);
  }

  listenNear(memcg: Memcg, near: () => void): Listener {
    return memcg instanceof Machine ? memcg.listenNear(near) : this.listenMemcgNear(memcg, near);
  }

  prepareHold(_memcg: Memcg, _reserve: number): void {}

  openProcess(pid: number): Process | null {
    // One that lives in what it watches is not among its own victims.
    return pid === process.pid ? null : openProcess(this.native, pid, this.epoch);
  }

  startTime(): number {
    return Math.round(uptime() * TICKS_A_SECOND);
  }

  /** A channel to the guard; `ready` is called while messages wait. */
  openChannel(ready: () => void): Channel {
    const channel = new this.native.Channel(this.events);
    const { token } = channel;
    this.#listeners.set(token, ready);
    return {
      token,
      peer: channel.peer,
      closePeer: () => channel.closePeer(),
      send: (message, descriptors) => channel.send(message, descriptors),
      receive: () => channel.receive(),
      close: () => {
        this.#listeners.delete(token);
        channel.close();
      },
    };
  }

  /** Calls `ready` when something registered under that token is. */
  protected listenToken(token: number, ready: (atUs: number) => void): OomListener {
    this.#listeners.set(token, ready);
    return {
      close: () => {
        this.#listeners.delete(token);
        this.events.remove(token);
      },
      trigger: () => this.events.trigger(token),
    };
  }

  listenTree(memcg: Memcg, change: (change: TreeChange) => void): Listener {
    if (memcg instanceof Machine) return { close() {} };
    const known = [...this.#trees].find(([, { inode }]) => inode === memcg.inode);
    let [token, tree] = known ?? [0, { inode: memcg.inode, changes: new Set<(change: TreeChange) => void>() }];
    if (known === undefined) {
      try {
        token = this.events.watchDirectory((memcg as RealMemcg).directory);
      } catch (error) {
        throw fromMemcg(error, `listening to the directory of memcg ${memcg.path}`);
      }
      this.#trees.set(token, tree);
    }
    tree.changes.add(change);
    return {
      close: () => {
        if (!tree.changes.delete(change) || tree.changes.size > 0) return;
        this.#trees.delete(token);
        this.events.remove(token);
      },
    };
  }

  #dispatch(count: number, atUs: number): void {
    this.epoch.beat();
    for (let index = 0; index < count; index++) {
      const token = this.#ready[index] ?? 0;
      if (token === 0) this.drainTree();
      else this.#listeners.get(token)?.(atUs);
    }
  }

  drainTree(): void {
    for (const event of this.events.readDirectoryEvents()) {
      if (event.overflow) {
        for (const { changes } of [...this.#trees.values()]) {
          for (const change of [...changes]) change({ name: '', kind: 'overflow' });
        }
        continue;
      }
      const kind = event.created ? 'created' : event.removed ? 'removed' : 'attributes';
      for (const change of [...(this.#trees.get(event.token)?.changes ?? [])]) change({ name: event.name, kind });
    }
  }

  startKilling(exited: () => void, dry = false): Killing {
    const words = this.epoch instanceof SharedEpoch ? this.epoch.words : undefined;
    const killer: Killer = new this.native.Killer(this.events, dry, words, this.#kept);
    this.#listeners.set(killer.token, exited);
    return {
      round(memcgs) {
        const open = (memcgs as readonly RealMemcg[]).filter((memcg) => !memcg.closed);
        return killing(() =>
          killer.round(
            open.map(({ directory }) => directory),
            'cgroup.procs',
          ),
        );
      },
      signal: (process) => killing(() => killer.signal(pidfdOf(process))),
      get pids() {
        return killer.pids;
      },
      alive: () => killer.alive(),
      get unreachable() {
        return killer.unreachable;
      },
      needsRounds: true,
      release: () => killer.release(),
      close: () => {
        this.#listeners.delete(killer.token);
        killer.close();
      },
    };
  }

  keepProcesses(pids: readonly number[]): void {
    this.#kept.keep(Int32Array.from(pids));
  }

  keepAlive(alive: boolean): void {
    if (alive) this.events.ref();
    else this.events.unref();
  }

  close(): void {
    this.events.close();
    this.#listeners.clear();
    this.#trees.clear();
    this.#kept.close();
    this.#root.close();
  }
}

/** The descriptor that a memcg is held by. */
export function directoryOf(memcg: Memcg): Directory {
  return (memcg as RealMemcg).directory;
}

/** The descriptor that a process is held by. */
export function pidfdOf(process: Process): Pidfd {
  return (process as RealProcess).pidfd;
}

/** Whether it is still held by its descriptor. */
export function isOpen(held: Memcg | Process): boolean {
  return !(held as RealMemcg | RealProcess).closed;
}

function killing(run: () => number): number {
  try {
    return run();
  } catch (error) {
    throw fromSystem(error, 'killing');
  }
}
