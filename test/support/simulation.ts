import { expect, onTestFinished } from 'vitest';
import {
  type Misbehaviour,
  SimulatedHierarchy,
  type SimulatedMemcg,
  type SimulatedProcess,
  VirtualClock,
} from '../../src/cgroup/simulated.js';
import { OomHandler } from '../../src/handler.js';
import type { OomCondition, Policy, Report } from '../../src/index.js';
import { simulatedGround } from '../../src/simulation.js';

export const MiB = 2 ** 20;

/** A simulated machine on a virtual clock, a handler on it, and what the handler told. */
export function simulate(misbehaviour: Misbehaviour = {}) {
  const clock = new VirtualClock();
  const hierarchy = new SimulatedHierarchy(clock, misbehaviour);
  const handler = OomHandler.over(simulatedGround(hierarchy));
  const reports: Report[] = [];
  const alarms: string[] = [];
  const warnings: string[] = [];
  handler.on('report', (report) => reports.push(report));
  handler.on('alarm', (message) => alarms.push(message));
  handler.on('warning', (message) => warnings.push(message));
  return {
    clock,
    hierarchy,
    handler,
    reports,
    alarms,
    warnings,
    /** A memcg with one process of that many MiB. */
    job(path: string, mib: number, scoreAdj = 0): SimulatedProcess {
      const process = hierarchy.spawn(hierarchy.make(path), path.slice(path.lastIndexOf('/') + 1), mib * MiB);
      process.scoreAdj = scoreAdj;
      return process;
    },
    outcomes: () => reports.map(({ outcome }) => outcome),
    victims: () => reports.flatMap(({ victims }) => victims.map(({ name }) => name)),
    steps: () => reports.flatMap(({ steps }) => steps.map(({ text }) => text)),
    /** Closes the handler; a waiter is given up to a second for the kernel's killer. */
    async close(): Promise<void> {
      const closing = handler.close();
      await clock.advance(2_000);
      await closing;
    },
  };
}

export type Simulation = ReturnType<typeof simulate>;

/** What a closed handler still holds, and what is as it made it. */
export function leftBehind({ hierarchy, warnings }: Simulation) {
  return { warnings, disabled: disabledIn(hierarchy.root), held: hierarchy.held.size };
}

export const NOTHING_LEFT: ReturnType<typeof leftBehind> = { warnings: [], disabled: [], held: 0 };

/** The same as `simulate`, closed when the test is over: then nothing may be left behind. */
export function simulateTest(misbehaviour: Misbehaviour = {}): Simulation {
  const simulation = simulate(misbehaviour);
  onTestFinished(async () => {
    await simulation.close();
    expect(leftBehind(simulation)).toEqual(NOTHING_LEFT);
  });
  return simulation;
}

/** Paths of the memcgs at and below one whose kernel's killer is switched off. */
export function disabledIn(memcg: SimulatedMemcg): string[] {
  return [...memcg.below()].filter(({ killDisabled }) => killDisabled).map(({ path }) => path);
}

/** A policy that names these jobs, one at each question, and the last one from then on. */
export function killInTurn(...victims: string[]): Policy {
  let next = 0;
  return () => ({ action: 'kill', victim: victims[Math.min(next++, victims.length - 1)] ?? '', because: 'a test' });
}

/** Everything an iterating caller is handed, as it is handed. */
export function collect(conditions: AsyncIterable<OomCondition>): OomCondition[] {
  const taken: OomCondition[] = [];
  void (async () => {
    for await (const condition of conditions) taken.push(condition);
  })();
  return taken;
}

/** Resolves once everything that is due by now has run. */
export const turn = (clock: VirtualClock) => clock.advance(0);
