/**
 * The drill: the way from event to kill, gone through before it is needed and once a second after that, so that its code
 * is compiled, its descriptors are open and its memory is at hand. Everything is real but the deed: the memcg says that
 * it is full, the processes get signal 0, no timer is set.
 */
import type { Hierarchy, Memcg } from '../cgroup/cgroup.js';
import { isVanished } from '../errors.js';
import { NO_GUARD } from '../guard/guard.js';
import { lowestPriority } from '../policy/lowest-priority.js';
import { withResolvers } from '../resolvers.js';
import type { Ground } from '../self/ground.js';
import type { Piece } from '../self/upkeep.js';
import type { ArmedMemcg } from '../source/armed.js';
import type { Watch } from '../watch.js';
import { parseLadder } from './options.js';

/** Runs in one go at first: enough for V8 to compile what is hot. */
const FIRST_RUNS = 300;
/** But no longer than this, in milliseconds. */
const FIRST_DRILL_MS = 250;
/** The event loop gets a turn after so many of them. */
const DRILL_SLICE_MS = 10;
/** Runs that come in by the event loop, as a real signal does. */
const FIRST_SIGNALS = 30;

/** A drill is not gone through again within this time for coming near to a limit, */
const WARM_US = 1_000;
/** nor more often than this in a second: a scope may live near its limit. */
const WARM_UPS = 20;

/** Where nobody may be killed there is nothing to go through. */
export const DRILL_LADDER = parseLadder({
  policy: (snapshot) => {
    const decision = lowestPriority(snapshot);
    return decision.action === 'kill' ? decision : { action: 'wait', ms: 1, because: 'this is a drill' };
  },
});

/** Nothing is prepared for a hand-over that does not come. */
export const NO_PREFERENCE = { prepareHandOver() {} };

/** The memcg as it is, but out of memory: it is read, and then not believed. */
export function fullMemcg(memcg: Memcg): Memcg {
  return {
    path: memcg.path,
    inode: memcg.inode,
    owner: memcg.owner,
    parks: memcg.parks,
    oomState: () => ({ ...memcg.oomState(), underOom: true }),
    kills: () => memcg.kills(),
    usage: () => memcg.usage(),
    limit: () => memcg.limit(),
    isFull: () => memcg.isFull() || true,
    memory: () => memcg.memory(),
    setKillDisabled: () => {},
    isArmed: () => true,
    attribute: (name) => memcg.attribute(name),
    claim: () => true,
    unclaim: () => {},
    children: () => memcg.children(),
    child: (name) => memcg.child(name),
    pids: () => memcg.pids(),
    kernelReserve: () => null,
    close: () => {},
  };
}

/** The hierarchy as it is, but nothing comes of what is done. */
export function dryHierarchy(hierarchy: Hierarchy): Hierarchy {
  return {
    kind: hierarchy.kind,
    clock: { nowUs: () => hierarchy.clock.nowUs(), after: () => () => {} },
    ledger: hierarchy.ledger,
    guard: { ...NO_GUARD, lacks: (memcg, jobs) => hierarchy.guard.lacks(memcg, jobs) },
    startTime: () => hierarchy.startTime(),
    open: (path) => hierarchy.open(path),
    openMachine: (marks) => hierarchy.openMachine(marks),
    prepareHold: () => {},
    openProcess: (pid) => hierarchy.openProcess(pid),
    listenOom: (memcg, signal) => hierarchy.listenOom(memcg, signal),
    listenNear: (memcg, near) => hierarchy.listenNear(memcg, near),
    listenTree: (memcg, change) => hierarchy.listenTree(memcg, change),
    drainTree: () => hierarchy.drainTree(),
    listWaiters: () => [],
    startKilling: (exited) => hierarchy.startKilling(exited, true),
    keepProcesses: () => {},
    keepAlive: () => {},
    close: () => {},
  };
}

/** What drills need of the handler. */
interface DrillSetup {
  ground: Pick<Ground, 'drill' | 'heap' | 'hierarchy'>;
  watches: ReadonlySet<Watch>;
  /** Where the handler can do nothing while it is full a drill only might park it. */
  isUnableIn: (path: string) => boolean;
  /** Goes the way once. */
  run: (armed: ArmedMemcg, atUs: number) => void;
  warn: (message: string) => void;
}

