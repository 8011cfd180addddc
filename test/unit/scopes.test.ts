import { Registry } from 'prom-client';
import { describe, expect, onTestFinished, test } from 'vitest';
import type { Hierarchy } from '../../src/cgroup/cgroup.js';
import { SimulatedHierarchy, VirtualClock } from '../../src/cgroup/simulated.js';
import { ReprieveError } from '../../src/errors.js';
import { OomHandler } from '../../src/handler.js';
import { lowestPriority, type Policy, type WatchOptions } from '../../src/index.js';
import { registerMetrics } from '../../src/report/metrics.js';
import { NO_OWN_MEMCG } from '../../src/self/own-memcg.js';
import { simulatedGround } from '../../src/simulation.js';
import { collect, disabledIn, MiB, simulateTest, turn } from '../support/simulation.js';

const options: WatchOptions = { policy: lowestPriority };
const never: Policy = () => new Promise(() => {});
const withCode = (code: string) => expect.objectContaining({ code });

describe('a watch is refused, and arms nothing,', () => {
  test.each([
    ['memcg:/other', {}, 'ERR_REPRIEVE_NOT_A_MEMCG'],
    ['memcg:relative', {}, 'ERR_REPRIEVE_INVALID_SCOPE'],
    ['system', {}, 'ERR_REPRIEVE_UNSUPPORTED'],
    ['memcg:/jobs', { recursive: 1 }, 'ERR_REPRIEVE_INVALID_ARGUMENT'],
    ['memcg:/jobs', { handleWithin: -1 }, 'ERR_REPRIEVE_INVALID_ARGUMENT'],
    ['memcg:/jobs', { jobs: { web: { priority: 101 } } }, 'ERR_REPRIEVE_INVALID_ARGUMENT'],
  ])('of %s with %o', async (scope, wrong, code) => {
    const { hierarchy, handler } = simulateTest();
    hierarchy.make('/jobs');
    await expect(handler.watch(scope, wrong as WatchOptions)).rejects.toEqual(withCode(code));
    expect(disabledIn(hierarchy.root)).toEqual([]);
    expect(hierarchy.held.size).toBe(0);
  });

  test('of what is watched already, itself or as part of a recursive one', async () => {
    const { hierarchy, handler } = simulateTest();
    hierarchy.make('/jobs/web');
    await handler.watch('memcg:/jobs', { recursive: true });
    await expect(handler.watch('memcg:/jobs')).rejects.toEqual(withCode('ERR_REPRIEVE_ALREADY_WATCHED'));
    await expect(handler.watch('memcg:/jobs/web')).rejects.toEqual(withCode('ERR_REPRIEVE_ALREADY_WATCHED'));
  });

  test('after an abort, and of a closed handler', async () => {
    const { hierarchy, handler, close } = simulateTest();
    hierarchy.make('/jobs');
    await expect(handler.watch('memcg:/jobs', { signal: AbortSignal.abort() })).rejects.toThrow(/aborted/);
    await close();
    await expect(handler.watch('memcg:/jobs')).rejects.toEqual(withCode('ERR_REPRIEVE_CLOSED'));
  });

  test('of the memcg that the handler sits in', async () => {
    const hierarchy = new SimulatedHierarchy(new VirtualClock());
    hierarchy.make('/jobs/own');
    await using handler = OomHandler.over({
      ...simulatedGround(hierarchy),
      own: { ...NO_OWN_MEMCG, path: '/jobs/own' },
    });
    await expect(handler.watch('memcg:/jobs')).rejects.toEqual(withCode('ERR_REPRIEVE_INSIDE_SCOPE'));
  });

  test('when one memcg of it cannot be armed', async () => {
    class Refusing extends SimulatedHierarchy {
      override listenOom(...[memcg, signal]: Parameters<Hierarchy['listenOom']>) {
        if (memcg.path === '/jobs/b') throw new ReprieveError('ERR_REPRIEVE_PERMISSION', 'a test');
        return super.listenOom(memcg, signal);
      }
    }
    const clock = new VirtualClock();
    const hierarchy = new Refusing(clock);
    const a = hierarchy.spawn(hierarchy.make('/jobs/a'), 'a', 10 * MiB);
    hierarchy.make('/jobs/b');
    await using handler = OomHandler.over(simulatedGround(hierarchy));
    await expect(handler.watch('memcg:/jobs', { recursive: true })).rejects.toEqual(
      withCode('ERR_REPRIEVE_PERMISSION'),
    );
    expect(hierarchy.held.size).toBe(0);
    hierarchy.make('/jobs/c');
    expect(disabledIn(hierarchy.root)).toEqual([]);
    expect(a.scoreAdj).toBe(0);
  });
});

