/** What this machine offers to a handler, found by looking and by harmless tries. */
import { accessSync, closeSync, constants, existsSync, openSync, readFileSync, writeSync } from 'node:fs';
import { constants as os } from 'node:os';
import { dirname } from 'node:path';
import { findMemoryV1, findUnified, hasMemoryController, readCgroupMounts } from './cgroup/mounts.js';
import type { SystemError } from './errors.js';
import { STATE_DIRECTORY } from './guard/instance.js';
import { guardPath, native } from './native.js';
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

export interface Capabilities {
  kernel: string;
  /** The v1 memory hierarchy: where it is mounted; null without one. */
  memoryV1: { point: string; writable: boolean } | null;
  /** v2: where it is mounted, and whether it has the memory controller. */
  cgroupV2: { point: string; memory: boolean } | null;
  /** `memory.oom_control` is there and can be written: tasks can wait. */
  oomControl: boolean;
  /** `cgroup.event_control` can be written: signals can be had. */
  eventControl: boolean;
  /** The patchset's `memory.oom_reserve_in_bytes`. */
  kernelReserve: boolean;
  /** The v1 freezer hierarchy. */
  freezer: boolean;
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
  /** Of the ones that matter here. */
  held: string[];
  missing: string[];
  /** How the handler's thread is scheduled; null where no handler is open. */
  scheduling: Hardening['scheduling'] | null;
  lockedText: Hardening['lockedText'] | null;
  /** V8's young generation: its size, whether that is fixed, and that its pages are kept there; null where none is open. */
  youngGeneration: YoungGeneration | null;
  /** A memcg can be made directly below the root, for the handler to move or to step out to. */
  refuge: boolean;
  /** Where the handler lives, how it keeps clear of what it watches, and why not as asked for; null where none is open. */
  ownMemcg: Pick<OwnMemcg, 'use' | 'path' | 'refuge' | 'whyNot'> | null;
}

/** Looks at this machine. Nothing is changed; the addon must be there. */
export function probeCapabilities(): Capabilities {
  const mounts = readCgroupMounts();
  const v1 = findMemoryV1(mounts);
  const v2 = findUnified(mounts);
  const status = readFileSync('/proc/self/status', 'utf8');
  const effective = BigInt(`0x${/^CapEff:\s*([0-9a-f]+)/m.exec(status)?.[1] ?? '0'}`);
  const held = Object.entries(CAPABILITY_BITS)
    .filter(([, bit]) => (effective >> BigInt(bit)) & 1n)
    .map(([name]) => name);
  return {
    kernel: readFileSync('/proc/sys/kernel/osrelease', 'utf8').trim(),
    memoryV1: v1 ? { point: v1.point, writable: v1.writable } : null,
    cgroupV2: v2 ? { point: v2.point, memory: hasMemoryController(v2) } : null,
    oomControl: v1 !== undefined && canWrite(`${v1.point}/memory.oom_control`),
    eventControl: v1 !== undefined && canWrite(`${v1.point}/cgroup.event_control`),
    kernelReserve: v1 !== undefined && existsSync(`${v1.point}/memory.oom_reserve_in_bytes`),
    freezer: mounts.some(({ version, controllers }) => version === 1 && controllers.includes('freezer')),
    psi: probePsi(),
    pidfd: probePidfd(),
    mrelease: native().probeRelease() !== os.errno.ENOSYS,
    populate: probePopulate(),
    guard: probeGuard(),
    state: { directory: STATE_DIRECTORY, writable: canWriteBelow(STATE_DIRECTORY) },
    lockableBytes: held.includes('CAP_IPC_LOCK') ? Number.POSITIVE_INFINITY : lockLimit(),
    held,
    missing: Object.keys(CAPABILITY_BITS).filter((name) => !held.includes(name)),
    scheduling: null,
    lockedText: null,
    youngGeneration: null,
    refuge: v1?.writable === true && canWrite(v1.point),
    ownMemcg: null,
  };
}

/** By access(2), which knows a read-only mount as well. */
function canWrite(path: string): boolean {
  try {
    accessSync(path, constants.W_OK);
    return true;
  } catch {
    return false;
  }
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
