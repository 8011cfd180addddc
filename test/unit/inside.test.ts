// A handler that lives in what it watches, on a simulated machine: when it is out, and what it is told.
import { expect, test } from 'vitest';
import { type Memcg, openDescendants } from '../../src/cgroup/cgroup.js';
import { SimulatedHierarchy, VirtualClock } from '../../src/cgroup/simulated.js';
import { OomHandler } from '../../src/handler.js';
import { lowestPriority, type Policy, type Report, type WatchOptions } from '../../src/index.js';
import { checkOwnMemcg, NO_OWN_MEMCG, type OwnMemcg } from '../../src/self/own-memcg.js';
import { simulatedGround } from '../../src/simulation.js';
import { JobRules } from '../../src/snapshot/settings.js';
import { MiB } from '../support/simulation.js';

const withCode = (code: string) => expect.objectContaining({ code });

/** A process that lives in /jobs/own and can step out of it. */
class Place implements OwnMemcg {
  use: OwnMemcg['use'] = 'step-out';
  path = '/jobs/own';
  refuge = '/refuge';
  whyNot: string | null = null;
  isOut = false;
  /** Why it cannot go back. */
  gone: string | null = null;
  moves: string[] = [];
  locate() {}
  stepOut() {
    this.isOut = true;
    this.moves.push('out');
  }
  stepBack() {
    if (!this.isOut || this.gone !== null) return this.gone;
    this.isOut = false;
    this.moves.push('back');
    return null;
  }
  fetchPrograms() {}
  drill() {}
  startOutside: OwnMemcg['startOutside'] = (start) => start();
  leave() {}
}

function inside(own: OwnMemcg) {
  const clock = new VirtualClock();
  const hierarchy = new SimulatedHierarchy(clock);
  const handler = OomHandler.over({ ...simulatedGround(hierarchy), own });
  const reports: Report[] = [];
  const warnings: string[] = [];
  handler.on('report', (report) => reports.push(report));
  handler.on('warning', (message) => warnings.push(message));
  hierarchy.make('/jobs', 64 * MiB);
  hierarchy.make('/jobs/own');
  const leak = hierarchy.spawn(hierarchy.make('/jobs/leak'), 'leak', 30 * MiB);
  return { clock, hierarchy, handler, reports, warnings, leak };
}

test('it is out before the policy is asked, and back when the condition has ended', async () => {
  const own = new Place();
  const { clock, hierarchy, handler, reports, leak } = inside(own);
  const asked: boolean[] = [];
  const policy: Policy = (snapshot) => {
    asked.push(own.isOut);
    return lowestPriority(snapshot);
  };
  await handler.watch('memcg:/jobs', { policy });
  expect(own.moves).toEqual([]);
  hierarchy.grow(leak, 40 * MiB);
  await clock.advance(100);
  expect(asked).toEqual([true]);
  expect(reports.map(({ outcome, victims }) => [outcome, victims.length])).toEqual([['cleared', 1]]);
  expect(reports[0]?.steps.map(({ text }) => text).join()).toMatch(/stepped out of \/jobs\/own in /);
  expect(own.moves).toEqual(['out', 'back']);
  await handler.close();
});

test('a condition of a memcg that does not hold it does not make it move', async () => {
  const own = new Place();
  const { clock, hierarchy, handler, reports } = inside(own);
  hierarchy.make('/other', 32 * MiB);
  const leak = hierarchy.spawn(hierarchy.make('/other/leak'), 'leak', 20 * MiB);
  for (const scope of ['memcg:/jobs', 'memcg:/other']) await handler.watch(scope, { policy: lowestPriority });
  hierarchy.grow(leak, 20 * MiB);
  await clock.advance(100);
  expect([reports.length, own.moves]).toEqual([1, []]);
  await handler.close();
});

