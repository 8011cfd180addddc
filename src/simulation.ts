import { release } from 'node:os';
import type { Findings } from './capabilities.js';
import type { SimulatedHierarchy } from './cgroup/simulated.js';
import { offersOf } from './offers.js';
import { ArenaAllocator } from './reserve/arena.js';
import type { Ground } from './self/ground.js';
import { NO_PACE } from './self/hardening.js';
import { NO_OWN_MEMCG } from './self/own-memcg.js';

/** Bytes of the simulated reserve: plain memory of this process. */
const RESERVE = 8 * 2 ** 20;

/** What a handler of the simulation stands on: nothing of this machine is touched. */
export function simulatedGround(hierarchy: SimulatedHierarchy): Ground {
  const found: Findings = {
    kernel: `simulated on ${release()}`,
    memoryV1: { point: 'simulated', writable: true },
    cgroupV2: null,
    memcgs: 'v1',
    v2: null,
    oomControl: true,
    eventControl: true,
    kernelReserve: false,
    freezer: null,
    psi: 'none',
    pidfd: true,
    mrelease: false,
    populate: false,
    guard: { path: null, whyNot: 'in the simulation there is none' },
    state: { directory: '', writable: false },
    lockableBytes: 0,
    held: [],
    missing: [],
    lowersScore: false,
    swap: { total: 0, zram: 0 },
    scheduling: null,
    lockedText: null,
    youngGeneration: null,
    refuge: null,
    ownMemcg: null,
  };
  return {
    hierarchy,
    capabilities: { ...found, scopes: offersOf(found) },
    reserve: { bytes: RESERVE, arena: new ArenaAllocator(new ArrayBuffer(RESERVE)) },
    own: NO_OWN_MEMCG,
    overcharge: null,
    freezing: null,
    drill: true,
    readUsage: (out) => out.fill(0),
    pace: NO_PACE,
    heap: { tend() {}, collections: () => ({ count: 0, us: 0 }) },
    guard: null,
    restoreStale: async () => [],
    restoreRest: async () => [],
    files: null,
    limits: null,
    publish: null,
    restored: [],
    leave: () => {},
  };
}