test('tasks that wait already when the watch begins are handled', async () => {
  const { clock, hierarchy, handler, job, outcomes } = simulateTest();
  const jobs = hierarchy.make('/jobs', 64 * MiB);
  const web = job('/jobs/web', 64);
  jobs.killDisabled = true;
  hierarchy.grow(web, MiB);
  await handler.watch('memcg:/jobs', options);
  await clock.advance(100);
  expect(web.gone).toBe(true);
  expect(outcomes()).toEqual(['cleared']);
  // As somebody else had it, so it stays.
  await handler.watches[0]?.close();
  expect(disabledIn(hierarchy.root)).toEqual(['/jobs']);
  jobs.killDisabled = false;
});

test('a signal that finds nothing to handle is counted', async () => {
  const { clock, hierarchy, handler, job, reports } = simulateTest();
  hierarchy.make('/jobs', 64 * MiB);
  const web = job('/jobs/web', 64);
  await handler.watch('memcg:/jobs', options);
  hierarchy.grow(web, MiB);
  hierarchy.make('/jobs', 96 * MiB);
  await clock.advance(100);
  expect(handler.spurious).toBeGreaterThan(0);
  expect(reports).toEqual([]);
});

describe('the drill', () => {
  test('is silent: no alarm, no report, where nobody may be killed', async () => {
    const { clock, hierarchy, handler, job, alarms, reports } = simulateTest();
    hierarchy.make('/jobs', 64 * MiB);
    job('/jobs/web', 20, -1000);
    await handler.watch('memcg:/jobs', { ...options, jobs: { web: { protected: true } } });
    await clock.advance(5_000);
    expect([alarms, reports]).toEqual([[], []]);
  });

  test('of several watches is taken for no signal of the kernel', async () => {
    const { clock, hierarchy, handler, job } = simulateTest();
    for (const name of ['a', 'b', 'c']) {
      hierarchy.make(`/${name}`, 64 * MiB);
      job(`/${name}/web`, 20);
      await handler.watch(`memcg:/${name}`, options);
    }
    const [first] = handler.watches;
    await clock.advance(3_000);
    await first?.close();
    await clock.advance(3_000);
    expect(handler.spurious).toBe(0);
  });

  test('does not hand a watched parent over that is out of memory meanwhile', async () => {
    const { clock, hierarchy, handler, job, close } = simulateTest();
    hierarchy.make('/top', 64 * MiB);
    const web = job('/top/web', 60);
    const settings = { policy: never, respondWithin: 10_000, jobs: { '*': { protected: true } } };
    await handler.watch('memcg:/top', settings);
    await handler.watch('memcg:/top/web', settings);
    hierarchy.grow(web, 10 * MiB);
    await clock.advance(5_000);
    expect([web.gone, disabledIn(hierarchy.root)]).toEqual([false, ['/top', '/top/web']]);
    await close();
  });
});

