import { describe, expect, test } from 'vitest';
import { lowestPriority, type Policy, type WatchOptions } from '../../src/index.js';
import { disabledIn, killInTurn, MiB, simulateTest } from '../support/simulation.js';

const JOBS = {
  web: { priority: 90 },
  batch: { priority: 10 },
  vital: { protected: true, priority: 0 },
} satisfies WatchOptions['jobs'];

/** /jobs of 64 MiB with web (20), batch (30), spare (4) and the protected vital (5); web then runs into the limit. */
async function fullOfJobs(options: WatchOptions, batchDyingMs = 1) {
  const simulation = simulateTest();
  const { hierarchy, handler, job } = simulation;
  hierarchy.make('/jobs', 64 * MiB);
  const web = job('/jobs/web', 20);
  const batch = job('/jobs/batch', 30);
  const spare = job('/jobs/spare', 4);
  const vital = job('/jobs/vital', 5);
  batch.dyingMs = batchDyingMs;
  await handler.watch('memcg:/jobs', { jobs: JOBS, ...options });
  hierarchy.grow(web, 9 * MiB);
  return { ...simulation, web, batch, spare, vital };
}

const never: Policy = () => new Promise(() => {});
const answerAfter =
  (ms: number, clock: { after(ms: number, run: () => void): unknown }, policy: Policy): Policy =>
  (snapshot, context) =>
    new Promise((resolve) => clock.after(ms, () => resolve(policy(snapshot, context))));

test('the lowest priority dies, the others go on', async () => {
  const { clock, web, batch, outcomes, reports } = await fullOfJobs({ policy: lowestPriority });
  await clock.advance(100);
  expect(batch.gone).toBe(true);
  expect(web).toMatchObject({ gone: false, waiting: null, anon: 29 * MiB });
  expect(outcomes()).toEqual(['cleared']);
  expect(reports[0]).toMatchObject({
    owner: '/jobs',
    scopes: ['memcg:/jobs'],
    victims: [{ name: 'batch', rung: 'policy', pids: [batch.pid], freed: 30 * MiB, left: 0 }],
    waiters: [],
    timings: { snapshotUs: 0, decidedUs: 0, killedUs: 0, deadUs: 1000, clearedUs: 1000 },
  });
});

