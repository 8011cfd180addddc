/**
 * The drill: the way from event to kill, gone through before it is needed and once a second after that, so that its code
 * is compiled, its descriptors are open and its memory is at hand. Everything is real but the deed: the memcg says that
 * it is full, the processes get signal 0, no timer is set.
 */
import type { Hierarchy, Memcg } from '../cgroup/cgroup.js';
import { NO_GUARD } from '../guard/guard.js';
import { lowestPriority } from '../policy/lowest-priority.js';
import { parseLadder } from './options.js';

/** Runs in one go at first: enough for V8 to compile what is hot. */
export const FIRST_RUNS = 300;
/** But no longer than this, in milliseconds. */
export const FIRST_DRILL_MS = 250;
/** The event loop gets a turn after so many of them. */
export const DRILL_SLICE_MS = 10;
/** Runs that come in by the event loop, as a real signal does. */
export const FIRST_SIGNALS = 30;

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
    oomState: () => ({ ...memcg.oomState(), underOom: true }),
    usage: () => memcg.usage(),
    limit: () => memcg.limit(),
    isFull: () => memcg.isFull() || true,
    memory: () => memcg.memory(),
    setKillDisabled: () => {},
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