test("a parent's OOM that five watched children see is one condition with one victim", async () => {
  const { clock, hierarchy, handler, job, reports } = simulateTest();
  hierarchy.make('/top', 64 * MiB);
  const a = job('/top/a', 20);
  const b = job('/top/b', 10);
  const c = job('/top/c', 30);
  hierarchy.make('/top/d');
  hierarchy.make('/top/e');
  for (const name of ['a', 'b', 'c', 'd', 'e']) await handler.watch(`memcg:/top/${name}`, options);
  await handler.watch('memcg:/top', { ...options, jobs: { b: { priority: 10 } } });
  hierarchy.grow(a, 10 * MiB);
  await clock.advance(1_000);
  expect([a.gone, b.gone, c.gone]).toEqual([false, true, false]);
  expect(reports).toMatchObject([
    { owner: '/top', scopes: ['memcg:/top'], outcome: 'cleared', victims: [{ name: 'b' }] },
  ]);
});

describe('a memcg above everything watched', () => {
  /** /top is full and parks its tasks; only what is below it is watched. */
  async function full(settings: WatchOptions) {
    const simulation = simulateTest();
    const { hierarchy, handler, job } = simulation;
    const top = hierarchy.make('/top', 64 * MiB);
    const outside = job('/top/outside', 20);
    const a = job('/top/a/x', 20);
    const b = job('/top/b/x', 10);
    top.killDisabled = true;
    onTestFinished(() => {
      top.killDisabled = false;
    });
    await handler.watch('memcg:/top/a', settings);
    await handler.watch('memcg:/top/b', settings);
    hierarchy.grow(outside, 20 * MiB);
    return { ...simulation, top, outside, a, b };
  }

  test('only the watched jobs are touched, and what they cannot clear is left', async () => {
    const { clock, outside, a, b, reports, close } = await full({ ...options, maxVictims: 1 });
    expect(outside.waiting).not.toBe(null);
    await clock.advance(100);
    expect([outside.gone, a.gone, b.gone]).toEqual([false, true, false]);
    expect(outside.waiting).toBe(null);
    expect(reports).toMatchObject([
      { owner: '/top', scopes: ['memcg:/top/a', 'memcg:/top/b'], snapshot: { above: true }, outcome: 'cleared' },
    ]);
    await close();
  });

  test('what was left there hides no waiter that sleeps on in another memcg', async () => {
    const { clock, hierarchy, handler, job, outcomes } = simulateTest({ losesWaiter: () => true });
    const top = hierarchy.make('/top', 64 * MiB);
    job('/top/a/job', 60);
    const outside = job('/top/outside', 0);
    top.killDisabled = true;
    hierarchy.make('/other', 64 * MiB);
    const web = job('/other/web', 20);
    const batch = job('/other/batch', 44);
    await handler.watch('memcg:/top/a', { policy: lowestPriority, jobs: { '*': { protected: true } } });
    await handler.watch('memcg:/other', { policy: lowestPriority });
    hierarchy.grow(outside, 10 * MiB);
    await clock.advance(100);
    expect(outcomes()).toEqual(['left']);
    hierarchy.grow(web, MiB);
    hierarchy.exit(batch); // memory is back before the signal arrives, and the waiter is lost
    await clock.advance(1_000);
    expect(web.waiting).toBe(null);
    expect(outcomes()).toEqual(['left', 'cleared']);
    top.killDisabled = false;
  });

  test('it is left once, not again and again, and its own setting is not touched', async () => {
    const { clock, top, outside, reports, close } = await full({ ...options, jobs: { '*': { protected: true } } });
    await clock.advance(10_000);
    expect(outside.waiting).not.toBe(null);
    expect(reports[0]).toMatchObject({ owner: '/top', outcome: 'left', victims: [] });
    expect(reports.length).toBeLessThan(10);
    await close();
    expect(top.killDisabled).toBe(true);
  });

  test('a watch that ends meanwhile takes only its own jobs along', async () => {
    const { clock, handler, outside, a, b, reports, close } = await full({ policy: never });
    await clock.advance(100);
    const closing = handler.watches[0]?.close();
    await clock.advance(2_000);
    await closing;
    expect([a.gone, b.gone]).toEqual([false, true]);
    expect(outside.longestWaitUs).toBeLessThan(1_000_000);
    expect(reports.map(({ outcome }) => outcome)).toEqual(['released', 'cleared']);
    await close();
  });
});