describe('a policy that fails loses its turn to the next rung', () => {
  const wrong: [string, unknown, RegExp][] = [
    ['nothing', undefined, /no decision: undefined/],
    ['null', null, /no decision: null/],
    ['a text', 'kill batch', /no decision: "kill batch"/],
    ['an empty object', {}, /no action undefined/],
    ['an unknown action', { action: 'explode' }, /no action "explode"; expected 'kill', 'wait' or 'kernel'/],
    ['a kill without a victim', { action: 'kill' }, /no job undefined in the snapshot/],
    ['a job that is not there', { action: 'kill', victim: '/jobs/other' }, /no job "\/jobs\/other" in the snapshot/],
    ['a victim that is no text', { action: 'kill', victim: { id: 1 } }, /no job {"id":1} in the snapshot/],
    ['a protected job', { action: 'kill', victim: '/jobs/vital' }, /job vital is protected/],
    ['a wait without a time', { action: 'wait' }, /no time in milliseconds: undefined/],
    ['a wait for no time', { action: 'wait', ms: 0 }, /no time in milliseconds: 0/],
    ['a wait for ever', { action: 'wait', ms: Number.POSITIVE_INFINITY }, /no time in milliseconds/],
    ['a wait for NaN', { action: 'wait', ms: Number.NaN }, /no time in milliseconds/],
  ];
  test.each(wrong)('that returns or resolves to %s', async (_, answer, why) => {
    for (const policy of [() => answer, async () => answer] as Policy[]) {
      const { clock, batch, reports } = await fullOfJobs({ policy });
      await clock.advance(100);
      expect(batch.gone).toBe(true);
      expect(reports).toMatchObject([{ outcome: 'cleared', victims: [{ name: 'batch', rung: 'fallback 1' }] }]);
      expect(reports[0]?.steps[0]).toMatchObject({ rung: 'policy', text: expect.stringMatching(why) });
    }
  });

  const failing: [string, Policy, RegExp][] = [
    [
      'throws',
      () => {
        throw new Error('no idea');
      },
      /^threw: no idea$/,
    ],
    [
      'throws what is no error',
      () => {
        throw null;
      },
      /^threw: null$/,
    ],
    [
      'rejects',
      async () => {
        throw new Error('no idea');
      },
      /^rejected: no idea$/,
    ],
    [
      'returns a broken promise',
      () =>
        ({
          // biome-ignore lint/suspicious/noThenProperty: that is what is broken about it
          then() {
            throw new Error('broken');
          },
        }) as never,
      /^failed: broken$/,
    ],
    [
      'answers wrong after its victim',
      () => ({
        action: 'kill',
        victim: '/jobs/batch',
        get because(): string {
          throw new Error('broken');
        },
      }),
      /broken/,
    ],
  ];
  test.each(failing)('that %s', async (_, policy, why) => {
    const { clock, batch, reports, victims, steps } = await fullOfJobs({ policy });
    await clock.advance(100);
    expect(batch.gone).toBe(true);
    expect(victims()).toEqual(['batch']);
    expect(reports.map(({ outcome }) => outcome)).toEqual(['cleared']);
    expect(steps()).toContainEqual(expect.stringMatching(why));
  });

  test('that spoils its snapshot: there is a report, and the next condition is handled', async () => {
    const { clock, hierarchy, web, victims, reports } = await fullOfJobs({
      policy: (snapshot) => {
        const decision = lowestPriority(snapshot);
        Reflect.deleteProperty(snapshot, 'jobs');
        return decision;
      },
    });
    await clock.advance(100);
    hierarchy.grow(web, 30 * MiB);
    await clock.advance(100);
    expect(victims()).toEqual(['batch', 'spare']);
    expect(reports.map(({ outcome, explanation }) => [outcome, explanation])).toEqual(Array(2).fill(['cleared', []]));
    expect(reports[0]?.steps.map(({ text }) => text)).toContainEqual(expect.stringMatching(/^explaining failed: /));
  });

  test('that never answers: its signal is aborted, the wait is respondWithin', async () => {
    let aborted = 0;
    const policy: Policy = (_, { signal }) => {
      signal.addEventListener('abort', () => aborted++);
      return new Promise(() => {});
    };
    const { clock, web, victims, steps } = await fullOfJobs({ policy, respondWithin: 300 });
    await clock.advance(299);
    expect([aborted, web.waiting === null]).toEqual([0, false]);
    await clock.advance(100);
    expect(aborted).toBe(1);
    expect(victims()).toEqual(['batch']);
    expect(steps()[0]).toBe('no answer within 300 ms');
    expect(web.longestWaitUs).toBe(301_000);
  });

  test('that answers after its deadline: the answer is not followed', async () => {
    const simulation = simulateTest();
    const { clock, hierarchy, handler, job } = simulation;
    hierarchy.make('/jobs', 64 * MiB);
    const web = job('/jobs/web', 20);
    const batch = job('/jobs/batch', 44);
    batch.dyingMs = 1_000;
    const policy = answerAfter(600, clock, killInTurn('/jobs/web'));
    await handler.watch('memcg:/jobs', { jobs: JOBS, policy });
    hierarchy.grow(web, MiB);
    await clock.advance(3_000);
    expect(web.gone).toBe(false);
    expect(simulation.victims()).toEqual(['batch']);
    expect(simulation.steps()).toContain('an answer came after its deadline and was not followed');
  });

  test('that answers after the condition has ended', async () => {
    let context: Parameters<Policy>[1] | undefined;
    const simulation = simulateTest();
    const { clock, hierarchy, handler, job } = simulation;
    hierarchy.make('/jobs', 64 * MiB);
    const web = job('/jobs/web', 20);
    const batch = job('/jobs/batch', 44);
    const policy = answerAfter(400, clock, (_, given) => {
      context = given;
      return { action: 'kill', victim: '/jobs/web', because: 'it is late' };
    });
    await handler.watch('memcg:/jobs', { policy });
    hierarchy.grow(web, MiB);
    await clock.advance(100);
    hierarchy.exit(batch);
    await clock.advance(1_000);
    expect(web.gone).toBe(false);
    expect(simulation.reports).toMatchObject([{ outcome: 'cleared', victims: [] }]);
    expect(context?.signal.aborted).toBe(true);
    expect(() => context?.reserve.charge(1)).toThrow(expect.objectContaining({ code: 'ERR_REPRIEVE_RESERVE_CLOSED' }));
  });
});

