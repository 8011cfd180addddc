/** cgroup v1's memory controller (Documentation/admin-guide/cgroup-v1/memory.rst), over the addon. */
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
import {
  closeAll,
  fullSlack,
  type Hierarchy,
  type Killing,
  type Listener,
  type Memcg,
  type MemoryUse,
  type OomListener,
  type OomState,
  openDescendants,
  type Process,
  type TreeChange,
  type Waiter,
} from './cgroup.js';
import { listWaiters, openProcess, type RealProcess } from './process.js';

/** statfs(2) type of a v1 cgroup file system. */
const CGROUP_SUPER_MAGIC = 0x27e0eb;
/** The kernel shows "no limit" as the largest multiple of a page in a signed 64 bit number. */
const NO_LIMIT = 2 ** 62;

/** Start times of processes are in these (sysconf(_SC_CLK_TCK), the same wherever Linux runs Node). */
const TICKS_A_SECOND = 100;

/** The part of its limit at which a memcg is near to it. */
const NEAR = 0.95;

/** How many tokens one wake-up can carry; more come with the next turn of the loop. */
const READY_CAPACITY = 1024;

const OOM_KEYS = ['oom_kill_disable', 'under_oom', 'oom_kill'] as const;
/** Of `memory.stat`: the memcg's own, without those below. */
const STAT_KEYS = ['rss', 'swap', 'shmem', 'cache'] as const;
const oomFields = new Float64Array(OOM_KEYS.length);
const statFields = new Float64Array(STAT_KEYS.length);

class MemcgV1 implements Memcg {
  readonly path: string;
  readonly inode: number;
  readonly owner: number;
  readonly directory: Directory;
  closed = false;
  readonly #epoch: Epoch;
  readonly #files = new Map<string, ControlFile>();

  constructor(directory: Directory, path: string, epoch: Epoch) {
    this.directory = directory;
    this.path = path;
    this.#epoch = epoch;
    this.inode = directory.inode;
    this.owner = directory.uid;
  }