test('two conditions at once are two ladders', async () => {
  const { clock, hierarchy, handler, job, reports } = simulateTest();
  for (const name of ['one', 'two']) hierarchy.make(`/${name}`, 64 * MiB);
  const first = job('/one/a', 60);
  const second = job('/two/a', 60);
  await handler.watch('memcg:/one', { policy: never, respondWithin: 300 });
  await handler.watch('memcg:/two', { policy: never, respondWithin: 200 });
  hierarchy.grow(first, 10 * MiB);
  hierarchy.grow(second, 10 * MiB);
  await clock.advance(1_000);
  expect([first.longestWaitUs, second.longestWaitUs]).toEqual([300_000, 200_000]);
  expect(reports.map(({ owner, outcome }) => [owner, outcome])).toEqual([
    ['/two', 'cleared'],
    ['/one', 'cleared'],
  ]);
});

describe('recursive', () => {
  test('a nested memcg with a limit of its own, and one that is made later', async () => {
    const { clock, hierarchy, handler, job, reports } = simulateTest();
    hierarchy.make('/jobs', 256 * MiB);
    hierarchy.make('/jobs/pod', 32 * MiB);
    const x = job('/jobs/pod/x', 20);
    const y = job('/jobs/pod/y', 10);
    await handler.watch('memcg:/jobs', { ...options, recursive: true, jobs: { 'pod/y': { priority: 1 } } });
    hierarchy.grow(x, 10 * MiB);
    await clock.advance(100);
    expect([x.gone, y.gone]).toEqual([false, true]);
    const late = job('/jobs/late/z', 10);
    hierarchy.make('/jobs/late', 16 * MiB);
    hierarchy.grow(late, 10 * MiB);
    expect(late.waiting).not.toBe(null);
    await clock.advance(100);
    expect(late.gone).toBe(true);
    expect(reports.map(({ owner, outcome }) => [owner, outcome])).toEqual([
      ['/jobs/pod', 'cleared'],
      ['/jobs/late', 'cleared'],
    ]);
  });

  test('the OOM of a nested memcg and of its parent, one after the other', async () => {
    const { clock, hierarchy, handler, job, outcomes, reports } = simulateTest();
    hierarchy.make('/jobs', 64 * MiB);
    hierarchy.make('/jobs/pod', 32 * MiB);
    const x = job('/jobs/pod/x', 30);
    const other = job('/jobs/other', 30);
    x.dyingMs = 50;
    await handler.watch('memcg:/jobs', { ...options, recursive: true });
    hierarchy.grow(x, 10 * MiB);
    await clock.advance(10);
    hierarchy.grow(other, 10 * MiB);
    await clock.advance(1_000);
    expect([x.gone, other.gone]).toEqual([true, false]);
    expect(new Set(outcomes())).toEqual(new Set(['cleared']));
    expect(reports.flatMap(({ victims }) => victims)).toHaveLength(1);
  });

  test('over a memcg that is watched by itself: each gets back what it had', async () => {
    const { hierarchy, handler } = simulateTest();
    hierarchy.make('/jobs/web');
    await handler.watch('memcg:/jobs/web', options);
    await handler.watch('memcg:/jobs', { ...options, recursive: true }).catch(() => {});
    // The end of the test finds a memcg that is left disabled.
  });
});

test('not recursive: a memcg that is made later does not keep the inherited oom_kill_disable', async () => {
  const { clock, hierarchy, handler, job } = simulateTest();
  hierarchy.make('/jobs', 256 * MiB);
  await handler.watch('memcg:/jobs', options);
  const late = job('/jobs/late/x', 10);
  hierarchy.make('/jobs/late', 16 * MiB);
  expect(disabledIn(hierarchy.root)).toEqual(['/jobs']);
  hierarchy.grow(late, 10 * MiB);
  await clock.advance(10);
  expect(late.gone).toBe(true);
});

