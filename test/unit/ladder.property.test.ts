import fc from 'fast-check';
import { expect, test } from 'vitest';
import type { SimulatedMemcg, SimulatedProcess, VirtualClock } from '../../src/cgroup/simulated.js';
import { type Decision, lowestPriority, type Policy, type Report, type Watch } from '../../src/index.js';
import { leftBehind, MiB, NOTHING_LEFT, simulate } from '../support/simulation.js';

// --- What may happen ---

const mib = fc.integer({ min: 0, max: 120 }).map((quarters) => quarters / 4);
const priority = fc.constantFrom(10, 50, 90);

const policySpec = fc.record({
  kind: fc.constantFrom('honest', 'slow', 'never', 'throws', 'rejects', 'nonsense', 'any', 'wait', 'kernel'),
  ms: fc.constantFrom(1, 30, 200, 1_000),
  nth: fc.nat(9),
});
type PolicySpec = typeof policySpec extends fc.Arbitrary<infer T> ? T : never;

const processSpec = fc.record({
  mib,
  never: fc.boolean().map((flag) => flag && 'oom_score_adj -1000'),
  dyingMs: fc.constantFrom(1, 30, 600, Number.POSITIVE_INFINITY),
});

const jobSpec = fc.record({
  processes: fc.array(processSpec, { minLength: 1, maxLength: 3 }),
  scoreAdj: fc.constantFrom(0, -300, 300, 1000, -1000),
  below: fc.constantFrom('nothing', 'a memcg', 'a memcg with a limit'),
  settings: fc.record({
    priority,
    overPriority: fc.option(priority, { nil: undefined }),
    reservation: mib.map((size) => size * MiB),
    protected: fc.boolean(),
  }),
  shmem: mib,
  file: mib,
});

const moveSpec = fc.record({
  kind: fc.oneof(
    { weight: 12, arbitrary: fc.constant('grow') },
    { weight: 12, arbitrary: fc.constantFrom('shrink', 'exit', 'fork', 'new memcg', 'remove', 'raise') },
    { weight: 1, arbitrary: fc.constantFrom('close', 'abort') },
  ),
  who: fc.nat(50),
  mib,
  thenMs: fc.constantFrom(0, 1, 7, 40, 300, 1_500),
});

const scenarioSpec = fc.record({
  jobs: fc.array(jobSpec, { minLength: 1, maxLength: 8 }),
  flat: fc.array(fc.record({ process: processSpec, protected: fc.boolean() }), { maxLength: 2 }),
  spare: mib,
  /** Room in the memcg above, whose waiters somebody else has parked; null: it has no limit. */
  spareAbove: fc.option(mib),
  recursive: fc.boolean(),
  policy: fc.option(policySpec),
  /** Without a policy: there is a caller who kills. */
  caller: fc.boolean(),
  fallback: fc.array(policySpec, { maxLength: 3 }),
  deadlines: fc.record({
    respondWithin: fc.constantFrom(20, 500),
    clearWithin: fc.constantFrom(50, 500, 1_000),
    handleWithin: fc.constantFrom(300, 2_000, 5_000),
    maxVictims: fc.integer({ min: 1, max: 4 }),
  }),
  /** Each so many-th waiter that should wake is lost; 0: none. */
  loseEach: fc.nat(3),
  moves: fc.array(moveSpec, { minLength: 1, maxLength: 20 }),
});
type Scenario = typeof scenarioSpec extends fc.Arbitrary<infer T> ? T : never;

function policyOf({ kind, ms, nth }: PolicySpec, clock: VirtualClock): Policy {
  const because = 'a test';
  const policies: Record<string, Policy> = {
    honest: lowestPriority,
    slow: (snapshot) => new Promise((resolve) => clock.after(ms, () => resolve(lowestPriority(snapshot)))),
    never: () => new Promise(() => {}),
    throws: () => {
      throw new Error(because);
    },
    rejects: async () => {
      throw new Error(because);
    },
    nonsense: () => [undefined, {}, { action: 'kill', victim: 7 }, { action: 'wait', ms: -1 }][nth % 4] as unknown as Decision,
    any: ({ jobs }) => ({ action: 'kill', victim: jobs[nth % jobs.length]?.id ?? '', because }),
    wait: () => ({ action: 'wait', ms, because }),
    kernel: () => ({ action: 'kernel', because }),
  };
  return policies[kind] as Policy;
}