test('it stays out while a second condition holds it, and while the limit is near', async () => {
  const own = new Place();
  const { clock, hierarchy, handler, reports, leak } = inside(own);
  hierarchy.make('/jobs/own', 16 * MiB);
  const inner = hierarchy.spawn(hierarchy.make('/jobs/own/leak'), 'inner', 4 * MiB);
  let answer = () => {};
  const slow: Policy = async (snapshot) => {
    await new Promise<void>((resolve) => {
      answer = resolve;
    });
    return lowestPriority(snapshot);
  };
  await handler.watch('memcg:/jobs/own', { policy: slow, respondWithin: 5_000 });
  await handler.watch('memcg:/jobs', { policy: lowestPriority });
  hierarchy.grow(inner, 20 * MiB);
  await clock.advance(100);
  hierarchy.grow(leak, 40 * MiB);
  await clock.advance(100);
  expect([reports.length, own.moves]).toEqual([1, ['out']]);
  const keep = hierarchy.spawn(hierarchy.make('/jobs/keep'), 'keep', 46 * MiB);
  answer();
  await clock.advance(100);
  expect([reports.length, own.moves]).toEqual([2, ['out', 'back']]);
  hierarchy.grow(keep, 14 * MiB);
  own.stepOut();
  await clock.advance(3_000);
  expect(own.isOut).toBe(true);
  await handler.close();
});

test('it says so once when it cannot go back', async () => {
  const own = new Place();
  const { clock, hierarchy, handler, warnings, leak } = inside(own);
  await handler.watch('memcg:/jobs', { policy: lowestPriority });
  own.stepBack = () => {
    own.use = 'moved';
    return 'it is gone';
  };
  hierarchy.grow(leak, 40 * MiB);
  await clock.advance(3_000);
  expect(warnings).toEqual(['The handler stays in /jobs/own: it is gone']);
  await handler.close();
});

test('without a way out, or a guard outside, the scope is refused and it says why', async () => {
  const place = { ...NO_OWN_MEMCG, path: '/jobs/own', whyNot: 'EROFS' };
  for (const own of [place, { ...place, refuge: '/refuge' }]) {
    const { handler } = inside(own);
    const refused = handler.watch('memcg:/jobs', { policy: lowestPriority });
    await expect(refused).rejects.toEqual(withCode('ERR_REPRIEVE_INSIDE_SCOPE'));
    await expect(refused).rejects.toThrow(/could not work there when it is full; it was not moved out: EROFS/);
    await handler.close();
  }
});

test.each([
  ['of a handler outside', '/elsewhere', true, /Expected a handler that lives in memcg:\/jobs for `raiseLimit`/],
  ['that is no boolean', '/jobs/own', 'yes', /Expected the `raiseLimit` option to be true or false, got "yes"/],
])('raiseLimit %s is refused', async (_, path, raiseLimit, message) => {
  const { handler, hierarchy } = inside(Object.assign(new Place(), { path }));
  const refused = handler.watch('memcg:/jobs', { policy: lowestPriority, raiseLimit } as WatchOptions);
  await expect(refused).rejects.toEqual(withCode('ERR_REPRIEVE_INVALID_ARGUMENT'));
  await expect(refused).rejects.toThrow(message);
  expect(hierarchy.held.size).toBe(0);
  await handler.close();
});

test('the `ownMemcg` option is checked', () => {
  expect([true, 'step-out', false].map(checkOwnMemcg)).toEqual(['moved', 'step-out', 'stays']);
  for (const wrong of ['out', 1, null, {}]) {
    expect(() => checkOwnMemcg(wrong)).toThrow(/Expected the `ownMemcg` option to be true, false or 'step-out', got/);
  }
});

test('a job that holds the handler is protected, whatever is said of it', () => {
  const hierarchy = new SimulatedHierarchy(new VirtualClock());
  for (const path of ['/jobs/own/deep', '/jobs/owner']) hierarchy.make(path);
  const root: Memcg = hierarchy.open('/jobs');
  const rules = new JobRules({ '*': { protected: false, priority: 10 } }, '/jobs/own');
  const found = openDescendants(root).map((memcg) => [memcg.path, rules.resolve({ name: 'job', memcg }).protected]);
  expect(Object.fromEntries(found)).toEqual({ '/jobs/own': true, '/jobs/own/deep': false, '/jobs/owner': false });
});