describe('the end', () => {
  /** /jobs is full, its policy never answers. */
  async function open(settings: WatchOptions = { policy: never }) {
    const simulation = simulateTest();
    const { clock, hierarchy, handler, job } = simulation;
    hierarchy.make('/jobs', 64 * MiB);
    const web = job('/jobs/web', 60);
    const watch = await handler.watch('memcg:/jobs', settings);
    hierarchy.grow(web, 10 * MiB);
    await clock.advance(1);
    return { ...simulation, web, watch };
  }

  test('the watch is closed: the condition is released, and the kernel decides', async () => {
    const { clock, watch, web, outcomes } = await open();
    const closing = watch.close();
    await clock.advance(100);
    await closing;
    expect(watch.state).toBe('closed');
    expect(web).toMatchObject({ gone: true, longestWaitUs: 1_000 });
    expect(outcomes()).toEqual(['released']);
  });

  test('a waiter that nobody can kill does not hold it up for more than a second', async () => {
    const { clock, watch, web } = await open();
    web.scoreAdj = -1000;
    let closed = false;
    const closing = watch.close().then(() => {
      closed = true;
    });
    await clock.advance(990);
    expect(closed).toBe(false);
    await clock.advance(20);
    await closing;
    expect(closed).toBe(true);
  });

  test('a tick that falls into the end arms nothing again', async () => {
    const { clock, hierarchy, watch, web } = await open({ policy: never, respondWithin: 5_000 });
    web.scoreAdj = -1000;
    await clock.advance(996);
    const closing = watch.close();
    await clock.advance(1);
    hierarchy.exit(web);
    await clock.advance(100);
    await closing;
    expect(disabledIn(hierarchy.root)).toEqual([]);
  });

  test('a watch that is closed while it is set up', async () => {
    const { clock, hierarchy, handler } = simulateTest();
    hierarchy.make('/jobs');
    const pending = handler.watch('memcg:/jobs', options);
    while (handler.watches.length === 0) await null;
    handler.watches[0]?.close();
    let settled = false;
    const settle = () => {
      settled = true;
    };
    pending.then(settle, settle);
    await clock.advance(2_000);
    expect(settled).toBe(true);
  });

  test('its signal is aborted', async () => {
    const abort = new AbortController();
    const { clock, watch, web, outcomes } = await open({ policy: never, signal: abort.signal });
    abort.abort();
    await clock.advance(100);
    expect([watch.state, web.gone, outcomes()]).toEqual(['closed', true, ['released']]);
  });

  test('the memcg is removed while watched', async () => {
    const { clock, hierarchy, handler } = simulateTest();
    const jobs = hierarchy.make('/jobs', 64 * MiB);
    const watch = await handler.watch('memcg:/jobs', options);
    const vanished: string[] = [];
    handler.on('vanished', (scope) => vanished.push(scope));
    hierarchy.remove(jobs);
    await clock.advance(10);
    expect([watch.state, vanished, handler.watches]).toEqual(['vanished', ['memcg:/jobs'], []]);
    expect(hierarchy.held.size).toBe(0);
    hierarchy.make('/jobs');
    await handler.watch('memcg:/jobs', options);
  });

  test('the memcg is removed while its condition is open', async () => {
    const { clock, hierarchy, watch, web, outcomes } = await open();
    hierarchy.exit(web);
    hierarchy.remove(web.memcg);
    hierarchy.remove(web.memcg.parent as never);
    await clock.advance(10);
    expect([watch.state, outcomes()]).toEqual(['vanished', ['vanished']]);
  });

  test('a nested memcg is removed while its condition is open: the watch goes on', async () => {
    const { clock, hierarchy, handler, job, outcomes } = simulateTest();
    const pod = hierarchy.make('/jobs/pod', 32 * MiB);
    const x = job('/jobs/pod/x', 30);
    const watch = await handler.watch('memcg:/jobs', { policy: never, recursive: true });
    hierarchy.grow(x, 10 * MiB);
    await clock.advance(1);
    hierarchy.exit(x);
    hierarchy.remove(x.memcg);
    hierarchy.remove(pod);
    await clock.advance(100);
    expect(outcomes()).toEqual(['vanished']);
    expect([watch.state, watch.armed]).toEqual(['watching', ['/jobs']]);
  });

  test('the process exits: everything is put back at once', async () => {
    const { hierarchy, web } = await open();
    process.listeners('exit').at(-1)?.(0);
    expect(disabledIn(hierarchy.root)).toEqual([]);
    expect(web.gone).toBe(true);
  });
});

