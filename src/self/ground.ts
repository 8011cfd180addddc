import { isMainThread } from 'node:worker_threads';
import { FrozenJobs } from '../action/freeze.js';
import { type Capabilities, probeCapabilities } from '../capabilities.js';
import type { Hierarchy } from '../cgroup/cgroup.js';
import { Freezer } from '../cgroup/freezer.js';
import {
  type CgroupMount,
  findMemoryV1,
  findUnified,
  findV1,
  hasMemoryController,
  readCgroupMounts,
} from '../cgroup/mounts.js';
import { NoHierarchy } from '../cgroup/none.js';
import type { RealHierarchy } from '../cgroup/real.js';
import { HierarchyV1 } from '../cgroup/v1.js';
import { HierarchyV2 } from '../cgroup/v2.js';
import type { ReadUsage } from '../condition/toll.js';
import { invalidOption, ReprieveError, type SystemError } from '../errors.js';
import { ControlFiles, type Mounts } from '../guard/control-files.js';
import { type Epoch, NO_EPOCH, SharedEpoch } from '../guard/epoch.js';
import { openInstance, restoreInstance, restoreStale, STATE_DIRECTORY } from '../guard/instance.js';
import type { FileLedger } from '../guard/ledger.js';
import { checkGuardOptions, type GuardOptions } from '../guard/options.js';
import { GuardProcess } from '../guard/process.js';
import { type HandlerStatus, publishStatus } from '../guard/status.js';
import { native } from '../native.js';
import { ArenaAllocator, openArena, wholePages } from '../reserve/arena.js';
import type { OverchargeGround } from '../reserve/overcharge.js';
import { RaisedLimits } from '../reserve/raised-limits.js';
import type { LiveJob } from '../snapshot/jobs.js';
import { bytesOf, type Size } from '../units.js';
import { harden, type Pace, type Scheduling } from './hardening.js';
import { type Heap, OwnHeap } from './heap.js';
import { checkOwnMemcg, enterOwnMemcg, NO_OWN_MEMCG, type OwnMemcg } from './own-memcg.js';

/** Options of `OomHandler.open()`. */
export interface HandlerOptions {
  /** Memory for the handler to work in, locked and resident from the start; '8MiB' by default, 0 for none. */
  reserve?: Size;
  /** How the calling thread is scheduled: 'realtime' (SCHED_RR 1) where allowed, else 'nice' (-20), else as it is. */
  scheduling?: Scheduling;
  /** Lock the program text into memory; true by default. */
  lockText?: boolean;
  /**
   * Keep the way from event to kill ready: it is gone through at `watch()` and once a second, and pages that V8 and malloc
   * have taken are kept there. True by default.
   */
  drill?: boolean;
  /**
   * Also fix V8's young generation in size, and have malloc keep more than it needs: for a process that handles and does
   * little else. A program that allocates much would be slowed several times by it. False by default.
   */
  fixedHeap?: boolean;
  /**
   * How this process keeps clear of the memcgs that it watches. `true` (the default) moves it to a memcg of its own;
   * `'step-out'` leaves it where it is, has such a memcg ready, and steps out to it while one that holds the process is
   * full; with `false` it is never moved, and what happens to a full memcg that holds it is left to the guard.
   */
  ownMemcg?: boolean | 'step-out';
  /**
   * The process that acts when this one cannot: it is killed, stopped, hangs. On by default. With `false` tasks stay parked
   * for good if the handler is killed, until another one is opened, or `reprieve restore` is run.
   */
  guard?: boolean | GuardOptions;
  /** Where changes are written down before they are made; '/run/reprieve' by default, for root. */
  stateDirectory?: string;
  /** Closes the handler when aborted. */
  signal?: AbortSignal;
}

