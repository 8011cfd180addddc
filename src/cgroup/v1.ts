/** cgroup v1's memory controller (Documentation/admin-guide/cgroup-v1/memory.rst), over the addon. */
import type { SystemError } from '../errors.js';
import type { Epoch } from '../guard/epoch.js';
import type { Ledger } from '../guard/ledger.js';
import type { ControlFile, Directory } from '../native.js';
import {
  closeAll,
  fullSlack,
  type Kills,
  type Listener,
  type Memcg,
  type MemoryUse,
  type OomListener,
  type OomState,
  openDescendants,
  type Waiter,
} from './cgroup.js';
import { listWaiters } from './process.js';
import { directoryOf, fromMemcg, RealHierarchy, RealMemcg } from './real.js';

/** statfs(2) type of a v1 cgroup file system. */
const CGROUP_SUPER_MAGIC = 0x27e0eb;
/** The kernel shows "no limit" as the largest multiple of a page in a signed 64 bit number. */
const NO_LIMIT = 2 ** 62;

/** The part of its limit at which a memcg is near to it. */
const NEAR = 0.95;

const OOM_KEYS = ['oom_kill_disable', 'under_oom', 'oom_kill'] as const;
/** Of `memory.stat`: the memcg's own, without those below. */
const STAT_KEYS = ['rss', 'swap', 'shmem', 'cache'] as const;
const oomFields = new Float64Array(OOM_KEYS.length);
const statFields = new Float64Array(STAT_KEYS.length);

class MemcgV1 extends RealMemcg {
  readonly parks = true;

  oomState(): OomState {
    this.doing('reading the OOM state', () =>
      this.file('memory.oom_control', 'readwrite').readFields(OOM_KEYS, oomFields),
    );
    const [killDisabled, underOom] = oomFields;
    return { killDisabled: killDisabled === 1, underOom: underOom === 1 };
  }

  kills(): Kills {
    this.oomState();
    const processes = oomFields[2] || 0;
    return { counted: processes, processes };
  }

  usage(): number {
    return this.doing('reading the usage', () => this.file('memory.usage_in_bytes').readNumber());
  }

  limit(): number {
    const limit = this.doing('reading the limit', () => this.file('memory.limit_in_bytes').readNumber());
    return limit >= NO_LIMIT ? Number.POSITIVE_INFINITY : limit;
  }

  isFull(): boolean {
    const limit = this.limit();
    if (this.usage() + fullSlack(limit) >= limit) return true;
    try {
      const both = this.file('memory.memsw.limit_in_bytes').readNumber();
      return both < NO_LIMIT && this.file('memory.memsw.usage_in_bytes').readNumber() + fullSlack(both) >= both;
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
    this.doing('reading the statistics', () => this.file('memory.stat').readFields(STAT_KEYS, statFields));
    const anon = statFields[0] || 0;
    const swap = statFields[1] || 0;
    const shmem = statFields[2] || 0;
    return { anon, swap, shmem, file: Math.max(0, (statFields[3] || 0) - shmem) };
  }

  setKillDisabled(disabled: boolean): void {
    this.epoch.permit();
    this.doing(`writing oom_kill_disable=${disabled ? 1 : 0}`, () =>
      this.file('memory.oom_control', 'readwrite').write(disabled ? '1' : '0'),
    );
  }

  protected make(directory: Directory, path: string): RealMemcg {
    return new MemcgV1(directory, path, this.epoch);
  }

  override kernelReserve(): ReturnType<Memcg['kernelReserve']> {
    let file: ControlFile;
    try {
      file = this.file('memory.oom_reserve_in_bytes', 'readwrite');
    } catch (error) {
      if ((error as SystemError).code === 'ENOENT') return null; // a kernel without the patchset
      throw fromMemcg(error, `opening the kernel's reserve of memcg ${this.path}`);
    }
    return {
      read: () => this.doing("reading the kernel's reserve", () => file.readNumber()),
      write: (bytes: number) => {
        this.epoch.permit();
        this.doing("setting the kernel's reserve", () => file.write(String(bytes)));
      },
    };
  }
}

/** The v1 memory hierarchy below a mount point. */
export class HierarchyV1 extends RealHierarchy {
  readonly kind = 'v1';

  constructor(point: string, ledger?: Ledger, epoch?: Epoch) {
    super(point, CGROUP_SUPER_MAGIC, ledger, epoch);
  }

  protected make(directory: Directory, path: string): RealMemcg {
    return new MemcgV1(directory, path, this.epoch);
  }

  protected listenMemcg(memcg: Memcg, signal: (atUs: number) => void): OomListener {
    return this.#listen(memcg, 'memory.oom_control', '', signal);
  }

  /** By usage thresholds (memory.rst, section 9) and by the highest pressure level (section 11). */
  protected listenMemcgNear(memcg: Memcg, near: () => void): Listener {
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
      token = this.events.addCgroupEvent(directoryOf(memcg), file, argument);
    } catch (error) {
      throw fromMemcg(error, `registering for ${file} of memcg ${memcg.path}`);
    }
    return this.listenToken(token, signal);
  }

  listWaiters(memcg: Memcg, most: number): Waiter[] {
    return listWaiters(memcg.pids(), most);
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