/** When the way is gone through: at `watch()`, each second, and when a limit comes near. */
export class Drills {
  readonly #setup: DrillSetup;
  #warmAtUs = Number.NEGATIVE_INFINITY;
  #warmUps = WARM_UPS;
  /** Runs that were signalled and are to come: what is called once they are over. */
  readonly #signalled = new Map<ArmedMemcg, () => void>();

  constructor(setup: DrillSetup) {
    this.#setup = setup;
  }

  /** True if a run was signalled there: what comes of it is not the kernel's. */
  isDue(armed: ArmedMemcg): boolean {
    return this.#signalled.has(armed);
  }

  /** The signal has come, or will not any more. */
  done(armed: ArmedMemcg): void {
    this.#signalled.get(armed)?.();
    this.#signalled.delete(armed);
  }

  /**
   * Until the way is compiled. In slices, and for a bounded time: something real may be waiting.
   * @throws ReprieveError ERR_REPRIEVE_VANISHED
   */
  async first(watch: Watch): Promise<void> {
    const { ground, isUnableIn, run } = this.#setup;
    if (!ground.drill || isUnableIn(watch.path)) return;
    this.#keepLikely();
    ground.heap.tend();
    const end = performance.now() + FIRST_DRILL_MS;
    let slice = performance.now() + DRILL_SLICE_MS;
    for (let runs = 0; runs < FIRST_RUNS && performance.now() < end; runs++) {
      const { self } = watch;
      if (self === undefined || self.memcg.oomState().underOom) return;
      run(self, ground.hierarchy.clock.nowUs());
      if (performance.now() < slice) continue;
      await new Promise(setImmediate);
      slice = performance.now() + DRILL_SLICE_MS;
    }
    for (let signal = 0; signal < FIRST_SIGNALS && watch.self !== undefined; signal++) {
      await this.#bySignal(watch.self);
    }
    ground.heap.tend();
  }

  /** Each second: what is not used for a while is no longer in the caches, and V8 drops its compiled code. */
  upkeep(): Piece[] {
    const { ground, watches, isUnableIn } = this.#setup;
    this.#warmUps = WARM_UPS;
    const tend = () => {
      // A collection where memory is short, and nobody can step out, may be the end of us.
      if (![...watches].some(({ path }) => isUnableIn(path))) ground.heap.tend();
    };
    const drill = () => {
      for (const { path, self, isCostly } of watches) {
        if (ground.drill && self !== undefined && !isUnableIn(path) && !isCostly) void this.#bySignal(self);
      }
    };
    return [tend, drill, () => this.#keepLikely()];
  }

  /** Most of the limit is used: whatever comes next finds everything in the caches. Unless it has come already. */
  warmUp(watch: Watch): void {
    const { ground, isUnableIn, run, warn } = this.#setup;
    if (!ground.drill) return;
    const now = ground.hierarchy.clock.nowUs();
    if (this.#warmUps <= 0 || now - this.#warmAtUs < WARM_US || isUnableIn(watch.path) || watch.isCostly) return;
    this.#warmAtUs = now;
    this.#warmUps--;
    // After whatever else woke us.
    setImmediate(() => {
      const { self } = watch;
      if (self === undefined) return;
      try {
        if (self.memcg.oomState().underOom) return;
        this.#keepLikely(); // a leak that is quick was not there at the last tick
        ground.heap.tend(); // and pages that a fork has shared since are to be copied now, not then
        run(self, now);
      } catch (error) {
        if (!isVanished(error)) warn(`a drill in ${watch.scope}: ${(error as Error).message}`);
      }
    });
  }

  /** A watch has ended, and with it perhaps what was to signal. */
  ended(): void {
    const left = [...this.#setup.watches].map(({ self }) => self);
    for (const armed of this.#signalled.keys()) if (!left.includes(armed)) this.done(armed);
  }

  /** One run, by a signal of our own; whatever the kernel signalled meanwhile is looked at after it. */
  #bySignal(armed: ArmedMemcg): Promise<void> {
    const { promise, resolve } = withResolvers<void>();
    this.done(armed);
    this.#signalled.set(armed, resolve);
    armed.trigger();
    return promise;
  }

  /** The descriptors of those who would die first are had before they are needed. */
  #keepLikely(): void {
    const { ground, watches, warn } = this.#setup;
    try {
      ground.hierarchy.keepProcesses([...watches].flatMap((watch) => watch.likelyVictims()));
    } catch (error) {
      warn(`holding the likely victims: ${(error as Error).message}`);
    }
  }
}
