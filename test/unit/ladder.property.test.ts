import fc from 'fast-check';
import { expect, test } from 'vitest';
import { isAtOrBelow } from '../../src/cgroup/cgroup.js';
import type { SimulatedMemcg, SimulatedProcess, VirtualClock } from '../../src/cgroup/simulated.js';
import { type Decision, lowestPriority, type Policy, type Report, type Watch } from '../../src/index.js';
import { leftBehind, MiB, NOTHING_LEFT, simulate } from '../support/simulation.js';

// --- What may happen ---

type Drawn<A> = A extends fc.Arbitrary<infer T> ? T : never;

const mib = fc.integer({ min: 0, max: 120 }).map((quarters) => quarters / 4);
const priority = fc.constantFrom(10, 50, 90);
const seldom = fc.nat(3).map((n) => n === 3);

const policySpec = fc.record({
  kind: fc.oneof(
    { weight: 3, arbitrary: fc.constantFrom('honest', 'slow', 'any') },
    { weight: 2, arbitrary: fc.constantFrom('never', 'throws', 'rejects', 'nonsense', 'wait', 'kernel') },
  ),
  ms: fc.constantFrom(1, 30, 200, 1_000),
  nth: fc.nat(9),
});
type PolicySpec = Drawn<typeof policySpec>;

const processSpec = fc.record({
  mib,
  /** Its oom_score_adj is -1000. */
  spared: seldom,
  dyingMs: fc.constantFrom(1, 1, 30, 600, Number.POSITIVE_INFINITY),
});

