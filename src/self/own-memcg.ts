import type { ChildProcess } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { findGround } from '../cgroup/delegation.js';
import { type CgroupMount, cgroupPathOf } from '../cgroup/mounts.js';
import { invalidOption, type SystemError } from '../errors.js';
import type { Entry, FileLedger } from '../guard/ledger.js';
import { type ControlFile, type Directory, native } from '../native.js';

const PREFIX = 'reprieve-handler-';
/** Our memcg may be taken for a stale one by another handler that starts: so often it is tried again, 2 ms apart. */
const MOST_ATTEMPTS = 50;

/** How the handler keeps clear of what it watches: see `HandlerOptions.ownMemcg`. */
export type OwnMemcgUse = 'moved' | 'step-out' | 'stays';

/** Where this process stands in the memory hierarchy, and how it gets out of a memcg that is full. */
export interface OwnMemcg {
  readonly use: OwnMemcgUse;
  /** Path below the hierarchy's root of the memcg that it lives in; undefined if it lies outside what the mount shows. */
  readonly path: string | undefined;
  /** Path of the memcg made for it or its guard, outside of everything watched; null if there is none. */
  readonly refuge: string | null;
  /** Why it does not have what was asked for; null if it has. */
  readonly whyNot: string | null;
  /** The process has left `path` for a while. */
  readonly isOut: boolean;
  /** Somebody may have moved the process since: finds out. Not while it has stepped out, nor on the way to a kill. */
  locate(): void;
  /** Out of a memcg that is full, with one write(2). If that fails `use` is 'stays' from then on. */
  stepOut(): void;
  /** Back again. @returns why it cannot, in which case it stays outside for good; null if it could */
  stepBack(): string | null;
  /** Programs that were started outside go back too: those that have stayed outside since the call before. */
  fetchPrograms(): void;
  /** The way of `stepOut`, without the deed. */
  drill(): void;
  /** Starts a program that must not live in what is watched. */
  startOutside(start: () => ChildProcess): ChildProcess;
  /** Back for good; the last one of the process removes the refuge. Synchronous: it also runs when the process exits. */
  leave(): void;
}

/** For the simulation, whose handler lives in no memcg. */
export const NO_OWN_MEMCG: OwnMemcg = {
  use: 'stays',
  path: undefined,
  refuge: null,
  whyNot: null,
  isOut: false,
  locate() {},
  stepOut() {},
  stepBack: () => null,
  fetchPrograms() {},
  drill() {},
  startOutside: (start) => start(),
  leave() {},
};

/** @throws ReprieveError ERR_REPRIEVE_INVALID_ARGUMENT */
export function checkOwnMemcg(wanted: unknown): OwnMemcgUse {
  if (wanted === true) return 'moved';
  if (wanted === false) return 'stays';
  if (wanted === 'step-out') return wanted;
  throw invalidOption('the `ownMemcg` option', "true, false or 'step-out'", wanted);
}

function ownMemcgPath(mount: CgroupMount): string | undefined {
  return cgroupPathOf(readFileSync('/proc/self/cgroup', 'utf8'), 'memory', mount);
}

/** Joins the calling process, all its threads, to the memcg of a `cgroup.procs` (cgroup-v1/cgroups.rst, section 2.2). */
const MYSELF = '0';

/** A memcg by descriptors that are there when nothing can be opened any more. */
interface Held {
  path: string;
  directory: Directory;
  procs: ControlFile;
}

/**
 * The memcg directly below the root, where no watched memcg's limit reaches, or, for a user who has none but what was
 * delegated to him, directly below that. All handlers of a process share it, each has it written down; the process is in it
 * as long as one of them needs that.
 */
class Refuge {
  static shared: Refuge | undefined;