  /** A control file, opened at its first use. The drill of a watch uses each once before it is needed. */
  #file(name: string, mode: 'read' | 'readwrite' = 'read'): ControlFile {
    let file = this.#files.get(name);
    if (file === undefined) {
      file = this.directory.openFile(name, mode);
      this.#files.set(name, file);
    }
    return file;
  }

  #doing<T>(what: string, run: () => T): T {
    try {
      return run();
    } catch (error) {
      throw fromMemcg(error, `${what} of memcg ${this.path}`);
    }
  }

  oomState(): OomState {
    this.#doing('reading the OOM state', () =>
      this.#file('memory.oom_control', 'readwrite').readFields(OOM_KEYS, oomFields),
    );
    const [killDisabled, underOom, kills] = oomFields;
    return { killDisabled: killDisabled === 1, underOom: underOom === 1, kills: kills || 0 };
  }

  usage(): number {
    return this.#doing('reading the usage', () => this.#file('memory.usage_in_bytes').readNumber());
  }

  limit(): number {
    const limit = this.#doing('reading the limit', () => this.#file('memory.limit_in_bytes').readNumber());
    return limit >= NO_LIMIT ? Number.POSITIVE_INFINITY : limit;
  }

  isFull(): boolean {
    const limit = this.limit();
    if (this.usage() + fullSlack(limit) >= limit) return true;
    try {
      const both = this.#file('memory.memsw.limit_in_bytes').readNumber();
      return both < NO_LIMIT && this.#file('memory.memsw.usage_in_bytes').readNumber() + fullSlack(both) >= both;
    } catch (error) {
      if ((error as SystemError).code === 'ENOENT') return false; // no swap accounting here
      throw fromMemcg(error, `reading the memsw usage of memcg ${this.path}`);
    }
  }

  /**
   * Summed up from the memcgs' own figures: the kernel's `total_*` of a memcg with children can be too low for up to two
   * seconds, when a flush of the statistics met a child that grew (seen on 6.18).
   */
  memory(): MemoryUse {
    const use = this.#ownMemory();
    const below = openDescendants(this);
    for (const memcg of below) {
      const { anon, swap, shmem, file } = (memcg as MemcgV1).#ownMemory();
      use.anon += anon;
      use.swap += swap;
      use.shmem += shmem;
      use.file += file;
    }
    closeAll(below);
    return use;
  }

  #ownMemory(): MemoryUse {
    this.#doing('reading the statistics', () => this.#file('memory.stat').readFields(STAT_KEYS, statFields));
    const anon = statFields[0] || 0;
    const swap = statFields[1] || 0;
    const shmem = statFields[2] || 0;
    return { anon, swap, shmem, file: Math.max(0, (statFields[3] || 0) - shmem) };
  }

  setKillDisabled(disabled: boolean): void {
    this.#epoch.permit();
    this.#doing(`writing oom_kill_disable=${disabled ? 1 : 0}`, () =>
      this.#file('memory.oom_control', 'readwrite').write(disabled ? '1' : '0'),
    );
  }

  attribute(name: string): string | null {
    return this.#doing(`reading the attribute ${name}`, () => this.directory.getAttribute(name));
  }

  claim(): boolean {
    return this.#doing('claiming', () => this.directory.claim());
  }

  unclaim(): void {
    if (!this.closed) this.directory.unclaim();
  }

  children(): string[] {
    return this.#doing('listing the children', () => this.directory.subdirectories());
  }

  child(name: string): Memcg {
    return this.#doing(`opening the child ${name}`, () => {
      const path = this.path === '/' ? `/${name}` : `${this.path}/${name}`;
      return new MemcgV1(this.directory.openBeneath(name), path, this.#epoch);
    });
  }

  pids(): number[] {
    // Opened anew each time: a kept descriptor of cgroup.procs gives a cached list.
    const text = this.#doing('listing the processes', () => this.directory.readFile('cgroup.procs'));
    const pids: number[] = [];
    for (const line of text.split('\n')) if (line !== '') pids.push(Number(line));
    return pids;
  }

  kernelReserve() {
    let file: ControlFile;
    try {
      file = this.#file('memory.oom_reserve_in_bytes', 'readwrite');
    } catch (error) {
      if ((error as SystemError).code === 'ENOENT') return null; // a kernel without the patchset
      throw fromMemcg(error, `opening the kernel's reserve of memcg ${this.path}`);
    }
    return {
      read: () => this.#doing("reading the kernel's reserve", () => file.readNumber()),
      write: (bytes: number) => {
        this.#epoch.permit();
        this.#doing("setting the kernel's reserve", () => file.write(String(bytes)));
      },
    };
  }

  close(): void {
    this.closed = true;
    for (const file of this.#files.values()) file.close();
    this.#files.clear();
    this.directory.close();
  }
}

/** ENOENT on a control file of an open directory means that the cgroup is gone: its files go with it. */
function fromMemcg(error: unknown, doing: string): ReprieveError {
  const { code } = error as SystemError;
  // Closed: the registry of jobs saw it go while a victim was still followed.
  if (code === 'ENOENT' || code === 'ERR_REPRIEVE_CLOSED') {
    return new ReprieveError('ERR_REPRIEVE_VANISHED', `${doing}: the memcg was removed`, error);
  }
  return fromSystem(error, doing);
}

/** The v1 memory hierarchy below a mount point. */
export class HierarchyV1 implements Hierarchy {
  readonly kind = 'v1';
  readonly clock: Clock;
  readonly ledger: Ledger;
  /** Set once it has started. */
  guard: Guard = NO_GUARD;
  readonly point: string;
  readonly #epoch: Epoch;
  readonly #native: NativeBinding = native();
  readonly #root: Directory;
  readonly #events: EventSet;
  readonly #kept = new this.#native.KeptPidfds();
  readonly #ready = new Int32Array(READY_CAPACITY);
  readonly #listeners = new Map<number, (atUs: number) => void>();
  /** By token: inotify knows a directory once, however many listen to it. */
  readonly #trees = new Map<number, { inode: number; changes: Set<(change: TreeChange) => void> }>();

