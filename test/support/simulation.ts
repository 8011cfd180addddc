import { type Misbehaviour, SimulatedHierarchy, VirtualClock } from '../../src/cgroup/simulated.js';
import { OomHandler } from '../../src/handler.js';
import { simulatedGround } from '../../src/simulation.js';

/** A simulated machine on a virtual clock, and a handler on it. */
export function simulate(misbehaviour: Misbehaviour = {}) {
  const clock = new VirtualClock();
  const hierarchy = new SimulatedHierarchy(clock, misbehaviour);
  const handler = OomHandler.over(simulatedGround(hierarchy));
  return { clock, hierarchy, handler };
}