  readonly path: string;
  readonly inode: number;
  readonly #mount: CgroupMount;
  readonly #root: Directory;
  /** Where it is made. */
  readonly #above: Directory;
  readonly #held: Held;
  /** Takes what the drill writes. */
  readonly #nowhere: ControlFile;
  /** Where the process was before. */
  #home: Held | null = null;
  readonly #users = new Set<OwnMemcg>();
  readonly #holders = new Set<OwnMemcg>();
  readonly #guards = new Map<OwnMemcg, number>();
  /** Programs that were here at the last look. */
  #strayed = new Set<string>();

  /** @throws the system's error; nothing is left then */
  constructor(mount: CgroupMount) {
    const name = `${PREFIX}${process.pid}`;
    // Where nothing is allowed, the root says why.
    const ground = findGround(mount, ownMemcgPath(mount)) ?? '/';
    this.path = `${ground === '/' ? '' : ground}/${name}`;
    this.#mount = mount;
    this.#root = new (native().Directory)(mount.point);
    this.#above = new (native().Directory)(`${mount.point}${ground}`);
    let held: Held | undefined;
    try {
      removeStale(this.#above, name);
      held = makeHeld(this.#above, this.path, name);
      const devices = new (native().Directory)('/dev');
      this.#nowhere = devices.openFile('null', 'write');
      devices.close();
      this.locate();
    } catch (error) {
      if (held !== undefined) {
        closeHeld(held);
        this.#above.removeDirectory(name);
      }
      this.#above.close();
      this.#root.close();
      throw error;
    }
    this.#held = held;
    this.inode = held.directory.inode;
  }

  /** Where the process lives when it is not here. */
  get home(): string | undefined {
    return this.#home?.path;
  }

  locate(): void {
    if (this.#holders.size > 0) return;
    const path = ownMemcgPath(this.#mount);
    if (path === this.#home?.path) return;
    const home = path === undefined ? null : openHeld(this.#root, path, this.#mount.point);
    if (this.#home !== null) closeHeld(this.#home);
    this.#home = home;
  }

  use(user: OwnMemcg): void {
    this.#users.add(user);
  }

  /** Nothing is made here, nor opened. */
  hold(user: OwnMemcg): void {
    if (this.#holders.size === 0) this.#held.procs.write(MYSELF);
    this.#holders.add(user);
  }

  /** @throws the system's error if the memcg it came from is gone, say: then it is held on */
  release(user: OwnMemcg): void {
    if (!this.#holders.has(user)) return;
    if (this.#holders.size === 1) this.#home?.procs.write(MYSELF);
    this.#holders.delete(user);
  }

  /**
   * Moves programs back that were born here. One that was just started may be about to join a memcg by itself, and what we
   * write would come after that (each waits for an RCU grace period): so only who is here the second time.
   */
  fetch(): void {
    if (this.#holders.size > 0 || this.#home === null) return;
    const here = this.#strangers();
    for (const pid of here) if (this.#strayed.has(pid)) this.#moveHome(pid, this.#home);
    this.#strayed = new Set(here);
  }

  /** v2 lets nobody into a cgroup that has controllers for those below, the root excepted: EBUSY. */
  #moveUp(pid: string): void {
    try {
      this.#above.writeFile('cgroup.procs', pid);
    } catch (error) {
      if ((error as SystemError).code !== 'EBUSY' || this.#home === null) throw error;
      this.#moveHome(pid, this.#home);
    }
  }

  /** False if it could not be moved because of the memcg. One that has left by itself is not moved. */
  #moveHome(pid: string, home: Held): boolean {
    return !this.#isHere(pid) || attemptMove(home.procs, pid);
  }

  #isHere(pid: string): boolean {
    try {
      return cgroupPathOf(readFileSync(`/proc/${pid}/cgroup`, 'utf8'), 'memory', this.#mount) === this.path;
    } catch {
      return false; // it is gone
    }
  }

  /** The same as `hold`, up to the write. */
  drill(): void {
    if (this.#holders.size === 0) this.#nowhere.write(MYSELF);
  }

  /** Whoever is here and has no business to be. */
  #strangers(): string[] {
    const guards = new Set([...this.#guards.values()].map(String));
    return this.#listed().filter((pid) => pid !== String(process.pid) && !guards.has(pid));
  }

  #listed(): string[] {
    return this.#held.directory.readFile('cgroup.procs').split('\n').filter(Boolean);
  }

  /** The guard stays here when the process goes back. */
  keep(user: OwnMemcg, pid: number): void {
    this.#guards.set(user, pid);
    if (this.#holders.size === 0) attemptMove(this.#held.procs, String(pid));
  }

  leave(user: OwnMemcg): void {
    this.#users.delete(user);
    try {
      if (this.#users.size > 0) this.release(user);
      else this.#remove();
    } catch {
      // A memcg that stays is empty once the process has exited, and the next handler removes it.
    }
  }

  #remove(): void {
    Refuge.shared = undefined;
    const guards = new Set([...this.#guards.values()].map(String));
    try {
      for (const pid of this.#listed()) {
        // A guard may have something to do yet, and not where it may be full.
        if (!guards.has(pid) && this.#home !== null && this.#moveHome(pid, this.#home)) continue;
        if (this.#isHere(pid)) this.#moveUp(pid);
      }
      this.#above.removeDirectory(this.path.slice(this.path.lastIndexOf('/') + 1));
    } finally {
      for (const held of [this.#held, this.#home]) if (held !== null) closeHeld(held);
      this.#nowhere.close();
      this.#above.close();
      this.#root.close();
    }
  }
}

/** False if it was not to be done because of the memcg; a process that is gone needs nothing. */
function attemptMove(procs: ControlFile, pid: string): boolean {
  try {
    procs.write(pid);
    return true;
  } catch (error) {
    return (error as SystemError).code === 'ESRCH';
  }
}

/** Makes the memcg, and claims it: it may be empty, and is in use all the same. */
function makeHeld(above: Directory, path: string, name: string): Held {
  const nap = new Int32Array(new SharedArrayBuffer(4));
  for (let attempt = 1; ; attempt++) {
    let directory: Directory | undefined;
    try {
      makeDirectory(above, name);
      directory = above.openBeneath(name);
      if (directory.claim()) return { path, directory, procs: directory.openFile('cgroup.procs', 'write') };
      if (attempt === MOST_ATTEMPTS) throw new Error(`${path} is another handler's`);
    } catch (error) {
      directory?.close();
      // Removed since: another handler that starts now took it for a stale one.
      if ((error as SystemError).code !== 'ENOENT' || attempt === MOST_ATTEMPTS) throw error;
      continue;
    }
    directory.close();
    Atomics.wait(nap, 0, 0, 2);
  }
}

function makeDirectory(root: Directory, name: string): void {
  try {
    root.makeDirectory(name);
  } catch (error) {
    if ((error as SystemError).code !== 'EEXIST') throw error;
  }
}

function openHeld(root: Directory, path: string, point: string): Held {
  const directory = path === '/' ? new (native().Directory)(point) : root.openBeneath(path.slice(1));
  try {
    return { path, directory, procs: directory.openFile('cgroup.procs', 'write') };
  } catch (error) {
    directory.close();
    throw error;
  }
}

function closeHeld({ directory, procs }: Held): void {
  procs.close();
  directory.close();
}

/** Memcgs of handlers that were killed. One that still has a process refuses rmdir(2). */
function removeStale(root: Directory, mine: string): void {
  for (const name of root.subdirectories()) {
    if (!name.startsWith(PREFIX) || name === mine) continue;
    let directory: Directory | undefined;
    try {
      directory = root.openBeneath(name);
      if (directory.claim()) root.removeDirectory(name);
    } catch {
      // in use
    } finally {
      directory?.close();
    }
  }
}

class RealOwnMemcg implements OwnMemcg {
  use: OwnMemcgUse;
  whyNot: string | null;
  readonly #mount: CgroupMount;
  #refuge: Refuge | null;
  readonly #ledger: FileLedger;
  #entry: Entry | null;
  #path: string | undefined;
  #out = false;

  constructor(mount: CgroupMount, wanted: OwnMemcgUse, guarded: boolean, ledger: FileLedger) {
    this.#mount = mount;
    this.#ledger = ledger;
    this.use = wanted;
    this.whyNot = wanted === 'stays' ? 'not asked for (ownMemcg: false)' : null;
    let refuge: Refuge | null = null;
    let entry: Entry | null = null;
    try {
      // Without one for the guard, what holds this process cannot be watched.
      if (wanted !== 'stays' || guarded) {
        Refuge.shared ??= new Refuge(mount);
        refuge = Refuge.shared;
        refuge.use(this);
        entry = ledger.made(refuge, refuge.home ?? '/');
        this.#path = refuge.home;
        if (wanted === 'moved') {
          refuge.hold(this);
          this.#out = true;
        }
      }
    } catch (error) {
      refuge?.leave(this);
      entry?.clear();
      refuge = entry = null;
      this.use = 'stays';
      this.whyNot = (error as SystemError).message;
    }
    this.#refuge = refuge;
    this.#entry = entry;
    this.locate();
  }

  get path(): string | undefined {
    return this.#path;
  }

  get refuge(): string | null {
    return this.#refuge?.path ?? null;
  }

  get isOut(): boolean {
    return this.use === 'step-out' && this.#out;
  }

  locate(): void {
    if (this.use !== 'step-out' || this.#refuge === null) {
      this.#path = ownMemcgPath(this.#mount);
      return;
    }
    this.#refuge.locate();
    const { home } = this.#refuge;
    if (home === this.#path) return;
    this.#path = home;
    const before = this.#entry;
    this.#entry = this.#ledger.made(this.#refuge, home ?? '/');
    before?.clear();
  }

  stepOut(): void {
    // From outside of what the mount shows there would be no way back, nor can it be watched.
    if (this.#out || this.use !== 'step-out' || this.#path === undefined) return;
    try {
      this.#refuge?.hold(this);
      this.#out = true;
    } catch (error) {
      this.use = 'stays';
      this.whyNot = `stepping out failed: ${(error as SystemError).message}`;
    }
  }

  stepBack(): string | null {
    if (!this.#out || this.use !== 'step-out') return null;
    try {
      this.#refuge?.release(this);
      this.#out = false;
      return null;
    } catch (error) {
      this.use = 'moved';
      this.#path = this.#refuge?.path;
      this.whyNot = `it cannot go back to where it was: ${(error as SystemError).message}`;
      return this.whyNot;
    }
  }

  fetchPrograms(): void {
    if (this.use === 'step-out' && !this.#out) this.#refuge?.fetch();
  }

  drill(): void {
    if (!this.#out && this.use === 'step-out') this.#refuge?.drill();
  }

  startOutside(start: () => ChildProcess): ChildProcess {
    const wasOut = this.#out;
    // Born there: inside a memcg that is full its first page would make it wait, and us for its exec.
    this.stepOut();
    try {
      const child = start();
      if (child.pid !== undefined) this.#refuge?.keep(this, child.pid);
      return child;
    } finally {
      if (!wasOut) this.stepBack();
    }
  }

  leave(): void {
    const refuge = this.#refuge;
    this.#refuge = null;
    this.#out = false;
    refuge?.leave(this);
    this.#entry?.clear();
  }
}

/**
 * Moves this process to a memcg of its own ('moved'), or has one ready ('step-out'; for the guard alone with 'stays').
 * Never throws for want of it: `whyNot` says so.
 * @param guarded there will be a guard
 */
export function enterOwnMemcg(mount: CgroupMount, wanted: OwnMemcgUse, guarded: boolean, ledger: FileLedger): OwnMemcg {
  return new RealOwnMemcg(mount, wanted, guarded, ledger);
}