describe('waiting', () => {
  const wait =
    (ms: number): Policy =>
    () => ({ action: 'wait', ms, because: 'it may pass' });

  test('all waits of a rung together last clearWithin', async () => {
    const { clock, web, steps, victims } = await fullOfJobs({ policy: wait(400), clearWithin: 1_000 });
    await clock.advance(2_000);
    expect(steps().filter((text) => text.startsWith('waits'))).toEqual([
      'waits for 400 ms: it may pass',
      'waits for 400 ms: it may pass',
      'waits for 200 ms: it may pass',
    ]);
    expect(victims()).toEqual(['batch']);
    expect(web.longestWaitUs).toBe(1_001_000);
  });

  test('each rung has its own', async () => {
    const { clock, web, victims } = await fullOfJobs({
      policy: wait(600),
      fallback: [wait(5_000), lowestPriority],
      clearWithin: 600,
    });
    await clock.advance(2_000);
    expect(victims()).toEqual(['batch']);
    expect(web.longestWaitUs).toBe(1_201_000);
  });

  test('it passes: nobody dies', async () => {
    const { clock, hierarchy, spare, web, reports } = await fullOfJobs({ policy: wait(400) });
    await clock.advance(100);
    hierarchy.make('/jobs', 96 * MiB);
    await clock.advance(1_000);
    expect(reports).toMatchObject([{ outcome: 'cleared', victims: [] }]);
    expect([web.waiting, spare.gone]).toEqual([null, false]);
  });

  test('memory that came back just before it is asked again costs nobody his life', async () => {
    const { clock, hierarchy, batch, outcomes, victims } = await fullOfJobs({ policy: wait(400), clearWithin: 400 });
    await clock.advance(399);
    hierarchy.exit(batch);
    await clock.advance(1_000);
    expect(victims()).toEqual([]);
    expect(outcomes()).toEqual(['cleared']);
  });
});