  constructor(point: string, ledger: Ledger = NO_LEDGER, epoch: Epoch = NO_EPOCH) {
    this.point = point;
    this.ledger = ledger;
    this.#epoch = epoch;
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
      this.#root = new this.#native.Directory(point);
    } catch (error) {
      throw fromSystem(error, `opening the memory hierarchy at ${point}`);
    }
    this.#events = new this.#native.EventSet(this.#ready, (count, atUs) => this.#dispatch(count, atUs));
    this.#events.unref();
  }

  open(path: string): Memcg {
    let directory: Directory;
    try {
      directory = path === '/' ? new this.#native.Directory(this.point) : this.#root.openBeneath(path.slice(1));
    } catch (error) {
      const { code } = error as SystemError;
      if (code === 'ENOENT' || code === 'ENOTDIR' || code === 'ELOOP' || code === 'EXDEV') {
        throw new ReprieveError('ERR_REPRIEVE_NOT_A_MEMCG', `There is no memcg ${path} below ${this.point}`, error);
      }
      throw fromSystem(error, `opening memcg ${path}`);
    }
    if (directory.fsType !== CGROUP_SUPER_MAGIC) {
      directory.close();
      throw new ReprieveError('ERR_REPRIEVE_NOT_A_MEMCG', `${this.point}${path} is not in a cgroup v1 file system`);
    }
    return new MemcgV1(directory, path, this.#epoch);
  }

  openProcess(pid: number): Process | null {
    // One that lives in what it watches is not among its own victims.
    return pid === process.pid ? null : openProcess(this.#native, pid, this.#epoch);
  }

  startTime(): number {
    return Math.round(uptime() * TICKS_A_SECOND);
  }

  /** A channel to the guard; `ready` is called while messages wait. */
  openChannel(ready: () => void): Channel {
    const channel = new this.#native.Channel(this.#events);
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

  listenOom(memcg: Memcg, signal: (atUs: number) => void): OomListener {
    return this.#listen(memcg, 'memory.oom_control', '', signal);
  }

  /** By usage thresholds (memory.rst, section 9) and by the highest pressure level (section 11). */
  listenNear(memcg: Memcg, near: () => void): Listener {
    const limit = memcg.limit();
    const listeners: Listener[] = [this.#listen(memcg, 'memory.pressure_level', 'critical', near)];
    if (Number.isFinite(limit)) {
      for (const bytes of [limit * NEAR, limit - fullSlack(limit)]) {
        listeners.push(this.#listen(memcg, 'memory.usage_in_bytes', String(Math.round(bytes)), near));
      }
    }
    return { close: () => closeAll(listeners) };
  }

  #listen(memcg: Memcg, file: string, argument: string, signal: (atUs: number) => void): OomListener {
    let token: number;
    try {
      token = this.#events.addCgroupEvent((memcg as MemcgV1).directory, file, argument);
    } catch (error) {
      throw fromMemcg(error, `registering for ${file} of memcg ${memcg.path}`);
    }
    this.#listeners.set(token, signal);
    return { close: () => this.#forget(token), trigger: () => this.#events.trigger(token) };
  }

  listenTree(memcg: Memcg, change: (change: TreeChange) => void): Listener {
    const known = [...this.#trees].find(([, { inode }]) => inode === memcg.inode);
    let [token, tree] = known ?? [0, { inode: memcg.inode, changes: new Set<(change: TreeChange) => void>() }];
    if (known === undefined) {
      try {
        token = this.#events.watchDirectory((memcg as MemcgV1).directory);
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
        this.#events.remove(token);
      },
    };
  }

  #forget(token: number): void {
    this.#listeners.delete(token);
    this.#events.remove(token);
  }

  #dispatch(count: number, atUs: number): void {
    this.#epoch.beat();
    for (let index = 0; index < count; index++) {
      const token = this.#ready[index] ?? 0;
      if (token === 0) this.drainTree();
      else this.#listeners.get(token)?.(atUs);
    }
  }

  drainTree(): void {
    for (const event of this.#events.readDirectoryEvents()) {
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

  listWaiters(memcg: Memcg, most: number): Waiter[] {
    return listWaiters(memcg.pids(), most);
  }

  startKilling(exited: () => void, dry = false): Killing {
    const words = this.#epoch instanceof SharedEpoch ? this.#epoch.words : undefined;
    const killer: Killer = new this.#native.Killer(this.#events, dry, words, this.#kept);
    this.#listeners.set(killer.token, exited);
    return {
      round(memcgs) {
        const open = (memcgs as readonly MemcgV1[]).filter((memcg) => !memcg.closed);
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
    if (alive) this.#events.ref();
    else this.#events.unref();
  }

  close(): void {
    this.#events.close();
    this.#listeners.clear();
    this.#trees.clear();
    this.#kept.close();
    this.#root.close();
  }
}

/** Limits of a memcg, in the order in which they have to be raised: that of memory may not be above the other (EINVAL). */
const LIMITS = {
  'memory.memsw.limit_in_bytes': 'memory.memsw.usage_in_bytes',
  'memory.limit_in_bytes': 'memory.usage_in_bytes',
} as const;

export type LimitName = keyof typeof LIMITS;

/** Limits that are set, in bytes, in the order in which they have to be raised. */
export function finiteLimits(memcg: Memcg): { name: LimitName; bytes: number }[] {
  const limits: { name: LimitName; bytes: number }[] = [];
  for (const name of Object.keys(LIMITS) as LimitName[]) {
    try {
      const bytes = Number(directoryOf(memcg).readFile(name));
      if (bytes < NO_LIMIT) limits.push({ name, bytes });
    } catch (error) {
      if ((error as SystemError).code !== 'ENOENT' || name === 'memory.limit_in_bytes') {
        throw fromMemcg(error, `reading ${name} of memcg ${memcg.path}`);
      } // else no swap accounting here
    }
  }
  return limits;
}

/** Bytes in use of what a limit limits. */
export function usageOf(memcg: Memcg, limit: LimitName): number {
  return readAmount(memcg, LIMITS[limit]);
}

/** The most bytes that were ever charged to it. */
export function peakOf(memcg: Memcg): number {
  return readAmount(memcg, 'memory.max_usage_in_bytes');
}

function readAmount(memcg: Memcg, name: string): number {
  try {
    return Number(directoryOf(memcg).readFile(name));
  } catch (error) {
    throw fromMemcg(error, `reading ${name} of memcg ${memcg.path}`);
  }
}

/** Removes a memcg below another one, with all below it; false while a process is in one of them. */
export function removeBelow(parent: Memcg, memcg: Memcg): boolean {
  const below = openDescendants(memcg);
  closeAll(below);
  for (const { path } of [memcg, ...below].reverse()) {
    try {
      directoryOf(parent).removeDirectory(path.slice(parent.path.length + 1));
    } catch (error) {
      const { code } = error as SystemError;
      if (code === 'EBUSY') return false;
      if (code !== 'ENOENT') throw fromMemcg(error, `removing memcg ${path}`);
    }
  }
  return true;
}

/** The descriptor that a memcg is held by. */
export function directoryOf(memcg: Memcg): Directory {
  return (memcg as MemcgV1).directory;
}

/** The descriptor that a process is held by. */
export function pidfdOf(process: Process): Pidfd {
  return (process as RealProcess).pidfd;
}

/** Whether it is still held by its descriptor. */
export function isOpen(held: Memcg | Process): boolean {
  return !(held as MemcgV1 | RealProcess).closed;
}

function killing(run: () => number): number {
  try {
    return run();
  } catch (error) {
    throw fromSystem(error, 'killing');
  }
}
