/** What this machine offers to a handler, found by looking and by harmless tries. */
import { accessSync, closeSync, constants, existsSync, openSync, readdirSync, readFileSync, writeSync } from 'node:fs';
import { constants as os } from 'node:os';
import { dirname } from 'node:path';
import { canWrite, findGround, isDelegated } from './cgroup/delegation.js';
import { zramPart } from './cgroup/machine.js';
import { readMeminfo } from './cgroup/meminfo.js';
import {
  type CgroupMount,
  cgroupPathOf,
  findMemoryV1,
  findUnified,
  findV1,
  hasMemoryController,
  readCgroupMounts,
} from './cgroup/mounts.js';
import type { SystemError } from './errors.js';
import { STATE_DIRECTORY } from './guard/instance.js';
import { guardPath, native } from './native.js';
import { offersOf, type Scopes } from './offers.js';
import type { Hardening } from './self/hardening.js';
import type { YoungGeneration } from './self/heap.js';
import type { OwnMemcg } from './self/own-memcg.js';

/** Capabilities of capabilities(7) that matter here, with their bit. */
const CAPABILITY_BITS = {
  CAP_DAC_OVERRIDE: 1,
  CAP_KILL: 5,
  CAP_IPC_LOCK: 14,
  CAP_SYS_ADMIN: 21,
  CAP_SYS_NICE: 23,
  CAP_SYS_RESOURCE: 24,
} as const;
/** What counts for a process of a user namespace by what it holds there; the rest the kernel asks for outside of it. */
const COUNTS_INSIDE = ['CAP_DAC_OVERRIDE', 'CAP_KILL'];

/** What memcgs of v2 offer that this process may change; undefined where there is none yet to look at. */
interface V2Files {
  /** Below which cgroup memcgs can be made: '/', one that was delegated to this user, or null for none. */
  ground: string | null;
  /** `memory.high` and `memory.max` can be written: jobs can be held (`hold: true`). */
  limits?: boolean;
  /** `cgroup.kill` can be written. */
  kill?: boolean;
  /** `memory.oom.group` can be written: the kernel's killer takes a job whole. */
  oomGroup?: boolean;
}

/** What this machine offers, without what follows from it. */
export interface Findings {
  kernel: string;
  /** The v1 memory hierarchy: where it is mounted; null without one. */
  memoryV1: { point: string; writable: boolean } | null;
  /** v2: where it is mounted, and whether it has the memory controller. */
  cgroupV2: { point: string; writable: boolean; memory: boolean } | null;
  /** Whose memcgs are watched: v1's where it is mounted, else v2's; null without memory cgroups. */
  memcgs: 'v1' | 'v2' | null;
  /** Null where memcgs of v2 are not what is watched. */
  v2: V2Files | null;
  /** v1's `memory.oom_control` is there and can be written: tasks can wait. */
  oomControl: boolean;
  /** v1's `cgroup.event_control` can be written: signals can be had. */
  eventControl: boolean;
  /** The patchset's `memory.oom_reserve_in_bytes`. */
  kernelReserve: boolean;
  /** The freezer that is used, as far as it can be written: that of v1 where it is mounted, else `cgroup.freeze`. */
  freezer: 'v1' | 'v2' | null;
  /** Pressure stall information: any window, windows of a multiple of 2 s only, or none. */
  psi: 'any window' | '2 s windows' | 'none';
  /** pidfd_open(2). */
  pidfd: boolean;
  /** process_mrelease(2). */
  mrelease: boolean;
  /** Pages can be faulted in before they are needed (MADV_POPULATE_WRITE). */
  populate: boolean;
  /** The guard's program, or why there is none. */
  guard: { path: string | null; whyNot: string };
  /** Where changes are written down by default, and whether that can be done. */
  state: { directory: string; writable: boolean };
  /** Bytes that may be locked; Infinity with CAP_IPC_LOCK. */
  lockableBytes: number;
  /** Of the ones that matter here, those that count: in a user namespace most do not. */
  held: string[];
  missing: string[];
  /** `oom_score_adj` can be lowered, below what it was at the start. */
  lowersScore: boolean;
  /** All swap and the part of it that is zram, in bytes. */
  swap: { total: number; zram: number };
  /** How the handler's thread is scheduled; null where no handler is open. */
  scheduling: Hardening['scheduling'] | null;
  lockedText: Hardening['lockedText'] | null;
  /** V8's young generation: its size, whether that is fixed, and that its pages are kept there; null where none is open. */
  youngGeneration: YoungGeneration | null;
  /** Below which memcg one can be made for the handler to move or to step out to; null where it cannot. */
  refuge: string | null;
  /** Where the handler lives, how it keeps clear of what it watches, and why not as asked for; null where none is open. */
  ownMemcg: Pick<OwnMemcg, 'use' | 'path' | 'refuge' | 'whyNot'> | null;
}