describe('the iterator style', () => {
  async function iterate(settings: WatchOptions = {}) {
    const simulation = simulateTest();
    const { clock, hierarchy, handler, job } = simulation;
    hierarchy.make('/jobs', 64 * MiB);
    const web = job('/jobs/web', 20);
    const batch = job('/jobs/batch', 40);
    const pending = handler.watch('memcg:/jobs', { jobs: { web: { protected: true } }, ...settings });
    const taken = collect(pending);
    await pending;
    hierarchy.grow(web, 10 * MiB);
    await turn(clock);
    const [condition] = taken;
    if (condition === undefined) throw new Error('no condition was handed over');
    return { ...simulation, pending, taken, condition, web, batch };
  }

  test('the caller acts', async () => {
    const { clock, condition, batch, outcomes, handler } = await iterate();
    const snapshot = await condition.snapshot();
    expect(snapshot.jobs.map(({ id }) => id)).toEqual(['/jobs/web', '/jobs/batch']);
    const lease = condition.reserve.charge('1MiB');
    const killing = condition.kill(lowestPriority(snapshot).victim, 'a test');
    await clock.advance(100);
    await expect(killing).resolves.toEqual({ job: '/jobs/batch', processes: 1, dead: true, freed: 40 * MiB });
    await expect(condition.closed).resolves.toMatchObject({
      outcome: 'cleared',
      victims: [{ name: 'batch', rung: 'caller', because: 'a test' }],
      reserve: { charged: MiB, maxCharged: MiB },
    });
    expect([batch.gone, condition.open, condition.signal.aborted, outcomes()]).toEqual([
      true,
      false,
      true,
      ['cleared'],
    ]);
    expect([lease.buffer.length, handler.reserve.charged]).toEqual([0, 0]);
  });

  test('too late, while an action is under way, and after the end', async () => {
    const { clock, condition, batch } = await iterate({ respondWithin: 100 });
    batch.dyingMs = 200;
    const killing = condition.kill('/jobs/batch');
    await expect(condition.kill('/jobs/web')).rejects.toEqual(withCode('ERR_REPRIEVE_TOO_LATE'));
    await clock.advance(1_000);
    await expect(killing).resolves.toMatchObject({ dead: true });
    for (const call of [condition.snapshot(), condition.kill('/jobs/web'), condition.wait(1), condition.handOver()]) {
      await expect(call).rejects.toEqual(withCode('ERR_REPRIEVE_CONDITION_CLOSED'));
    }
  });

  test('a caller that never acts has respondWithin, then the fallback decides', async () => {
    const { clock, condition, batch, reports } = await iterate({ respondWithin: 100 });
    batch.dyingMs = 50;
    await clock.advance(120);
    await expect(condition.kill('/jobs/batch')).rejects.toEqual(withCode('ERR_REPRIEVE_TOO_LATE'));
    await clock.advance(1_000);
    expect(reports).toMatchObject([{ outcome: 'cleared', victims: [{ name: 'batch', rung: 'fallback 1' }] }]);
  });

  test('what may not be killed', async () => {
    const { condition, batch, web } = await iterate();
    for (const victim of ['/jobs/web', '/jobs/other', undefined]) {
      await expect(condition.kill(victim)).rejects.toEqual(withCode('ERR_REPRIEVE_NOT_A_VICTIM'));
    }
    expect([batch.dying, web.dying]).toEqual([false, false]);
  });

  test('no more victims than maxVictims: then the kernel has it', async () => {
    const { clock, hierarchy, condition, batch, web, reports } = await iterate({ maxVictims: 1 });
    hierarchy.exit(batch);
    hierarchy.make('/jobs/batch').shmem = 34 * MiB;
    const spare = hierarchy.spawn(hierarchy.make('/jobs/spare'), 'spare');
    hierarchy.grow(web, 64 * MiB);
    void condition.kill('/jobs/batch');
    await clock.advance(100);
    await expect(condition.kill('/jobs/spare')).rejects.toEqual(withCode('ERR_REPRIEVE_CONDITION_CLOSED'));
    expect(reports).toMatchObject([
      {
        outcome: 'kernel',
        victims: [{ name: 'batch' }],
        kernelVictims: expect.arrayContaining([{ job: 'spare', pids: [spare.pid], processes: 1 }]),
      },
    ]);
  });

  test('a victim that does not die in time resolves as not dead', async () => {
    const { clock, condition, batch } = await iterate({ clearWithin: 300 });
    batch.dyingMs = 1_000;
    const killing = condition.kill('/jobs/batch');
    await clock.advance(300);
    await expect(killing).resolves.toMatchObject({ dead: false, freed: null });
    await clock.advance(1_000);
  });

  test('waiting puts the deadline off, by clearWithin in all; handing over ends it', async () => {
    const { clock, condition, batch, outcomes } = await iterate({ respondWithin: 100, clearWithin: 500 });
    await condition.wait(400);
    await clock.advance(350);
    expect(batch.gone).toBe(false);
    await expect(condition.wait(-1)).rejects.toEqual(withCode('ERR_REPRIEVE_INVALID_ARGUMENT'));
    await condition.handOver();
    await clock.advance(100);
    expect([batch.gone, outcomes()]).toEqual([true, ['kernel']]);
  });

  test('two conditions, one after the other handled', async () => {
    const simulation = simulateTest();
    const { clock, hierarchy, handler, job, outcomes } = simulation;
    const pods = ['one', 'two'].map((name) => {
      hierarchy.make(`/jobs/${name}`, 32 * MiB);
      return job(`/jobs/${name}/x`, 30);
    });
    const owners: string[] = [];
    const pending = handler.watch('memcg:/jobs', { recursive: true });
    void (async () => {
      for await (const condition of pending) {
        owners.push(condition.owner);
        await condition.kill(lowestPriority(await condition.snapshot()).victim);
      }
    })();
    await pending;
    for (const pod of pods) hierarchy.grow(pod, 10 * MiB);
    await clock.advance(100);
    expect(owners).toEqual(['/jobs/one', '/jobs/two']);
    expect(outcomes()).toEqual(['cleared', 'cleared']);
  });

  test('a condition that is over before it is taken is counted, not handed out', async () => {
    const { clock, hierarchy, handler, job } = simulateTest();
    hierarchy.make('/jobs', 64 * MiB);
    const web = job('/jobs/web', 60);
    const watch = await handler.watch('memcg:/jobs', { respondWithin: 100 });
    hierarchy.grow(web, 10 * MiB);
    await clock.advance(1_000);
    const taken = collect(watch);
    await turn(clock);
    expect([web.gone, taken.length, watch.dropped]).toEqual([true, 0, 1]);
  });

  test('leaving the loop closes the watch', async () => {
    const { clock, hierarchy, handler, job, outcomes } = simulateTest();
    hierarchy.make('/jobs', 64 * MiB);
    const web = job('/jobs/web', 60);
    const pending = handler.watch('memcg:/jobs');
    const loop = (async () => {
      for await (const _ of pending) break;
    })();
    await pending;
    hierarchy.grow(web, 10 * MiB);
    await clock.advance(100);
    await loop;
    await turn(clock);
    expect([handler.watches, outcomes(), disabledIn(hierarchy.root)]).toEqual([[], ['released'], []]);
  });

  test('closing the watch ends the loop; a watch with a policy has none', async () => {
    const { clock, hierarchy, handler } = simulateTest();
    hierarchy.make('/jobs');
    const watch = await handler.watch('memcg:/jobs');
    const next = watch[Symbol.asyncIterator]().next();
    const closing = watch.close();
    await clock.advance(10);
    await closing;
    await expect(next).resolves.toEqual({ done: true, value: undefined });
    const withPolicy = await handler.watch('memcg:/jobs', options);
    await expect(withPolicy[Symbol.asyncIterator]().next()).rejects.toEqual(withCode('ERR_REPRIEVE_INVALID_ARGUMENT'));
  });
});

