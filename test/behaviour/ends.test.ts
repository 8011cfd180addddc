// What comes to an end while it is needed: the handler, the watch, the scope.
import { setTimeout as sleep } from 'node:timers/promises';
import { expect } from 'vitest';
import { lowestPriority, type Policy } from '../../src/index.js';
import type { Job } from '../support/scene.js';
import { MiB } from '../support/scene.js';
import { behaviour, different, impossible, onSystem, onV2 } from './behaviour.js';
import type { Environment } from './environment.js';

/** Why it cannot be tried on the machine as a whole. */
const ONE = impossible('There is one machine, and one scope for it.');
const never: Policy = () => new Promise(() => {});
/** The policy of a handler in a process of its own: it says that it was asked, and does not answer. */
const ASKED = "policy = () => { say('asked'); return new Promise(() => {}); };";
const jobs = { web: { priority: 90 }, batch: { priority: 10 } };
const slow = { respondWithin: 5_000, clearWithin: 2_000, handleWithin: 10_000, jobs };
const service = (env: Environment) => ({ web: 'work --set 20MiB', batch: env.leak });

async function goesOn(env: Environment, job: Job): Promise<void> {
  const before = job.stat('iterations');
  await env.until(() => job.stat('iterations') > before + 1, 'the service goes on');
}

const RESTORES = different('The guard puts everything back, and the kernel takes the job.');

behaviour(
  'handler-killed',
  'a handler that is killed in a condition costs the right job only; everything is put back, and nobody hangs',
  { ...onV2(RESTORES), ...onSystem(RESTORES) },
  async (env) => {
    const { web, batch } = await env.stage(64 * MiB, service(env));
    const isBack = env.remember();
    const handler = await env.startHandler(slow, ASKED);
    batch.go();
    await env.until(() => handler.lines.includes('asked'), 'its policy is asked');
    handler.child.kill('SIGKILL');
    await Promise.all([handler.gone, batch.gone]);
    await isBack(handler);
    const record = await env.record();
    expect(record).toMatch(/reason died/);
    if (env.parks) {
      expect(record).toMatch(/kills .*batch.*page faults of the guard since it was ready: 0$/ms);
      expect(env.kernelKills()).toBe(0); // the guard's, and not the kernel's
    }
    await goesOn(env, web);
    expect(web.stat('errors') - web.stat('refused')).toBe(0);
  },
);

behaviour(
  'handler-stopped',
  'a handler that is stopped in a condition is taken over from, and does nothing more when it goes on',
  {
    v2: impossible('Nobody waits for the handler, so nothing is taken over: the kernel kills at the limit.'),
    'v2-hold': RESTORES,
    ...onSystem(RESTORES),
  },
  async (env) => {
    const { web, batch } = await env.stage(64 * MiB, service(env));
    const isBack = env.remember();
    const handler = await env.startHandler({ ...slow, respondWithin: 1_000, handleWithin: 3_000 }, ASKED);
    batch.go();
    await env.until(() => handler.lines.includes('asked'), 'its policy is asked');
    // Where it froze nobody yet nobody waits for it, and there is nothing to take over.
    if (!env.parks) await env.until(() => env.frozen().length > 0, 'it holds the job');
    handler.child.kill('SIGSTOP');
    await batch.gone;
    expect(await env.record()).toMatch(env.parks ? /reason silent.*kills .*batch/s : /reason silent/);
    await goesOn(env, web);
    handler.child.kill('SIGCONT');
    await env.until(() => handler.lines.some((line) => line.startsWith('revoked')), 'it is told');
    await sleep(200);
    // Where the kernel has killed meanwhile the condition may end by that before it is told.
    const ends = env.parks ? ['report revoked'] : ['report revoked', 'report kernel'];
    const [end, ...others] = handler.lines.filter((line) => line.startsWith('report'));
    expect(ends).toContain(end);
    expect(others).toEqual([]);
    await isBack(handler);
    await goesOn(env, web);
  },
);

behaviour(
  'closed-in-condition',
  'a watch that is closed in a condition leaves it to the kernel, which finds the right job; nobody hangs',
  {},
  async (env) => {
    const { web, batch } = await env.stage(64 * MiB, { web: 'hold --bytes 36MiB', batch: env.leak });
    const isBack = env.remember();
    let asked = false;
    const { watch } = await env.watch({
      policy: (snapshot, context) => {
        asked = true;
        return never(snapshot, context);
      },
      ...slow,
    });
    batch.go();
    await env.until(() => asked, 'the condition is open');
    await watch.close();
    expect((await env.report()).outcome).toBe('released');
    expect(watch.state).toBe('closed');
    await batch.gone;
    expect(web.alive()).toBe(true);
    expect(env.kernelKills()).toBe(1);
    await isBack();
  },
);

behaviour(
  'scope-removed',
  'a scope that is removed ends its watch, and the handler goes on',
  onSystem(ONE),
  async (env) => {
    await env.bound(64 * MiB);
    const scope = env.boundBelow('child', 32 * MiB);
    const handler = await env.handler();
    const vanished = new Promise((resolve) => handler.once('vanished', resolve));
    const watch = await handler.watch(scope, env.options({ policy: lowestPriority }));
    await env.removeBelow('child');
    expect(await vanished).toBe(scope);
    expect(watch.state).toBe('vanished');
    env.boundBelow('child', 32 * MiB); // another one of the same name
    env.make('child/batch');
    const batch = await env.start('child/batch', env.leak, { gate: true });
    await handler.watch(scope, env.options({ policy: lowestPriority }));
    batch.go();
    expect((await env.report()).victims).toHaveLength(1);
  },
);

behaviour('two-at-once', 'two conditions at once, in two scopes, are handled at once', onSystem(ONE), async (env) => {
  await env.bound(128 * MiB);
  const scopes = ['one', 'two'].map((name) => env.boundBelow(name, 48 * MiB));
  const leaks: Job[] = [];
  for (const name of ['one', 'two']) {
    env.make(`${name}/batch`);
    leaks.push(await env.start(`${name}/batch`, env.leak, { gate: true }));
  }
  const handler = await env.handler();
  let open = 0;
  let most = 0;
  const overlapping: Policy = async (snapshot) => {
    most = Math.max(most, ++open);
    await sleep(300);
    open--;
    return lowestPriority(snapshot);
  };
  const options = env.options({ policy: overlapping, respondWithin: 5_000 });
  for (const scope of scopes) await handler.watch(scope, options);
  for (const leak of leaks) leak.go();
  await env.report(2);
  expect(most).toBe(2);
  expect(env.acted.map(({ owner, outcome }) => [owner, outcome]).toSorted()).toEqual([
    [`${env.owner}/one`, 'cleared'],
    [`${env.owner}/two`, 'cleared'],
  ]);
  await Promise.all(leaks.map((leak) => leak.gone));
});

behaviour('close', 'what a watch has changed is put back when its handler is closed', {}, async (env) => {
  const { web, batch } = await env.stage(64 * MiB, service(env));
  env.setScoreAdj(batch.pid, 100);
  const isBack = env.remember();
  const { handler, watch } = await env.watch({ policy: lowestPriority, jobs });
  expect([env.scoreAdj(batch.pid), env.scoreAdj(web.pid)]).toEqual([1000, 0]); // prepared for the kernel's own choice
  await handler.close();
  expect(watch.state).toBe('closed');
  await isBack();
});