describe('bounds', () => {
  test('a victim that never dies: the next rung takes another one, and it is cleared', async () => {
    const { clock, web, spare, reports, victims, steps } = await fullOfJobs(
      { policy: killInTurn('/jobs/batch'), clearWithin: 1_000 },
      Number.POSITIVE_INFINITY,
    );
    await clock.advance(999);
    expect(spare.gone).toBe(false);
    await clock.advance(1_000);
    expect(victims()).toEqual(['batch', 'spare']);
    expect(spare.gone).toBe(true);
    expect(web.gone).toBe(false);
    expect(steps()).toContain('batch is not all dead after 1000 ms (clearWithin)');
    expect(reports).toMatchObject([
      {
        victims: [
          { name: 'batch', deadUs: null, freed: null },
          { name: 'spare', rung: 'fallback 1' },
        ],
      },
    ]);
  });

  test('a victim that never dies, while nobody waits any more: no second one, and it is cleared', async () => {
    const { clock, hierarchy, vital, spare, web, reports } = await fullOfJobs(
      { policy: killInTurn('/jobs/batch'), clearWithin: 1_000 },
      Number.POSITIVE_INFINITY,
    );
    await clock.advance(500);
    hierarchy.make('/jobs', 128 * MiB);
    expect(web.waiting).toBe(null);
    await clock.advance(30_000);
    expect([spare.gone, vital.gone, web.gone]).toEqual([false, false, false]);
    expect(reports).toMatchObject([{ outcome: 'cleared', victims: [{ name: 'batch' }] }]);
  });

  test('no second victim while the first is dying', async () => {
    const { clock, spare, batch, victims } = await fullOfJobs({ policy: lowestPriority }, 4_900);
    await clock.advance(4_800);
    expect([batch.dying, batch.gone, spare.gone]).toEqual([true, false, false]);
    await clock.advance(1_000);
    expect(victims()).toEqual(['batch']);
  });

  test('after maxVictims the kernel has it', async () => {
    const simulation = simulateTest();
    const { clock, hierarchy, handler, job, reports } = simulation;
    hierarchy.make('/jobs', 64 * MiB);
    const grower = job('/jobs/grower', 4);
    for (let index = 0; index < 6; index++) job(`/jobs/small-${index}`, 10);
    await handler.watch('memcg:/jobs', {
      policy: lowestPriority,
      maxVictims: 2,
      jobs: { grower: { priority: 90 } },
    });
    hierarchy.grow(grower, 40 * MiB);
    await clock.advance(1_000);
    expect(reports).toMatchObject([
      { outcome: 'kernel', victims: [{}, {}], kernelVictims: [{ job: expect.stringMatching(/^small-/) }, {}] },
    ]);
    expect(grower.anon).toBe(44 * MiB);
  });

  test('handleWithin is the longest wait, however many rungs wait', async () => {
    const { clock, web, batch, reports } = await fullOfJobs({
      policy: never,
      fallback: Array.from({ length: 20 }, () => never),
      respondWithin: 500,
      handleWithin: 3_000,
    });
    await clock.advance(2_999);
    expect(web.waiting).not.toBe(null);
    await clock.advance(100);
    expect(batch.gone).toBe(true);
    expect(web.longestWaitUs).toBe(3_000_000);
    expect(reports).toMatchObject([{ outcome: 'kernel', victims: [], kernelVictims: [{ job: 'batch' }] }]);
  });

  test('a job that holds tmpfs brings nothing back: the next one goes', async () => {
    const simulation = simulateTest();
    const { clock, hierarchy, handler, job } = simulation;
    hierarchy.make('/jobs', 64 * MiB);
    const web = job('/jobs/web', 20);
    job('/jobs/files', 2);
    hierarchy.make('/jobs/files').shmem = 40 * MiB;
    job('/jobs/batch', 1);
    await handler.watch('memcg:/jobs', {
      policy: killInTurn('/jobs/files', '/jobs/batch', '/jobs/web'),
      jobs: { web: { priority: 90 } },
    });
    hierarchy.grow(web, 10 * MiB);
    await clock.advance(1_000);
    expect(simulation.victims()).toEqual(['files', 'batch', 'web']);
    expect(simulation.reports).toMatchObject([
      { outcome: 'cleared', victims: [{ freed: 2 * MiB, left: 40 * MiB }, {}, {}] },
    ]);
    expect(simulation.steps()).toContain(
      'files is dead, but its death brought back only 2 MiB; 40 MiB stay charged (tmpfs or page cache)',
    );
  });

  test('what a victim forks while it dies dies too', async () => {
    const { clock, hierarchy, batch, victims, reports } = await fullOfJobs({ policy: lowestPriority }, 100);
    await clock.advance(50);
    const child = hierarchy.fork(batch);
    hierarchy.grow(child, MiB);
    await clock.advance(1_000);
    expect(child.gone).toBe(true);
    expect(victims()).toEqual(['batch']);
    expect(reports[0]?.victims[0]?.pids).toEqual([batch.pid, child.pid]);
  });

  test('a lost waiter is woken, and costs nobody his life', async () => {
    const simulation = simulateTest({ losesWaiter: () => true });
    const { clock, hierarchy, handler, job } = simulation;
    hierarchy.make('/jobs', 64 * MiB);
    const web = job('/jobs/web', 20);
    job('/jobs/batch', 30);
    job('/jobs/spare', 14);
    await handler.watch('memcg:/jobs', { policy: lowestPriority, jobs: JOBS });
    hierarchy.grow(web, 10 * MiB);
    await clock.advance(1_000);
    expect(simulation.victims()).toEqual(['batch']);
    expect(simulation.reports[0]?.pokes).toBeGreaterThan(0);
    expect(web).toMatchObject({ waiting: null, anon: 30 * MiB });
    expect(disabledIn(hierarchy.root)).toEqual(['/jobs']);
  });

  test('a waiter that is lost while an answer is awaited costs nobody his life', async () => {
    const simulation = simulateTest({ losesWaiter: () => true });
    const { clock, hierarchy, handler, job } = simulation;
    hierarchy.make('/jobs', 64 * MiB);
    const web = job('/jobs/web', 20);
    const batch = job('/jobs/batch', 44);
    job('/jobs/spare', 0);
    await handler.watch('memcg:/jobs', { policy: never });
    hierarchy.grow(web, MiB);
    await clock.advance(100);
    hierarchy.exit(batch);
    await clock.advance(5_000);
    expect(simulation.victims()).toEqual([]);
    expect(simulation.outcomes()).toEqual(['cleared']);
  });
});