// --- How it goes ---

const SCOPE = '/top/jobs';
/** Time in which whatever goes on must have come to its end: one ladder after the other, until nobody is left. */
const SETTLED_MS = 60_000;

interface Death {
  atUs: number;
  pid: number;
  by: 'signal' | 'kernel';
}

async function play(scenario: Scenario) {
  const { jobs, flat, spare, spareAbove, deadlines, loseEach } = scenario;
  let wakes = 0;
  const simulation = simulate({ losesWaiter: () => loseEach > 0 && ++wakes % loseEach === 0 });
  const { clock, hierarchy, handler, alarms } = simulation;

  const people: SimulatedProcess[] = [];
  const originals = new Map<SimulatedProcess, number>();
  const protectedJobs = new Set<string>();
  const deaths: Death[] = [];
  const goneUs = new Map<number, number>();
  const broken: string[] = [];
  const episodes: { openedUs: number; report: Report }[] = [];
  const kernelKills: { atUs: number; over: SimulatedMemcg; victim: SimulatedProcess; others: SimulatedProcess[] }[] = [];

  const jobOf = (process: SimulatedProcess) => process.memcg.path.split('/')[3] ?? process.name;
  const isProtected = (process: SimulatedProcess) => protectedJobs.has(jobOf(process));
  const living = () => people.filter(({ gone }) => !gone);
  const within = (memcg: SimulatedMemcg) => living().filter((process) => [...process.memcg.above()].includes(memcg));
  const rule = (holds: boolean, text: string) => holds || broken.push(`${clock.nowUs()} µs: ${text}`);

  handler.on('report', (report) => episodes.push({ openedUs: clock.nowUs() - report.timings.endedUs, report }));

  const { kill, exit } = hierarchy;
  hierarchy.kill = (process) => {
    if (!process.dying && !process.gone) {
      deaths.push({ atUs: clock.nowUs(), pid: process.pid, by: 'signal' });
      rule(!isProtected(process), `${jobOf(process)} is protected and was killed`);
      const begun = living().some((other) => other.dying && jobOf(other) === jobOf(process));
      rule(begun || living().some(({ waiting }) => waiting), `${jobOf(process)} was killed while nobody waits`);
    }
    kill.call(hierarchy, process);
  };
  const killsSeen = new Map<SimulatedMemcg, number>();
  hierarchy.exit = (process) => {
    const over = [...process.memcg.above()].find((memcg) => memcg.kills > (killsSeen.get(memcg) ?? 0));
    if (over !== undefined) {
      killsSeen.set(over, over.kills);
      deaths.push({ atUs: clock.nowUs(), pid: process.pid, by: 'kernel' });
      const others = within(over).filter((other) => !other.dying && other.scoreAdj > -1000 && !isProtected(other));
      kernelKills.push({ atUs: clock.nowUs(), over, victim: process, others });
    }
    if (!process.gone) goneUs.set(process.pid, clock.nowUs());
    exit.call(hierarchy, process);
  };

  const spawn = (memcg: SimulatedMemcg, name: string, scoreAdj: number, dyingMs: number, size: number) => {
    const process = hierarchy.spawn(memcg, name);
    people.push(process);
    originals.set(process, scoreAdj);
    Object.assign(process, { scoreAdj, dyingMs });
    hierarchy.grow(process, size * MiB);
  };

  const top = hierarchy.make('/top');
  const scope = hierarchy.make(SCOPE);
  const rules: Record<string, object> = {};
  for (const [index, { processes, scoreAdj, below, settings, shmem, file }] of jobs.entries()) {
    const name = `job-${index}`;
    rules[name] = rules[`${name}/*`] = settings;
    if (settings.protected) protectedJobs.add(name);
    const memcg = hierarchy.make(`${SCOPE}/${name}`);
    const nested = below === 'nothing' ? memcg : hierarchy.make(`${SCOPE}/${name}/below`);
    for (const [nth, process] of processes.entries()) {
      spawn(nth === 0 ? memcg : nested, name, process.never ? -1000 : scoreAdj, process.dyingMs, process.mib);
    }
    Object.assign(memcg, { shmem: shmem * MiB, file: file * MiB });
    if (below === 'a memcg with a limit') hierarchy.make(nested.path, nested.usage + (1 + spare) * MiB);
  }
  for (const [index, { process, protected: isSafe }] of flat.entries()) {
    const name = `flat-${index}`;
    rules[name] = { protected: isSafe };
    if (isSafe) protectedJobs.add(name);
    spawn(scope, name, process.never ? -1000 : 0, process.dyingMs, process.mib);
  }
  hierarchy.make(SCOPE, scope.usage + (1 + spare) * MiB);
  if (spareAbove !== null) {
    hierarchy.make('/top', top.usage + spareAbove * MiB);
    top.killDisabled = true;
  }

  const abort = new AbortController();
  const watch = await handler.watch(`memcg:${SCOPE}`, {
    ...deadlines,
    ...(scenario.policy && { policy: policyOf(scenario.policy, clock) }),
    fallback: scenario.fallback.map((spec) => policyOf(spec, clock)),
    recursive: scenario.recursive,
    jobs: rules,
    signal: abort.signal,
  });
  if (scenario.policy === null && scenario.caller) void callAndKill(watch);

  for (const [index, { kind, who, mib: size, thenMs }] of scenario.moves.entries()) {
    const all = living();
    const process = all[who % all.length];
    const memcgs = scope.removed ? [] : [...scope.below()];
    const memcg = memcgs[who % memcgs.length];
    if (kind === 'close') void watch.close();
    else if (kind === 'abort') abort.abort();
    else if (kind === 'new memcg' && !scope.removed) {
      spawn(hierarchy.make(`${SCOPE}/new-${index}`), `new-${index}`, who % 4 === 0 ? -1000 : 0, 1, size);
    } else if (kind === 'raise' && memcg) hierarchy.make(memcg.path, memcg.limit + size * MiB);
    else if (kind === 'remove') {
      const empty = memcgs.filter(({ processes, children }) => processes.size + children.size === 0);
      if (empty.length > 0) hierarchy.remove(empty[who % empty.length] as SimulatedMemcg);
    } else if (process && kind === 'grow') hierarchy.grow(process, size * MiB);
    else if (process && kind === 'shrink') hierarchy.shrink(process, size * MiB);
    else if (process && kind === 'exit') hierarchy.exit(process);
    else if (process && kind === 'fork') {
      const child = hierarchy.fork(process);
      people.push(child);
      originals.set(child, originals.get(process) ?? 0);
      hierarchy.grow(child, size * MiB);
    }
    await clock.advance(thenMs);
  }
  await clock.advance(SETTLED_MS);

  // Nobody waits, unless nobody can be killed, and somebody was told.
  const armed = new Set(watch.state === 'watching' ? watch.armed : []);
  const parked = new Map<string, SimulatedProcess[]>();
  for (const { waiting } of living()) {
    if (waiting === null || !armed.has(waiting.over.path)) continue;
    const { over } = waiting;
    const killable = within(over).filter(({ dying }) => !dying);
    rule(!killable.some(({ scoreAdj }) => scoreAdj > -1000), `${over.path} waits, and the kernel could kill`);
    rule(
      alarms.some((text) => text.startsWith(`${over.path} stays parked`)),
      `${over.path} waits without an alarm`,
    );
    parked.set(
      over.path,
      killable.filter((process) => !isProtected(process)),
    );
  }

  await simulation.close();
  top.killDisabled = false;
  for (const process of living()) {
    const original = originals.get(process);
    rule(process.scoreAdj === original, `${process.pid}: oom_score_adj is ${process.scoreAdj}, was ${original}`);
  }
  return { episodes, deaths, goneUs, broken, kernelKills, parked, isProtected, left: leftBehind(simulation) };
}