/** What a handler stands on; replaced as a whole by the simulation. */
export interface Ground {
  hierarchy: Hierarchy;
  capabilities: Capabilities;
  /** Bytes and allocator of the software reserve. */
  reserve: { bytes: number; arena: ArenaAllocator };
  own: OwnMemcg;
  /** What overcharge windows need; null without a v1 freezer. */
  overcharge: OverchargeGround | null;
  /** Freezes jobs where the kernel makes nobody wait; null without a freezer. */
  freezing: ((jobs: () => LiveJob[]) => FrozenJobs) | null;
  readUsage: ReadUsage;
  pace: Pace;
  /** Whether the way to a kill is gone through before it is needed. */
  drill: boolean;
  heap: Heap;
  /** Null in the simulation, and with `guard: false`. */
  guard: { process: GuardProcess; epoch: SharedEpoch } | null;
  /** Control files that are changed for a while; null in the simulation. */
  files: ControlFiles | null;
  limits: RaisedLimits | null;
  /** Says how this handler is doing to whoever looks; null in the simulation. */
  publish: ((status: HandlerStatus) => void) | null;
  /** Puts back what handlers left that are gone; a line for each thing that was done. */
  restoreStale: () => Promise<string[]>;
  /** What that gave at the start. */
  restored: readonly string[];
  /** Puts this process back as it was, and lets the guard go. Synchronous. */
  leave: () => void;
  /** After `leave`, and once the guard is gone: puts back what neither has; a line for each thing. */
  restoreRest: () => Promise<string[]>;
}

/** A guard of a handler that is gone is done within its own bound; this is for one that stands at the default. */
const OTHERS_MS = 10_000;

