/**
 * cgroup v2's memory controller (Documentation/admin-guide/cgroup-v2.rst, "Memory"), over the addon.
 *
 * There is no parking here: at `memory.max` the kernel kills at once. What a memcg of v1 says by `under_oom` is found by
 * looking: it is out of memory once what the kernel cannot reclaim reaches the limit. With `hold` the limit is where the kernel
 * throttles (`memory.high`), and its killer comes the reserve later (`memory.max`).
 */
import { fromSystem, isRevoked, isVanished, type SystemError } from '../errors.js';
import type { ControlFiles } from '../guard/control-files.js';
import type { Epoch } from '../guard/epoch.js';
import type { Ledger } from '../guard/ledger.js';
import type { Directory } from '../native.js';
import { Approach } from '../source/approach.js';
import { openPressure } from '../source/pressure.js';
import { PAGE } from '../units.js';
import type { Killing, Kills, Listener, Memcg, MemoryUse, OomListener, OomState, Waiter } from './cgroup.js';
import { closeAll, fullSlack } from './cgroup.js';
import { MeminfoFile } from './meminfo.js';
import { directoryOf, fromMemcg, RealHierarchy, RealMemcg } from './real.js';

/** statfs(2) type of a v2 cgroup file system. */
const CGROUP2_SUPER_MAGIC = 0x63677270;

/** Of `memory.stat`, all below included. */
const STAT_KEYS = ['anon', 'file', 'shmem', 'active_file', 'inactive_file', 'slab_reclaimable'] as const;
const EVENT_KEYS = ['oom_kill', 'oom_group_kill'] as const;
/** Pages that came back soon after they were dropped: what is in use does not fit. */
const THRASH_KEYS = ['workingset_activate_anon', 'workingset_activate_file'] as const;
const POPULATED = ['populated'] as const;
const statFields = new Float64Array(STAT_KEYS.length);
const eventFields = new Float64Array(EVENT_KEYS.length);
const thrashFields = new Float64Array(THRASH_KEYS.length);
const populatedFields = new Float64Array(POPULATED.length);

/** All tasks of a memcg stood still for memory for this long, in milliseconds, within a second. */
const STALL_MS = 500;
/** What full pressure says of a memcg counts for so long. */
const PRESSED_US = 1_000_000;
/** And only if so much of the limit had to be read again meanwhile: a job that streams files stalls, but reads nothing twice. */
const THRASHED = 0.05;
/** The part of its limit at which a memcg is near to it. */
const NEAR = 0.95;

/** What one job may begin to take from one moment to the next, in bytes a second. */
const FASTEST = 2 ** 30;
/** So many seconds before its limit a memcg that grows is out of memory, for us to be quicker than the kernel; */
const LEAD_S = 0.02;
/** at most this part of the limit. */
const MOST_LEAD = 0.05;

/** How often a limit that more is used than is tried again, in milliseconds. */
const LOWER_MS = 500;

const HIGH = 'memory.high';
const MAX = 'memory.max';

/** What is known of a memcg that is watched, whoever opened it. */
interface Watched {
  /** Bytes between its limit and its killer; null: limits are left alone. */
  hold: number | null;
  taken: boolean;
  /** False once the watch has ended, and only its limits are put back. */
  listens: boolean;
  /** The limit, while ours is in its place. */
  heldAt: number | null;
  /** Grows so fast that it is out of memory this many bytes before its limit. */
  lead: number;
  pressedUntilUs: number;
  thrashed: number;
}

export class MemcgV2 extends RealMemcg {
  readonly parks = false;
  readonly #hierarchy: HierarchyV2;

  constructor(directory: Directory, path: string, epoch: Epoch, hierarchy: HierarchyV2) {
    super(directory, path, epoch);
    this.#hierarchy = hierarchy;
  }