export interface Capabilities extends Findings {
  /** What can be watched here, and what it lacks. */
  scopes: Scopes;
}

/** Looks at this machine. Nothing is changed; the addon must be there. */
export function probeCapabilities(): Capabilities {
  const mounts = readCgroupMounts();
  const v1 = findMemoryV1(mounts);
  const v2 = findUnified(mounts);
  const memory = v1 ?? (v2 && hasMemoryController(v2) ? v2 : undefined);
  const held = heldCapabilities();
  const { swapTotal } = readMeminfo();
  const found: Findings = {
    kernel: readFileSync('/proc/sys/kernel/osrelease', 'utf8').trim(),
    memoryV1: v1 ? { point: v1.point, writable: v1.writable } : null,
    cgroupV2: v2 ? { point: v2.point, writable: v2.writable, memory: hasMemoryController(v2) } : null,
    memcgs: memory === undefined ? null : memory === v1 ? 'v1' : 'v2',
    v2: v2 !== undefined && memory === v2 ? probeV2(v2) : null,
    oomControl: v1 !== undefined && canWrite(`${v1.point}/memory.oom_control`),
    eventControl: v1 !== undefined && canWrite(`${v1.point}/cgroup.event_control`),
    kernelReserve: v1 !== undefined && existsSync(`${v1.point}/memory.oom_reserve_in_bytes`),
    freezer: probeFreezer(findV1(mounts, 'freezer'), v2),
    psi: probePsi(),
    pidfd: probePidfd(),
    mrelease: native().probeRelease() !== os.errno.ENOSYS,
    populate: probePopulate(),
    guard: probeGuard(),
    state: { directory: STATE_DIRECTORY, writable: canWriteBelow(STATE_DIRECTORY) },
    lockableBytes: held.includes('CAP_IPC_LOCK') ? Number.POSITIVE_INFINITY : lockLimit(),
    held,
    missing: Object.keys(CAPABILITY_BITS).filter((name) => !held.includes(name)),
    lowersScore: held.includes('CAP_SYS_RESOURCE'),
    swap: { total: swapTotal, zram: Math.round(swapTotal * zramPart()) },
    scheduling: null,
    lockedText: null,
    youngGeneration: null,
    refuge: memory === undefined ? null : findGround(memory, ownPath(memory)),
    ownMemcg: null,
  };
  return { ...found, scopes: offersOf(found) };
}

function heldCapabilities(): string[] {
  const status = readFileSync('/proc/self/status', 'utf8');
  const effective = BigInt(`0x${/^CapEff:\s*([0-9a-f]+)/m.exec(status)?.[1] ?? '0'}`);
  // The first user namespace maps every number there is (user_namespaces(7)).
  const isInitial = /^\s*0\s+0\s+4294967295\s*$/.test(readFileSync('/proc/self/uid_map', 'utf8'));
  return Object.entries(CAPABILITY_BITS)
    .filter(([name, bit]) => (isInitial || COUNTS_INSIDE.includes(name)) && (effective >> BigInt(bit)) & 1n)
    .map(([name]) => name);
}

