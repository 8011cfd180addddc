/**
 * What the rest of reprieve knows of cgroups: memory cgroups (memcg), their processes and their signals.
 *
 * Implementations: `v1.ts` on the real kernel, `simulated.ts` in process. Every method of a memcg throws a
 * `ReprieveError` with the code ERR_REPRIEVE_VANISHED once the cgroup was removed, and whatever changes something one with
 * ERR_REPRIEVE_REVOKED once the guard has taken over.
 */
import type { Clock } from '../clock.js';
import { isVanished } from '../errors.js';
import type { Guard } from '../guard/guard.js';
import type { Ledger } from '../guard/ledger.js';
import type { Marks } from '../source/shortage.js';

/** Memory charged to a memcg and all below it, or to one process, in bytes, by what becomes of it. */
export interface MemoryUse {
  /** Anonymous memory: dies with its processes. */
  anon: number;
  /** Swapped out anonymous memory: dies with its processes. */
  swap: number;
  /** tmpfs and shared memory: stays when the processes die, until the file is removed. */
  shmem: number;
  /** Page cache, without tmpfs: the kernel can reclaim it by itself. */
  file: number;
}

/** `memory.oom_control` (Documentation/admin-guide/cgroup-v1/memory.rst, section 10). */
export interface OomState {
  /** The kernel's OOM killer is switched off: tasks wait instead. */
  killDisabled: boolean;
  /** Tasks of this memcg, or of one above it, wait for memory. */
  underOom: boolean;
}

/** What the kernel's killer took so far. */
export interface Kills {
  /** As it counts: of a job that dies whole who was chosen counts twice (oom_kill_process() in mm/oom_kill.c). */
  counted: number;
  processes: number;
}

/** One memory cgroup, through descriptors that stay open. */
export interface Memcg {
  /** Path below the hierarchy's root, such as `/jobs/web-1`. */
  readonly path: string;
  /** Identity: a cgroup that is removed and made anew has another inode. */
  readonly inode: number;
  /** Tasks that want memory wait in the kernel until somebody acts; else it kills, and what is to wait is frozen by us. */
  readonly parks: boolean;
  oomState(): OomState;
  kills(): Kills;
  /** Bytes charged, all below included. */
  usage(): number;
  /** The limit in bytes; Infinity without one. */
  limit(): number;
  /** True if the usage is at the memory limit, or at the one of memory and swap together: see `fullSlack`. */
  isFull(): boolean;
  memory(): MemoryUse;
  setKillDisabled(disabled: boolean): void;
  /** True while what `setKillDisabled(true)` made is still so: whoever owns the cgroup may have changed it since. */
  isArmed(): boolean;
  /** An extended attribute of the cgroup's directory. */
  attribute(name: string): string | null;
  /** Claims the memcg for this handle; false while another handle, of any process, has the claim. It ends with `close`. */
  claim(): boolean;
  unclaim(): void;
  /** Owner of the cgroup's directory, a user id. */
  readonly owner: number;
  /** Names of the cgroups directly below. */
  children(): string[];
  child(name: string): Memcg;
  /** Process ids directly in this cgroup, now. */
  pids(): number[];
  /** The patchset's `memory.oom_reserve_in_bytes`, or null on a kernel without it. */
  kernelReserve(): { read(): number; write(bytes: number): void } | null;
  close(): void;
}

/** One process, by identity: its descriptors never mean another process that got the same number. */
export interface Process {
  readonly pid: number;
  /** Name of the program (`comm`), cached when it was opened. */
  readonly name: string;
  /** Start time in clock ticks since boot (proc_pid_stat(5), field 22). */
  readonly started: number;
  /** @throws ReprieveError ERR_REPRIEVE_VANISHED once the process is gone. */
  memory(): MemoryUse;
  /** `oom_score_adj`, -1000 to 1000. */
  scoreAdj(): number;
  setScoreAdj(value: number): void;
  close(): void;
}

/** The killing of one victim: every process that was signalled, until they are gone. */
export interface Killing {
  /** One round of SIGKILL over every process of these memcgs; how many were signalled now. */
  round(memcgs: readonly Memcg[]): number;
  /** SIGKILL to one process; 1, or 0 if it is gone or was signalled before. */
  signal(process: Process): number;
  readonly pids: readonly number[];
  /** How many of the signalled processes have not exited. */
  alive(): number;
  /** Processes listed in the last round that cannot be signalled. */
  readonly unreachable: number;
  /** False while it is enough to wait for those that were signalled: the kernel kills whoever is born there. */
  readonly needsRounds: boolean;
  /** process_mrelease(2) on those that have not exited: how many the kernel reaped, how many it refused. */
  release(): [reaped: number, refused: number];
  close(): void;
}