describe('the reserve of a scope', () => {
  test('lies within that of the watched scope above it, in whatever order they were watched', async () => {
    const { hierarchy, handler } = simulateTest();
    hierarchy.make('/jobs/web/one');
    const one = await handler.watch('memcg:/jobs/web/one', { ...options, reserve: '3MiB' });
    const jobs = await handler.watch('memcg:/jobs', { ...options, reserve: '4MiB' });
    const web = await handler.watch('memcg:/jobs/web', { ...options, reserve: '2MiB' });
    expect([one, web, jobs].map(({ reserve }) => reserve.available / MiB)).toEqual([2, 2, 4]);
    await web.close();
    expect([one, jobs, handler].map(({ reserve }) => reserve.available / MiB)).toEqual([3, 4, 8]);
  });

  test('counts at every level while a condition holds it, and nowhere after', async () => {
    const { hierarchy, handler, clock } = simulateTest();
    hierarchy.make('/jobs', 64 * MiB);
    hierarchy.make('/jobs/web', 32 * MiB);
    const leak = hierarchy.spawn(hierarchy.make('/jobs/web/leak'), 'leak', 20 * MiB);
    const jobs = await handler.watch('memcg:/jobs', options);
    let lease: number | undefined;
    const policy: Policy = (snapshot, { reserve }) => {
      lease = reserve.charge('1MiB').bytes;
      expect(reserve.tryCharge('2MiB')).toBeNull();
      expect([jobs, handler].map(({ reserve: above }) => above.charged)).toEqual([MiB, MiB]);
      return lowestPriority(snapshot);
    };
    const web = await handler.watch('memcg:/jobs/web', { policy, reserve: '2MiB' });
    hierarchy.grow(leak, 20 * MiB);
    await clock.advance(1_000);
    expect(lease).toBe(MiB);
    for (const { reserve } of [web, jobs, handler]) {
      expect(reserve).toMatchObject({ charged: 0, maxCharged: MiB, failures: 1 });
    }
  });

  test('is no more than the handler has', async () => {
    const { hierarchy, handler } = simulateTest();
    hierarchy.make('/jobs');
    for (const reserve of ['9MiB', -1, 'much']) {
      await expect(handler.watch('memcg:/jobs', { reserve })).rejects.toThrow(/Expected the `reserve` option to be/);
    }
  });

  test('is a metric', async () => {
    const { hierarchy, handler } = simulateTest();
    hierarchy.make('/jobs');
    await handler.watch('memcg:/jobs', { ...options, reserve: '2MiB' });
    const registry = new Registry();
    registerMetrics(handler, registry);
    const text = await registry.metrics();
    expect(text).toContain(`reprieve_reserve_bytes{scope=""} ${8 * MiB}\n`);
    expect(text).toContain(`reprieve_reserve_available_bytes{scope="memcg:/jobs"} ${2 * MiB}\n`);
    expect(text).toContain('reprieve_overcharge_windows{result="refused"} 0\n');
    for (const watch of handler.watches) await watch.close();
    expect(await registry.metrics()).not.toContain('memcg:/jobs');
  });
});