function ownPath(mount: CgroupMount): string | undefined {
  return cgroupPathOf(readFileSync('/proc/self/cgroup', 'utf8'), 'memory', mount);
}

/** Looked for in a memcg that is there: the root has none of these files. */
function probeV2(mount: CgroupMount): V2Files {
  const ground = findGroundOfUser(mount);
  const sample = findSample(mount, ground);
  if (sample === null) return { ground };
  const has = (name: string) => canWrite(`${mount.point}${sample}/${name}`);
  return {
    ground,
    limits: has('memory.high') && has('memory.max'),
    kill: has('cgroup.kill'),
    oomGroup: has('memory.oom.group'),
  };
}

/** A handler outside of what was delegated cannot move itself there, but it can watch there: systemd delegates this to each user. */
function findGroundOfUser(mount: CgroupMount): string | null {
  const uid = process.geteuid?.() ?? 0;
  const manager = `/user.slice/user-${uid}.slice/user@${uid}.service`;
  return findGround(mount, ownPath(mount)) ?? (isDelegated(mount.point, manager) ? manager : null);
}

/** A memcg of those that can be made below `ground`, or without such the own one. */
function findSample({ point, ...mount }: CgroupMount, ground: string | null): string | null {
  const own = ownPath({ point, ...mount });
  const below = ground === null ? [] : directoriesIn(`${point}${ground}`).map((name) => `${ground}/${name}`);
  const candidates = ground === null && own !== undefined ? [own] : below;
  const path = candidates
    .map((candidate) => candidate.replace(/^\/\//, '/'))
    .find((candidate) => existsSync(`${point}${candidate}/memory.events`));
  return path ?? null;
}

function directoriesIn(path: string): string[] {
  try {
    return readdirSync(path, { withFileTypes: true }).flatMap((entry) => (entry.isDirectory() ? [entry.name] : []));
  } catch {
    return []; // removed, or hidden from us
  }
}

function probeFreezer(v1: CgroupMount | undefined, v2: CgroupMount | undefined): Findings['freezer'] {
  if (v1 !== undefined) return findGround(v1, undefined) === null ? null : 'v1';
  return v2 !== undefined && findGroundOfUser(v2) !== null ? 'v2' : null;
}

/** Without CAP_SYS_RESOURCE the window of a trigger must be a multiple of 2 s (Documentation/accounting/psi.rst). */
function probePsi(): Capabilities['psi'] {
  if (tryTrigger('some 100000 500000\0')) return 'any window';
  return tryTrigger('some 100000 2000000\0') ? '2 s windows' : 'none';
}

function tryTrigger(trigger: string): boolean {
  let descriptor: number | undefined;
  try {
    descriptor = openSync('/proc/pressure/memory', 'r+');
    writeSync(descriptor, trigger);
    return true;
  } catch {
    return false; // not built in, not allowed, or not this window
  } finally {
    if (descriptor !== undefined) closeSync(descriptor);
  }
}

function probePidfd(): boolean {
  try {
    new (native().Pidfd)(process.pid).close();
    return true;
  } catch (error) {
    if ((error as SystemError).code === 'ENOSYS') return false;
    throw error;
  }
}

function probePopulate(): boolean {
  try {
    native().populate();
    return true;
  } catch (error) {
    if ((error as SystemError).code === 'EINVAL') return false;
    throw error;
  }
}

function lockLimit(): number {
  const soft = /^Max locked memory\s+(\S+)/m.exec(readFileSync('/proc/self/limits', 'utf8'))?.[1];
  return soft === 'unlimited' ? Number.POSITIVE_INFINITY : Number(soft ?? 0);
}

function probeGuard(): Capabilities['guard'] {
  try {
    const path = guardPath();
    accessSync(path, constants.X_OK);
    return { path, whyNot: '' };
  } catch (error) {
    return { path: null, whyNot: (error as Error).message };
  }
}

/** A directory that is there, or would be made. */
function canWriteBelow(directory: string): boolean {
  return canWrite(existsSync(directory) ? directory : dirname(directory));
}