  get #watched(): Watched | undefined {
    return this.#hierarchy.watched.get(this.inode);
  }

  oomState(): OomState {
    return { killDisabled: this.#watched?.taken ?? false, underOom: this.isFull() };
  }

  kills(): Kills {
    this.doing('reading the events', () => this.file('memory.events').readFields(EVENT_KEYS, eventFields));
    const counted = eventFields[0] || 0;
    return { counted, processes: counted - (eventFields[1] || 0) };
  }

  usage(): number {
    return this.doing('reading the usage', () => this.file('memory.current').readNumber());
  }

  limit(): number {
    return this.#watched?.heldAt ?? Math.min(this.amount('memory.max'), this.amount('memory.high'));
  }

  amount(name: string): number {
    return this.doing(`reading ${name}`, () => this.file(name).readNumber());
  }

  isFull(): boolean {
    const limit = this.limit();
    if (limit === Number.POSITIVE_INFINITY) return false;
    const watched = this.#watched;
    if ((watched?.pressedUntilUs ?? 0) > this.#hierarchy.clock.nowUs()) return true;
    const least = limit - Math.max(fullSlack(limit), watched?.lead ?? 0);
    const usage = this.usage();
    if (usage < least) return false;
    return usage - this.#reclaimable() >= least;
  }

  /** What is left before it is out of memory, in bytes. What can be reclaimed is read only where the rest is nearly used. */
  left(): number {
    const limit = this.limit();
    const unused = limit - this.usage();
    return unused >= (1 - NEAR) * limit ? unused : unused + this.#reclaimable();
  }

  /** Page cache and slab, and what of the anonymous memory finds room in swap. */
  #reclaimable(): number {
    const { anon } = this.#readStat();
    const cache = (statFields[3] || 0) + (statFields[4] || 0) + (statFields[5] || 0);
    const { swapFree } = this.#hierarchy.meminfo.read();
    return swapFree === 0 ? cache : cache + Math.min(anon, swapFree, Math.max(0, this.#swapRoom()));
  }

  #swapRoom(): number {
    return this.#optional('memory.swap.max', Number.POSITIVE_INFINITY) - this.#optional('memory.swap.current', 0);
  }

  /** A file that is not there on a kernel without swap accounting. */
  #optional(name: string, otherwise: number): number {
    try {
      return this.file(name).readNumber();
    } catch (error) {
      if ((error as SystemError).code === 'ENOENT') return otherwise;
      throw fromMemcg(error, `reading ${name} of memcg ${this.path}`);
    }
  }

  #readStat(): MemoryUse {
    this.doing('reading the statistics', () => this.file('memory.stat').readFields(STAT_KEYS, statFields));
    const shmem = statFields[2] || 0;
    return { anon: statFields[0] || 0, swap: 0, shmem, file: Math.max(0, (statFields[1] || 0) - shmem) };
  }

  memory(): MemoryUse {
    const use = this.#readStat();
    use.swap = this.#optional('memory.swap.current', 0);
    return use;
  }

  /** Pages read again so far, in bytes. */
  thrashed(): number {
    this.doing('reading the statistics', () => this.file('memory.stat').readFields(THRASH_KEYS, thrashFields));
    return PAGE * ((thrashFields[0] || 0) + (thrashFields[1] || 0));
  }

  /** False once all of its processes, those below included, are gone. */
  populated(): boolean {
    this.doing('reading cgroup.events', () => this.file('cgroup.events').readFields(POPULATED, populatedFields));
    return populatedFields[0] === 1;
  }

  /** Kills whoever is in it or below, who forks meanwhile included; since Linux 5.14. False where it cannot. */
  killAll(): boolean {
    this.epoch.permit();
    try {
      this.directory.writeFile('cgroup.kill', '1');
      return true;
    } catch (error) {
      // Where it is another user's, or cannot be written at all, the rounds over its processes have to do.
      if (['ENOENT', 'EACCES', 'EROFS'].includes((error as SystemError).code ?? '')) return false;
      throw fromSystem(error, `killing memcg ${this.path}`);
    }
  }

  setKillDisabled(disabled: boolean): void {
    this.epoch.permit();
    this.doing(disabled ? 'taking charge' : 'handing over', () => this.#hierarchy.setTaken(this, disabled));
  }

  override isArmed(): boolean {
    return this.#hierarchy.stands(this);
  }

  protected make(directory: Directory, path: string): RealMemcg {
    return new MemcgV2(directory, path, this.epoch, this.#hierarchy);
  }
}

/** The v2 hierarchy below a mount point. */
export class HierarchyV2 extends RealHierarchy {
  readonly kind = 'v2';
  /** Memcgs that are watched, by inode. */
  readonly watched = new Map<number, Watched>();
  readonly meminfo = new MeminfoFile();
  readonly #files: ControlFiles;

  constructor(point: string, files: ControlFiles, ledger?: Ledger, epoch?: Epoch) {
    super(point, CGROUP2_SUPER_MAGIC, ledger, epoch);
    this.#files = files;
  }

  protected make(directory: Directory, path: string): RealMemcg {
    return new MemcgV2(directory, path, this.epoch, this);
  }

  override prepareHold(memcg: Memcg, reserve: number): void {
    this.#watchedOf(memcg).hold = reserve;
  }

  #watchedOf(memcg: Memcg): Watched {
    let watched = this.watched.get(memcg.inode);
    if (watched === undefined) {
      watched = { hold: null, taken: false, listens: true, heldAt: null, lead: 0, pressedUntilUs: 0, thrashed: 0 };
      this.watched.set(memcg.inode, watched);
    }
    return watched;
  }

  /**
   * Signals when it may be out of memory: its events, full pressure, and, where limits are left alone, a look ahead, as the
   * kernel's events of `memory.max` come when its killer does.
   */
  protected listenMemcg(memcg: Memcg, signal: (atUs: number) => void): OomListener {
    const watched = this.#watchedOf(memcg);
    const own = memcg as MemcgV2;
    const directory = directoryOf(memcg);
    const listeners: Listener[] = [];
    let refused: string | undefined;
    try {
      listeners.push(this.listenToken(this.events.watchFile(directory, 'memory.events'), signal));
      watched.thrashed = own.thrashed();
      const pressure = openPressure(directory, 'memory.pressure', 'full', STALL_MS, (atUs) => {
        if (!own.closed && this.#isThrashing(own, watched)) signal(atUs);
      });
      listeners.push(pressure);
      refused = pressure.refused;
      if (watched.hold === null) listeners.push(this.#approach(own, watched, signal));
    } catch (error) {
      closeAll(listeners);
      this.watched.delete(memcg.inode);
      throw fromMemcg(error, `listening to the events of memcg ${memcg.path}`);
    }
    return {
      lacks: refused && `it is not seen who reads the same pages again and again at the limit: ${refused}`,
      close: () => {
        closeAll(listeners);
        watched.listens = false;
        if (!watched.taken) this.watched.delete(memcg.inode); // or a later watch would find what this one wanted
      },
      trigger: () => setImmediate(() => signal(this.clock.nowUs())),
    };
  }

  #isThrashing(memcg: MemcgV2, watched: Watched): boolean {
    const before = watched.thrashed;
    try {
      watched.thrashed = memcg.thrashed();
      if (watched.thrashed - before < THRASHED * memcg.limit()) return false;
    } catch (error) {
      if (isVanished(error)) return false;
      throw error;
    }
    watched.pressedUntilUs = this.clock.nowUs() + PRESSED_US;
    return true;
  }

  #approach(memcg: MemcgV2, watched: Watched, signal: (atUs: number) => void): Listener {
    return new Approach(this.clock, {
      left: () => memcg.left(),
      fastest: FASTEST,
      lead: (rate) => Math.min(memcg.limit() * MOST_LEAD, rate * LEAD_S),
      looked: (left, lead) => {
        watched.lead = lead;
        if (left <= Math.max(fullSlack(memcg.limit()), lead)) signal(this.clock.nowUs());
      },
    });
  }

  override close(): void {
    this.meminfo.close();
    super.close();
  }

  /** v2 has no thresholds of usage: looked for. */
  protected listenMemcgNear(memcg: Memcg, near: () => void): Listener {
    let isNear = false;
    return new Approach(this.clock, {
      left: () => (memcg as MemcgV2).left(),
      fastest: FASTEST,
      lead: () => (1 - NEAR) * Math.min(memcg.limit(), Number.MAX_SAFE_INTEGER),
      looked: (left, lead) => {
        if (left <= lead && !isNear) near();
        isNear = left <= lead;
      },
    });
  }

  /** Nobody waits in the kernel: a task that is throttled is on its way back to user mode, one that is frozen is ours. */
  listWaiters(): Waiter[] {
    return [];
  }

  /** `cgroup.kill` takes who forks meanwhile; the rounds before it name who dies. */
  override startKilling(exited: () => void, dry = false): Killing {
    const killing = super.startKilling(exited, dry);
    let target: MemcgV2 | undefined;
    let isKilled = false;
    return {
      ...killing,
      round(memcgs) {
        target ??= memcgs[0] as MemcgV2 | undefined;
        const signalled = killing.round(memcgs);
        if (!dry && target !== undefined && !target.closed) isKilled = target.killAll();
        return signalled;
      },
      get needsRounds() {
        return !isKilled || killing.alive() === 0; // somebody may have been moved there since
      },
      get pids() {
        return killing.pids;
      },
      get unreachable() {
        return killing.unreachable;
      },
      alive() {
        const alive = killing.alive();
        return alive === 0 && target !== undefined && isPopulated(target) ? 1 : alive;
      },
    };
  }

  // --- Limits ---

  setTaken(memcg: MemcgV2, taken: boolean): void {
    const watched = this.#watchedOf(memcg);
    watched.taken = taken;
    if (watched.hold !== null) {
      if (taken) this.#holdOrNot(memcg, watched, watched.hold);
      else this.#letGo(memcg, watched);
    }
    if (!taken && !watched.listens) this.watched.delete(memcg.inode); // the watch has ended
  }

  /** Half of it would be a limit that nobody keeps. */
  #holdOrNot(memcg: MemcgV2, watched: Watched, reserve: number): void {
    try {
      this.#hold(memcg, watched, reserve);
    } catch (error) {
      watched.taken = false;
      this.#letGo(memcg, watched);
      throw error;
    }
  }

  /** Throttled at the limit, killed by the kernel only when the reserve is used up too. */
  #hold(memcg: MemcgV2, watched: Watched, reserve: number): void {
    const { path } = memcg;
    for (const name of [HIGH, MAX])
      if (!this.#files.stands('unified', path, name)) this.#files.forget('unified', path, name);
    watched.heldAt = null;
    const [high, max] = [memcg.amount(HIGH), memcg.amount(MAX)];
    const limit = Math.min(this.#was(path, HIGH, high), this.#was(path, MAX, max));
    if (limit === Number.POSITIVE_INFINITY) return;
    // First the killer goes up, then the brake comes down.
    if (max < limit + reserve) this.#files.change('unified', path, MAX, String(limit + reserve));
    if (high > limit) this.#files.change('unified', path, HIGH, String(limit));
    watched.heldAt = limit;
  }

  #was(path: string, name: string, now: number): number {
    const was = this.#files.was('unified', path, name);
    return was === undefined ? now : was === 'max' ? Number.POSITIVE_INFINITY : Number(was);
  }

  /** The brake is let go. What is above the old limit must not be cut off: that would kill at once, whoever it hits. */
  #letGo({ path }: MemcgV2, watched: Watched): void {
    watched.heldAt = null;
    this.#files.putBack('unified', path, HIGH);
    this.#lower(path, watched);
  }

  #lower(path: string, watched: Watched): void {
    try {
      if (!watched.taken) this.#files.putBack('unified', path, MAX);
    } catch (error) {
      if (isRevoked(error)) return; // the guard does it
      if ((error as SystemError).code !== 'EBUSY') throw error;
      this.clock.after(LOWER_MS, () => this.#lower(path, watched));
    }
  }

  /** Whether its limits are as we made them: whoever manages the cgroup may have written them anew. */
  stands(memcg: MemcgV2): boolean {
    const watched = this.watched.get(memcg.inode);
    if (watched === undefined || !watched.taken) return false;
    if (watched.hold === null) return true;
    if (watched.heldAt === null) return memcg.limit() === Number.POSITIVE_INFINITY;
    return [HIGH, MAX].every((name) => this.#files.stands('unified', memcg.path, name));
  }
}

/** False for one that is gone as well. */
function isPopulated(memcg: MemcgV2): boolean {
  try {
    return !memcg.closed && memcg.populated();
  } catch (error) {
    if (isVanished(error)) return false;
    throw error;
  }
}