/** What happened in a directory of the hierarchy. */
export interface TreeChange {
  /** Name of the memcg below; empty when the listened memcg itself is meant. */
  name: string;
  kind: 'created' | 'removed' | 'attributes' | 'overflow';
}

/** A thread that waits for memory. */
export interface Waiter {
  pid: number;
  tid: number;
  name: string;
}

export interface Listener {
  close(): void;
}

export interface OomListener extends Listener {
  /** What it cannot tell of here, and why. */
  readonly lacks?: string | undefined;
  /** Signals, as the kernel does: for a drill. */
  trigger(): void;
}

/** One memory hierarchy and its processes. */
export interface Hierarchy {
  readonly kind: 'v1' | 'v2' | 'none' | 'simulated';
  readonly clock: Clock;
  /** Where changes are written down before they are made. */
  readonly ledger: Ledger;
  /** Who acts when the handler cannot. */
  readonly guard: Guard;
  /** The start time (see `Process.started`) of a process that is born now. */
  startTime(): number;
  /**
   * Opens a memcg by its path below the root.
   * @throws ReprieveError ERR_REPRIEVE_NOT_A_MEMCG, ERR_REPRIEVE_PERMISSION
   */
  open(path: string): Memcg;
  /** The whole machine, as a memcg. */
  openMachine(marks: Marks): Memcg;
  /**
   * Before it is armed: tasks are to be held at its limit, where the kernel does not do that by itself (v1 does).
   * @param reserve bytes between that and the kernel's killer
   */
  prepareHold(memcg: Memcg, reserve: number): void;
  /** Null if the process is gone, belongs to another pid namespace, or is the handler itself. */
  openProcess(pid: number): Process | null;
  /** Listens on `memory.oom_control`. `signal` gets the time of the wake-up, in the clock's microseconds. */
  listenOom(memcg: Memcg, signal: (atUs: number) => void): OomListener;
  /**
   * Tells that the memcg comes near to the limit that it has now, or leaves it, or that reclaim is in trouble. Only a
   * hint: it may come too late, or often.
   */
  listenNear(memcg: Memcg, near: () => void): Listener;
  /** Listens to memcgs made and removed directly below, and to changed attributes. */
  listenTree(memcg: Memcg, change: (change: TreeChange) => void): Listener;
  /** Delivers tree changes that wait to be read, now. */
  drainTree(): void;
  /** Threads directly in these memcgs that wait in the kernel for memory; at most `most`. Not for the way to a kill. */
  listWaiters(memcg: Memcg, most: number): Waiter[];
  /** Starts a killing; `exited` is called when a signalled process is gone. A dry one sends signal 0: for a drill. */
  startKilling(exited: () => void, dry?: boolean): Killing;
  /** Holds the descriptors of these processes from now on, and of no others: they may have to be killed soon. */
  keepProcesses(pids: readonly number[]): void;
  /** Whether its signals keep the process running; they do not at first. */
  keepAlive(alive: boolean): void;
  close(): void;
}

/**
 * How near to its limit a memcg counts as full: the kernel keeps up to 64 pages a CPU in its charge stock, and waiters
 * need one page each. At most an eighth of a small limit.
 */
export function fullSlack(limit: number): number {
  return Math.min(2 ** 20, limit / 8);
}

/** All memcgs below this one, opened; the caller closes them. One that is removed meanwhile is left out. */
export function openDescendants(memcg: Memcg): Memcg[] {
  const found: Memcg[] = [];
  try {
    for (const name of memcg.children()) {
      const child = openChild(memcg, name);
      if (child !== null) found.push(child, ...openDescendants(child));
    }
  } catch (error) {
    if (!isVanished(error)) {
      closeAll(found);
      throw error;
    }
  }
  return found;
}

/** The memcg of that name below; null if it was removed since it was listed. */
export function openChild(memcg: Memcg, name: string): Memcg | null {
  try {
    return memcg.child(name);
  } catch (error) {
    if (isVanished(error)) return null;
    throw error;
  }
}

export function closeAll(memcgs: readonly { close(): void }[]): void {
  for (const memcg of memcgs) memcg.close();
}

/** Names of memcgs that overcharge windows run in begin like this. */
export const WINDOW_PREFIX = 'reprieve-window-';

/** True for the memcg of an overcharge window, by its name or path: it is no job, and nobody's to watch. */
export function isWindow(path: string): boolean {
  return path.slice(path.lastIndexOf('/') + 1).startsWith(WINDOW_PREFIX);
}

/** True if `path` is `ancestor` or lies below it. */
export function isAtOrBelow(path: string, ancestor: string): boolean {
  return ancestor === '/' || path === ancestor || path.startsWith(`${ancestor}/`);
}