/** The iterator style: kills at each condition, whatever comes of it. */
async function callAndKill(watch: Watch): Promise<void> {
  for await (const condition of watch) {
    const { victim } = lowestPriority(await condition.snapshot());
    await condition.kill(victim).catch(() => {});
  }
}

// --- What holds, whatever happens ---

function check({ deadlines }: Scenario, played: Awaited<ReturnType<typeof play>>): void {
  const { episodes, deaths, goneUs, broken, kernelKills, parked, isProtected, left } = played;
  const { clearWithin, handleWithin, maxVictims } = deadlines;
  const rule = (holds: boolean, text: string) => holds || broken.push(text);
  const endOf = ({ openedUs, report }: (typeof episodes)[number]) => openedUs + report.timings.endedUs;

  for (const episode of episodes) {
    const { openedUs, report } = episode;
    const { id, owner, outcome, victims, steps } = report;
    rule(['cleared', 'kernel', 'vanished', 'released', 'left'].includes(outcome), `${id} ends ${outcome}`);
    if (!steps.some(({ text }) => text.includes('stays parked'))) {
      // The hand-over is given clearWithin, and so is each job that dies by signal because the kernel may not kill it.
      const extra = 1 + victims.filter(({ rung }) => rung === 'kernel').length;
      const boundMs = handleWithin + extra * clearWithin;
      rule(report.timings.endedUs <= boundMs * 1000, `${id} took ${report.timings.endedUs} µs, not ${boundMs} ms`);
    }
    rule(victims.length <= maxVictims, `${id} cost ${victims.length} jobs`);
    for (const [index, { killedUs, pids, name }] of victims.entries()) {
      const next = victims[index + 1];
      if (next === undefined) continue;
      const allGoneUs = Math.max(0, ...pids.map((pid) => goneUs.get(pid) ?? Number.POSITIVE_INFINITY)) - openedUs;
      const free = Math.min(allGoneUs, killedUs + clearWithin * 1000);
      rule(next.killedUs >= free, `${id} killed ${next.name} while ${name} was on its way out`);
    }
    for (const other of episodes) {
      if (other === episode || other.report.owner !== owner) continue;
      rule(endOf(episode) <= other.openedUs || endOf(other) <= openedUs, `${owner} had two episodes at once`);
    }
    const loose = outcome === 'released' ? (parked.get(owner) ?? []) : [];
    rule(loose.length === 0 || victims.length === maxVictims, `${owner} stays parked, and a job may be killed`);
  }

  const reported = new Set(episodes.flatMap(({ report }) => report.victims.flatMap(({ pids }) => pids)));
  for (const { pid, by } of deaths) rule(by === 'kernel' || reported.has(pid), `${pid} was killed and not reported`);

  for (const { atUs, over, victim, others } of kernelKills) {
    if (!isProtected(victim)) continue;
    for (const episode of episodes) {
      const { openedUs, report } = episode;
      if (report.owner !== over.path || atUs > endOf(episode)) continue;
      const handedOverUs = report.steps
        .filter(({ text }) => text.startsWith('handed over'))
        .map((step) => openedUs + step.atUs)
        .filter((us) => us <= atUs)
        .at(-1);
      const there = others.filter(({ started }) => handedOverUs !== undefined && started <= handedOverUs);
      rule(there.length === 0, `the kernel took the protected ${victim.name}, not one of ${there.map(({ pid }) => pid)}`);
    }
  }
  expect({ broken, ...left }).toEqual({ broken: [], ...NOTHING_LEFT });
}

const runs = Number(process.env.RUNS ?? 200);
const seed = Number(process.env.SEED ?? 1);

test('the ladder keeps its word, whatever happens', { timeout: 600_000 }, async () => {
  await fc.assert(
    fc.asyncProperty(scenarioSpec, async (scenario) => check(scenario, await play(scenario))),
    { numRuns: runs, seed },
  );
});