const jobSpec = fc.record({
  processes: fc.array(processSpec, { minLength: 1, maxLength: 3 }),
  scoreAdj: fc.constantFrom(0, 0, -300, 300, 1000, -1000),
  below: fc.constantFrom('nothing', 'nothing', 'a memcg', 'a memcg with a limit'),
  settings: fc.record({
    priority,
    overPriority: fc.option(priority, { nil: undefined }),
    reservation: mib.map((size) => size * MiB),
    protected: seldom,
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
  flat: fc.array(fc.record({ process: processSpec, protected: seldom }), { maxLength: 2 }),
  /** The kernel may kill nobody who is there at the start. */
  allSpared: seldom,
  spare: mib.map((size) => size / 4),
  /** Room in the memcg above, whose waiters somebody else has parked; null: it has no limit. */
  spareAbove: fc.oneof({ weight: 5, arbitrary: fc.constant(null) }, { weight: 1, arbitrary: mib }),
  recursive: fc.boolean(),
  policy: fc.option(policySpec, { freq: 8 }),
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
  moves: fc.array(moveSpec, { minLength: 1, maxLength: 25 }),
});
type Scenario = Drawn<typeof scenarioSpec>;

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
    nonsense: () =>
      [undefined, {}, { action: 'kill', victim: 7 }, { action: 'wait', ms: -1 }][nth % 4] as unknown as Decision,
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
const LONGEST_LOOK_US = 50_000;

interface Death {
  atUs: number;
  pid: number;
  by: 'signal' | 'kernel';
}

async function play(scenario: Scenario) {
  const { jobs, flat, allSpared, spare, spareAbove, deadlines, loseEach } = scenario;
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
  const kernelKills: { atUs: number; over: SimulatedMemcg; victim: SimulatedProcess; others: SimulatedProcess[] }[] =
    [];

  const jobOf = (process: SimulatedProcess) => process.memcg.path.split('/')[3] ?? process.name;
  const isProtected = (process: SimulatedProcess) => protectedJobs.has(jobOf(process));
  const living = () => people.filter(({ gone }) => !gone);
  const within = (memcg: SimulatedMemcg) => living().filter((process) => [...process.memcg.above()].includes(memcg));
  const isFull = ({ limit, usage }: SimulatedMemcg) => usage + Math.min(MiB, limit / 8) >= limit;
  const rule = (holds: boolean, text: string) => holds || broken.push(`${clock.nowUs()} µs: ${text}`);

  handler.on('report', (report) => {
    const openedUs = clock.nowUs() - report.timings.endedUs;
    episodes.push({ openedUs, report });
    for (const { job, deadUs } of report.victims) {
      if (deadUs === null) continue;
      const left = living().filter((process) => isAtOrBelow(process.memcg.path, job));
      rule(!left.some(({ started }) => started < openedUs + deadUs), `${job} is dead, but not all of it`);
    }
  });

  const { kill, exit } = hierarchy;
  hierarchy.kill = (process) => {
    if (!process.dying && !process.gone) {
      deaths.push({ atUs: clock.nowUs(), pid: process.pid, by: 'signal' });
      rule(process.memcg.path.startsWith(SCOPE), `${process.name} is none of ours and was killed`);
      rule(!isProtected(process), `${jobOf(process)} is protected and was killed`);
      // Whatever the job forks while it dies goes with it, at the next look.
      const lately = clock.nowUs() - LONGEST_LOOK_US;
      const begun = people.some(
        (other) => other.dying && jobOf(other) === jobOf(process) && (goneUs.get(other.pid) ?? lately) >= lately,
      );
      const needed = living().some(({ waiting }) => waiting && isFull(waiting.over));
      rule(begun || needed, `${jobOf(process)} was killed while nobody waits, or there was room`);
    }
    kill.call(hierarchy, process);
  };
  const killsSeen = new Map<SimulatedMemcg, number>();
  hierarchy.exit = (process) => {
    const over = [...process.memcg.above()].find((memcg) => memcg.kills > (killsSeen.get(memcg) ?? 0));
    if (over !== undefined) {
      killsSeen.set(over, over.kills);
      deaths.push({ atUs: clock.nowUs(), pid: process.pid, by: 'kernel' });
      // What holds nothing may tie with a process that holds all of the limit.
      const others = within(over).filter(
        (other) => !other.dying && other.anon > 0 && other.scoreAdj > -1000 && !isProtected(other),
      );
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
    // Known (protected-score): a protected job of oom_score_adj above 0 may outrank what is raised for a hand-over.
    const adj = settings.protected ? Math.min(0, scoreAdj) : scoreAdj;
    rules[name] = rules[`${name}/*`] = settings;
    if (settings.protected) protectedJobs.add(name);
    const memcg = hierarchy.make(`${SCOPE}/${name}`);
    const nested = below === 'nothing' ? memcg : hierarchy.make(`${SCOPE}/${name}/below`);
    for (const [nth, process] of processes.entries()) {
      spawn(nth === 0 ? memcg : nested, name, process.spared || allSpared ? -1000 : adj, process.dyingMs, process.mib);
    }
    Object.assign(memcg, { shmem: shmem * MiB, file: file * MiB });
    if (below === 'a memcg with a limit') hierarchy.make(nested.path, nested.usage + (1 + spare) * MiB);
  }
  for (const [index, { process, protected: isSafe }] of flat.entries()) {
    const name = `flat-${index}`;
    rules[name] = { protected: isSafe };
    if (isSafe) protectedJobs.add(name);
    spawn(scope, name, process.spared || allSpared ? -1000 : 0, process.dyingMs, process.mib);
  }
  hierarchy.make(SCOPE, scope.usage + (1 + spare) * MiB);
  if (spareAbove !== null) {
    spawn(hierarchy.make('/top/other'), 'other', 0, 1, 1);
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
      spawn(hierarchy.make(`${SCOPE}/new-${index}`), `new-${index}`, who % 2 ? -1000 : 0, 1, size);
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
    // Known (left-above): while the memcg above is left to its owner, the scope's own condition is not taken up.
    if (episodes.some(({ report }) => report.outcome === 'left')) continue;
    const { over } = waiting;
    const killable = within(over).filter(({ dying }) => !dying);
    rule(!killable.some(({ scoreAdj }) => scoreAdj > -1000), `${over.path} waits, and the kernel could kill`);
    const told = [...over.above()].some(({ path }) => alarms.some((text) => text.startsWith(`${path} stays parked`)));
    rule(told, `${over.path} waits without an alarm`);
    parked.set(
      over.path,
      killable.filter((process) => !isProtected(process)),
    );
  }

  for (const memcg of top.below()) {
    const waits = living().some(({ waiting }) => waiting && [...memcg.above()].includes(waiting.over));
    if (armed.has(memcg.path)) rule(memcg.killDisabled || waits, `${memcg.path} was not armed again`);
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
    // Known (left-above): under_oom of the memcg above keeps the scope's condition open.
    const leftAbove = episodes.some((other) => other.report.outcome === 'left');
    if (!leftAbove && !steps.some(({ text }) => text.includes('stays parked'))) {
      // The hand-over is given clearWithin, and so is each job that dies by signal because the kernel may not kill it.
      const extra = 1 + victims.filter(({ rung }) => rung === 'kernel').length;
      const boundMs = handleWithin + extra * clearWithin;
      rule(report.timings.endedUs <= boundMs * 1000, `${id} took ${report.timings.endedUs} µs, not ${boundMs} ms`);
    }
    rule(victims.length <= maxVictims, `${id} cost ${victims.length} jobs`);
    rule(new Set(victims.map(({ job }) => job)).size === victims.length, `${id} killed a job twice`);
    for (const other of episodes) {
      if (other === episode || other.report.owner !== owner) continue;
      rule(endOf(episode) <= other.openedUs || endOf(other) <= openedUs, `${owner} had two episodes at once`);
    }
    const loose = outcome === 'released' ? (parked.get(owner) ?? []) : [];
    rule(loose.length === 0 || victims.length === maxVictims, `${owner} stays parked, and a job may be killed`);
  }

  // Nobody is killed while another victim is on its way out, also of an episode above or below.
  const victims = episodes.flatMap(({ openedUs, report }) =>
    report.victims.map((victim) => ({
      ...victim,
      owner: report.owner,
      atUs: openedUs + victim.killedUs,
      // An episode in which nobody waits is not held open for a victim beyond handleWithin.
      forgottenUs:
        report.timings.endedUs < handleWithin * 1000 ? Number.POSITIVE_INFINITY : openedUs + report.timings.endedUs,
    })),
  );
  for (const one of victims) {
    const allGoneUs = Math.max(0, ...one.pids.map((pid) => goneUs.get(pid) ?? Number.POSITIVE_INFINITY));
    const freeUs = Math.min(allGoneUs, one.atUs + clearWithin * 1000, one.forgottenUs);
    for (const other of victims) {
      // Known (impatient-hand-over): at handleWithin a second job dies by signal, whoever is on its way out.
      if (other === one || other.atUs < one.atUs || other.rung === 'kernel') continue;
      if (!isAtOrBelow(one.owner, other.owner) && !isAtOrBelow(other.owner, one.owner)) continue;
      rule(other.atUs >= freeUs, `${other.atUs} µs: ${other.job} was killed while ${one.job} was on its way out`);
    }
  }

  const reported = new Set(episodes.flatMap(({ report }) => report.victims.flatMap(({ pids }) => pids)));
  for (const { pid, by } of deaths) rule(by === 'kernel' || reported.has(pid), `${pid} was killed and not reported`);

  for (const [index, { atUs, over, victim, others }] of kernelKills.entries()) {
    if (!isProtected(victim)) continue;
    for (const episode of episodes) {
      const { openedUs, report } = episode;
      if (report.owner !== over.path || atUs > endOf(episode)) continue;
      const handOvers = report.steps
        .filter(({ text }) => text.startsWith('handed over'))
        .map((step) => openedUs + step.atUs);
      const handedOverUs = handOvers.filter((us) => us <= atUs).at(-1);
      if (handedOverUs === undefined) continue;
      const earlier = kernelKills.slice(0, index).some((kill) => kill.over === over && kill.atUs >= handedOverUs);
      if (earlier) continue; // Known (outgrown): a protected waiter that got memory outranks those of later ranks.
      const there = others.filter(({ started }) => started <= handedOverUs).map(({ pid }) => pid);
      rule(there.length === 0, `the kernel took the protected ${victim.name}, not one of ${there}`);
    }
  }
  expect({ broken, ...left }).toEqual({ broken: [], ...NOTHING_LEFT });
}

// Another seed and number of runs: RUNS=5000 SEED=7 npx vitest run test/unit/ladder.property.test.ts
const seed = Number(process.env.SEED ?? 1);
const numRuns = Number(process.env.RUNS ?? 400);

test('the ladder keeps its word, whatever happens', { timeout: 1_000 * numRuns }, () =>
  fc.assert(
    fc.asyncProperty(scenarioSpec, async (scenario) => check(scenario, await play(scenario))),
    { seed, numRuns },
  ),
);

test('the same scenario costs the same lives in the same order', { timeout: 60_000 }, () =>
  fc.assert(
    fc.asyncProperty(scenarioSpec, async (scenario) => {
      expect((await play(scenario)).deaths).toEqual((await play(scenario)).deaths);
    }),
    { seed: seed + 1, numRuns: 30 },
  ),
);

test('who dies first does not depend on the order in which jobs were made', { timeout: 60_000 }, () => {
  const rivals = fc.uniqueArray(fc.record({ priority, size: fc.integer({ min: 1, max: 30 }) }), {
    selector: ({ priority, size }) => `${priority}-${size}`,
    minLength: 2,
    maxLength: 6,
  });
  const firstToDie = async (jobs: readonly { priority: number; size: number }[]) => {
    const { clock, hierarchy, handler, job, victims, close } = simulate();
    for (const { priority, size } of jobs) job(`${SCOPE}/${priority}-${size}`, size);
    const grower = job(`${SCOPE}/grower`, 1);
    hierarchy.make(SCOPE, grower.memcg.parent?.usage);
    const rules = jobs.map(({ priority, size }) => [`${priority}-${size}`, { priority }]);
    const settings = { ...Object.fromEntries(rules), grower: { protected: true } };
    await handler.watch(`memcg:${SCOPE}`, { policy: lowestPriority, jobs: settings });
    hierarchy.grow(grower, MiB);
    await clock.advance(100);
    await close();
    return victims();
  };
  const twoOrders = rivals.chain((jobs) =>
    fc.tuple(fc.constant(jobs), fc.shuffledSubarray(jobs, { minLength: jobs.length })),
  );
  return fc.assert(
    fc.asyncProperty(twoOrders, async ([jobs, shuffled]) => {
      const [first] = [...jobs].sort((a, b) => a.priority - b.priority || b.size - a.size);
      for (const order of [jobs, shuffled]) {
        expect(await firstToDie(order)).toEqual([`${first?.priority}-${first?.size}`]);
      }
    }),
    { seed, numRuns: 30 },
  );
});
