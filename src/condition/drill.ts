/**
 * The drill: the way from event to kill, gone through before it is needed, so that its code is compiled, its descriptors
 * are open and its memory has been touched. Everything is real but the deed: the memcg says that it is full, nobody is
 * signalled, no timer is set.
 */
import type { KernelPreference } from '../action/kernel-preference.js';
import type { Hierarchy, Killing, Memcg } from '../cgroup/cgroup.js';
import { lowestPriority } from '../policy/lowest-priority.js';
import { Account, ConditionReserve } from '../reserve/account.js';
import type { Jobs } from '../snapshot/jobs.js';
import { findOwner } from '../source/owner.js';
import { OomCondition } from './condition.js';
import { parseLadder } from './options.js';

/** Enough for V8 to compile what is hot; tens of milliseconds for a scope of some ten jobs. */
const RUNS = 300;

/** Runs the drill on an armed memcg. */
export function drill(
  hierarchy: Hierarchy,
  chain: readonly Memcg[],
  jobs: Jobs,
  preference: KernelPreference,
  readFaults: (out: Float64Array) => void,
): void {
  const owner = fullMemcg(chain.at(-1) as Memcg);
  const full = [...chain.slice(0, -1), owner];
  const dry = dryHierarchy(hierarchy);
  const options = parseLadder({ policy: lowestPriority });
  for (let run = 0; run < RUNS; run++) {
    if (findOwner(full) === null) throw new Error('the drill found no owner');
    const condition = new OomCondition(
      {
        hierarchy: dry,
        owner,
        armed: false,
        scopes: [],
        jobs: [jobs],
        options,
        reserve: new ConditionReserve(new Account(0), null),
        preference,
        readFaults,
        deliver: () => {},
        deathsNearby: () => false,
        ended: () => {},
        alarm: () => {},
      },
      hierarchy.clock.nowUs(),
    );
    condition.start();
    condition.release('released');
  }
}

/** The memcg as it is, but out of memory: it is read, and then not believed. */
function fullMemcg(memcg: Memcg): Memcg {
  return {
    path: memcg.path,
    inode: memcg.inode,
    owner: memcg.owner,
    oomState: () => ({ ...memcg.oomState(), underOom: true }),
    usage: () => memcg.usage(),
    limit: () => memcg.limit(),
    isFull: (slack) => memcg.isFull(slack) || true,
    memory: () => memcg.memory(),
    setKillDisabled: () => {},
    attribute: (name) => memcg.attribute(name),
    children: () => memcg.children(),
    child: (name) => memcg.child(name),
    pids: () => memcg.pids(),
    kernelReserve: () => null,
    close: () => {},
  };
}

function dryHierarchy(hierarchy: Hierarchy): Hierarchy {
  return {
    kind: hierarchy.kind,
    clock: { nowUs: () => hierarchy.clock.nowUs(), after: () => () => {} },
    open: (path) => hierarchy.open(path),
    openProcess: (pid) => hierarchy.openProcess(pid),
    listenOom: () => ({ close() {} }),
    listenTree: () => ({ close() {} }),
    drainTree: () => hierarchy.drainTree(),
    listWaiters: () => [],
    startKilling: (exited) => dryKilling(hierarchy.startKilling(exited)),
    keepAlive: () => {},
    close: () => {},
  };
}

function dryKilling(killing: Killing): Killing {
  return {
    round: () => killing.round([]) + 1,
    signal: () => 1,
    pids: [],
    alive: () => killing.alive(),
    unreachable: 0,
    release: () => [0, 0],
    close: () => killing.close(),
  };
}