describe('the hand-over to the kernel', () => {
  test('takes the job prepared by oom_score_adj, not the largest; every value is put back, also on children', async () => {
    const simulation = simulateTest();
    const { clock, hierarchy, handler, job, reports, close } = simulation;
    hierarchy.make('/jobs', 64 * MiB);
    const web = job('/jobs/web', 50, -300);
    const batch = job('/jobs/batch', 5, 300);
    const other = hierarchy.spawn(batch.memcg, 'other');
    other.scoreAdj = 100;
    const low = job('/jobs/batch2', 2, 7);
    await handler.watch('memcg:/jobs', {
      policy: () => ({ action: 'kernel', because: 'a test' }),
      jobs: { 'batch*': { priority: 10 } },
    });
    expect([web, batch, other, low].map(({ scoreAdj }) => scoreAdj)).toEqual([-300, 1000, 1000, 1000]);
    const child = hierarchy.fork(low);
    hierarchy.grow(web, 10 * MiB);
    await clock.advance(100);
    expect([web.gone, batch.gone]).toEqual([false, true]);
    expect(reports).toMatchObject([
      { outcome: 'kernel', victims: [], kernelVictims: [{ job: 'batch', pids: [batch.pid] }] },
    ]);
    await close();
    expect([web, other, low, child].map(({ scoreAdj }) => scoreAdj)).toEqual([-300, 100, 7, 7]);
  });

  test('a job of several processes gets back what each had', async () => {
    const { hierarchy, handler, job, close } = simulateTest();
    hierarchy.make('/jobs', 64 * MiB);
    const first = job('/jobs/a', 5, 0);
    const second = hierarchy.spawn(first.memcg, 'second');
    second.scoreAdj = 1000;
    await handler.watch('memcg:/jobs', { policy: lowestPriority });
    await close();
    expect([first.scoreAdj, second.scoreAdj]).toEqual([0, 1000]);
  });

  test('takes no protected job while another one can be killed', async () => {
    const simulation = simulateTest();
    const { clock, hierarchy, handler, job } = simulation;
    hierarchy.make('/jobs', 64 * MiB);
    const batch = job('/jobs/batch', 5);
    const spare = job('/jobs/spare', 10);
    const web = job('/jobs/web', 10);
    const vital = job('/jobs/vital', 39);
    await handler.watch('memcg:/jobs', { policy: () => ({ action: 'kernel', because: 'a test' }), jobs: JOBS });
    hierarchy.grow(web, 12 * MiB);
    await clock.advance(1_000);
    expect([batch.gone, spare.gone, vital.gone]).toEqual([true, true, false]);
  });

  test('parks and alarms where nobody can be killed, until somebody can be', async () => {
    const simulation = simulateTest();
    const { clock, hierarchy, handler, job, alarms, outcomes } = simulation;
    hierarchy.make('/jobs', 64 * MiB);
    const vital = job('/jobs/vital', 64, -1000);
    await handler.watch('memcg:/jobs', { policy: lowestPriority, jobs: JOBS });
    hierarchy.grow(vital, MiB);
    await clock.advance(60_000);
    expect(alarms).toEqual([expect.stringMatching(/^\/jobs stays parked: no task can be killed/)]);
    expect([vital.gone, vital.waiting === null, outcomes()]).toEqual([false, false, []]);
    const loose = hierarchy.spawn(vital.memcg, 'loose');
    await clock.advance(1_000);
    expect(loose.gone).toBe(true);
    expect(alarms).toHaveLength(1);
    vital.scoreAdj = 0;
    await clock.advance(6_000);
    expect(vital.gone).toBe(true);
    expect(outcomes()).toEqual(['kernel']);
  });

  test('kills by signal what the kernel may not, and no more than maxVictims', async () => {
    const simulation = simulateTest();
    const { clock, hierarchy, handler, job, reports } = simulation;
    hierarchy.make('/jobs', 64 * MiB);
    hierarchy.make('/jobs/empty');
    const web = job('/jobs/web', 1, -1000);
    hierarchy.make('/jobs/web').shmem = 61 * MiB;
    // No candidates, as they bring back less than what stays: their oom_score_adj is not raised.
    for (const name of ['a', 'b', 'c', 'd']) job(`/jobs/${name}`, 0.5, -1000);
    for (const name of ['a', 'b', 'c', 'd']) hierarchy.make(`/jobs/${name}`).shmem = MiB;
    await handler.watch('memcg:/jobs', { policy: lowestPriority, maxVictims: 2, jobs: { web: { protected: true } } });
    hierarchy.grow(web, 60 * MiB);
    await clock.advance(60_000);
    expect(web.gone).toBe(false);
    expect(simulation.alarms).toHaveLength(1);
    await simulation.close();
    expect(reports).toMatchObject([{ outcome: 'released', victims: [{}, {}] }]);
    expect(reports[0]?.victims.map(({ name }) => name)).not.toContain('empty');
  });

  test('is armed again once nobody waits', async () => {
    const { clock, hierarchy, outcomes } = await fullOfJobs({
      policy: () => ({ action: 'kernel', because: 'a test' }),
    });
    await clock.advance(100);
    expect(outcomes()).toEqual(['kernel']);
    expect(disabledIn(hierarchy.root)).toEqual(['/jobs']);
  });
});

