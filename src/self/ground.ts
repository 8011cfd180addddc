import { isMainThread } from 'node:worker_threads';
import { type Capabilities, probeCapabilities } from '../capabilities.js';
import type { Hierarchy } from '../cgroup/cgroup.js';
import { findMemoryV1, readCgroupMounts } from '../cgroup/mounts.js';
import { HierarchyV1 } from '../cgroup/v1.js';
import { invalidOption, ReprieveError } from '../errors.js';
import { native } from '../native.js';
import { ArenaAllocator, openArena, wholePages } from '../reserve/arena.js';
import { bytesOf, type Size } from '../units.js';
import { harden, type Scheduling } from './hardening.js';
import { enterOwnMemcg, type OwnMemcg, ownMemcgPath } from './own-memcg.js';

/** Options of `OomHandler.open()`. */
export interface HandlerOptions {
  /** Memory for the handler to work in, locked and resident from the start; '8MiB' by default, 0 for none. */
  reserve?: Size;
  /** How the calling thread is scheduled: 'realtime' (SCHED_RR 1) where allowed, else 'nice' (-20), else as it is. */
  scheduling?: Scheduling;
  /** Lock the program text into memory; true by default. */
  lockText?: boolean;
  /** Move this process to a memcg of its own, outside of everything watched; true by default. */
  ownMemcg?: boolean;
  /** Closes the handler when aborted. */
  signal?: AbortSignal;
}

/** What a handler stands on; replaced as a whole by the simulation. */
export interface Ground {
  hierarchy: Hierarchy;
  capabilities: Capabilities;
  /** Bytes and allocator of the software reserve. */
  reserve: { bytes: number; arena: ArenaAllocator };
  /** Path of the handler's own memcg, undefined if it is none of this hierarchy. */
  ownPath: () => string | undefined;
  readFaults: (out: Float64Array) => void;
  /** Synchronous. */
  leave: () => void;
}

/** The ground of this machine. @throws ReprieveError as `OomHandler.open()` says; nothing stays changed then */
export function openGround(options: HandlerOptions): Ground {
  if (!isMainThread) {
    // It moves, raises and locks the process, and a worker can be terminated without putting anything back.
    throw new ReprieveError(
      'ERR_REPRIEVE_UNSUPPORTED',
      'Open the handler in the main thread: it acts on the whole process',
    );
  }
  const bytes = wholePages(bytesOf(options.reserve ?? '8MiB', 'the `reserve` option'));
  const scheduling = options.scheduling ?? 'realtime';
  if (!['realtime', 'nice', 'keep'].includes(scheduling)) {
    throw invalidOption('the `scheduling` option', "'realtime', 'nice' or 'keep'", scheduling);
  }
  options.signal?.throwIfAborted();
  const mount = findMemoryV1(readCgroupMounts());
  if (mount === undefined) {
    throw new ReprieveError(
      'ERR_REPRIEVE_UNSUPPORTED',
      'There is no cgroup v1 memory hierarchy here (`reprieve doctor` says what is); boot with systemd.unified_cgroup_hierarchy=0',
    );
  }
  const undo: (() => void)[] = [];
  try {
    const arena = bytes > 0 ? openArena(bytes) : null;
    undo.push(() => arena?.close());
    const own: OwnMemcg =
      options.ownMemcg === false
        ? { path: ownMemcgPath(mount), whyNot: 'not asked for (ownMemcg: false)', leave() {} }
        : enterOwnMemcg(mount);
    undo.push(() => own.leave());
    const hardening = harden(scheduling, options.lockText ?? true);
    undo.push(() => hardening.undo());
    const hierarchy = new HierarchyV1(mount.point);
    return {
      hierarchy,
      capabilities: {
        ...probeCapabilities(),
        ownMemcg: { path: own.path, whyNot: own.whyNot },
        scheduling: hardening.scheduling,
        lockedText: hardening.lockedText,
      },
      reserve: { bytes, arena: new ArenaAllocator(arena?.buffer ?? new ArrayBuffer(0)) },
      ownPath: () => ownMemcgPath(mount),
      readFaults: native().readFaults,
      leave: () => {
        for (const step of undo.splice(0).reverse()) step();
      },
    };
  } catch (error) {
    for (const step of undo.reverse()) step();
    throw error;
  }
}