/** The ground of this machine. @throws ReprieveError as `OomHandler.open()` says; nothing stays changed then */
export async function openGround(options: HandlerOptions): Promise<Ground> {
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
  const drill = options.drill ?? true;
  if (typeof drill !== 'boolean') throw invalidOption('the `drill` option', 'true or false', drill);
  const fixedHeap = options.fixedHeap ?? false;
  if (typeof fixedHeap !== 'boolean') throw invalidOption('the `fixedHeap` option', 'true or false', fixedHeap);
  const guardOptions = checkGuardOptions(options.guard ?? true);
  const ownUse = checkOwnMemcg(options.ownMemcg ?? true);
  const stateDirectory = options.stateDirectory ?? STATE_DIRECTORY;
  if (typeof stateDirectory !== 'string' || !stateDirectory.startsWith('/') || stateDirectory.includes('\0')) {
    throw invalidOption('the `stateDirectory` option', 'an absolute path', stateDirectory);
  }
  options.signal?.throwIfAborted();
  const mounts = readCgroupMounts();
  const memory = findMemoryV1(mounts) ?? findUnified(mounts);
  let guard: Ground['guard'] = null;
  let files: ControlFiles | null = null;
  const undo: (() => void)[] = [];
  const leave = () => {
    for (const step of undo.splice(0).reverse()) step();
  };
  try {
    const tried = new Set<string>();
    const restored = await restoreStale(stateDirectory, OTHERS_MS, tried);
    let restoring: Promise<string[]> | null = null;
    const points = mountPoints(mounts, memory);
    const shared = guardOptions === null ? null : new SharedEpoch();
    const epoch = shared ?? NO_EPOCH;
    undo.push(() => shared?.close());
    const instance = openInstance(stateDirectory, points, epoch);
    let done = false;
    undo.push(() => {
      // The guard is let go last of all: whatever is not done by then, because we are killed, it does.
      files?.putBackAll(guard !== null);
      files?.close();
      done = instance.ledger.isEmpty() && !guard?.process.isNeeded;
      guard?.process.dismiss(done);
      if (done) instance.remove();
      else instance.close();
    });
    const arena = bytes > 0 ? openArena(bytes) : null;
    undo.push(() => arena?.close());
    const own =
      memory === undefined ? NO_OWN_MEMCG : enterOwnMemcg(memory, ownUse, guardOptions !== null, instance.ledger);
    undo.push(() => own.leave());
    const hardening = harden(scheduling, options.lockText ?? true);
    undo.push(() => hardening.undo());
    const heap = new OwnHeap(drill, fixedHeap);
    undo.push(() => heap.close());
    files = new ControlFiles(instance.ledger, epoch, points);
    const hierarchy = openHierarchy(memory, files, instance.ledger, epoch);
    if (hierarchy.kind === 'v2' && own.use === 'moved' && own.path !== undefined) protect(files, own.path, bytes);
    const limits = new RaisedLimits(files, hierarchy.clock);
    const freezerMount = findV1(mounts, 'freezer') ?? findUnified(mounts);
    const freezer = freezerMount === undefined ? null : new Freezer(freezerMount, files, instance.ledger, epoch);
    const spared = () => new Set([process.pid, guard?.process.pid ?? process.pid]);
    if (guardOptions !== null && shared !== null) {
      const guardProcess = new GuardProcess(hierarchy, instance, shared, guardOptions, (start) =>
        own.startOutside(start),
      );
      try {
        await guardProcess.start();
      } catch (error) {
        hierarchy.close();
        throw error;
      }
      guard = { process: guardProcess, epoch: shared };
      hierarchy.guard = guardProcess;
    }
    const overcharge: OverchargeGround | null =
      freezer === null || !(hierarchy instanceof HierarchyV1)
        ? null
        : {
            hierarchy,
            point: hierarchy.point,
            limits,
            freezer,
            ledger: instance.ledger,
            spared,
            windows: new Set(),
            counters: { opened: 0, refused: 0, exhausted: 0 },
          };
    return {
      hierarchy,
      overcharge,
      freezing: freezer === null ? null : (jobs) => new FrozenJobs(freezer, jobs, spared()),
      capabilities: {
        ...probeCapabilities(),
        scheduling: hardening.scheduling,
        lockedText: hardening.lockedText,
        youngGeneration: heap.young,
      },
      reserve: { bytes, arena: new ArenaAllocator(arena?.buffer ?? new ArrayBuffer(0)) },
      own,
      readUsage: native().readThreadUsage,
      heap,
      pace: hardening,
      drill,
      guard,
      files,
      limits,
      publish: (status) => publishStatus(instance.path, status),
      // Without waiting for guards: what they still hold is claimed.
      restoreStale: () => {
        restoring ??= restoreStale(stateDirectory, 0, tried).finally(() => {
          restoring = null;
        });
        return restoring;
      },
      restored,
      leave,
      restoreRest: async () => (done ? [] : ((await restoreInstance(stateDirectory, instance.name)) ?? [])),
    };
  } catch (error) {
    leave();
    throw error;
  }
}

/** What this process has now, and the reserve, is not reclaimed from it, however short memory is elsewhere. */
function protect(files: ControlFiles, path: string, reserve: number): void {
  const bytes = process.memoryUsage.rss() + reserve;
  try {
    files.change('unified', path, 'memory.min', String(wholePages(bytes)));
  } catch (error) {
    // Without the controller in the root's cgroup.subtree_control: then it is reclaimed like others.
    if ((error as SystemError).code !== 'ENOENT') throw error;
  }
}

function openHierarchy(
  memory: CgroupMount | undefined,
  files: ControlFiles,
  ledger: FileLedger,
  epoch: Epoch,
): RealHierarchy {
  if (memory?.version === 1) return new HierarchyV1(memory.point, ledger, epoch);
  if (memory !== undefined && hasMemoryController(memory)) return new HierarchyV2(memory.point, files, ledger, epoch);
  return new NoHierarchy(ledger, epoch);
}

/** @param memory where cgroups of ours are made: the memory hierarchy, or that of v2 without one */
function mountPoints(mounts: readonly CgroupMount[], memory: CgroupMount | undefined): Mounts {
  const freezer = findV1(mounts, 'freezer');
  const unified = findUnified(mounts);
  return {
    ...(memory && { memory: memory.point }),
    ...(freezer && { freezer: freezer.point }),
    ...(unified && { unified: unified.point }),
  };
}