describe('identity', () => {
  test('a victim made anew at the same path is a new job, which an answer to the old snapshot does not mean', async () => {
    const simulation = simulateTest();
    const { clock, hierarchy, handler, job } = simulation;
    hierarchy.make('/jobs', 64 * MiB);
    const web = job('/jobs/web', 20);
    const old = job('/jobs/batch', 2);
    job('/jobs/spare', 42);
    await handler.watch('memcg:/jobs', { policy: answerAfter(300, clock, killInTurn('/jobs/batch', '/jobs/spare')) });
    hierarchy.grow(web, 10 * MiB);
    await clock.advance(100);
    hierarchy.exit(old);
    hierarchy.remove(old.memcg);
    const anew = job('/jobs/batch', 0);
    await clock.advance(5_000);
    expect(anew.gone).toBe(false);
    expect(simulation.victims()).toEqual(['spare']);
  });

  test('a job that is made anew after its death may be killed once more', async () => {
    const simulation = simulateTest();
    const { clock, hierarchy, handler, job } = simulation;
    hierarchy.make('/jobs', 64 * MiB);
    const web = job('/jobs/web', 20);
    const old = job('/jobs/batch', 44);
    let asked = 0;
    const policy: Policy = (snapshot) => {
      asked++;
      return lowestPriority(snapshot);
    };
    await handler.watch('memcg:/jobs', { jobs: JOBS, policy });
    old.dyingMs = 10;
    hierarchy.grow(web, 40 * MiB);
    await clock.advance(9);
    // Its place is taken at once.
    clock.after(1, () => {
      hierarchy.remove(old.memcg);
      job('/jobs/batch', 44);
    });
    await clock.advance(100);
    expect(simulation.victims()).toEqual(['batch', 'batch']);
    expect(asked).toBe(2);
  });
});
