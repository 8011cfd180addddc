// What is refused, what is counted, and what a report tells.
import { setTimeout as sleep } from 'node:timers/promises';
import { expect } from 'vitest';
import { lowestPriority, OomHandler, renderReport } from '../../src/index.js';
import { MiB } from '../support/scene.js';
import { behaviour, different, impossible, onSystem, onV2 } from './behaviour.js';

/** Who waits is known where the kernel parks. */
const HELD = different('Nobody waits in the kernel: a step of the report says who was held, where jobs are.');
/** Why there is no signal that could be spurious. */
const LOOKED = impossible('No signal of the kernel says that memory is used up: that is looked for.');
const jobs = { web: { priority: 90 }, batch: { priority: 10 } };

behaviour(
  'bad-scope',
  'what is no scope is refused with a code of its own, and nothing is changed',
  {},
  async (env) => {
    await env.stage(64 * MiB, { web: 'hold --bytes 4MiB' });
    const isBack = env.remember();
    const handler = await env.handler();
    for (const [scope, code] of [
      ['memcg:/reprieve-test-is-not-there', env.missingScope],
      ['memcg:/', 'ERR_REPRIEVE_INVALID_SCOPE'],
      ['memcg:/../..', 'ERR_REPRIEVE_INVALID_SCOPE'],
      ['memcg:relative', 'ERR_REPRIEVE_INVALID_SCOPE'],
      ['everything', 'ERR_REPRIEVE_INVALID_SCOPE'],
      [undefined as never, 'ERR_REPRIEVE_INVALID_SCOPE'],
    ] as const) {
      await expect(handler.watch(scope, { policy: lowestPriority }), scope).rejects.toMatchObject({ code });
    }
    expect(handler.watches).toEqual([]);
    await isBack();
  },
);

behaviour('bad-options', 'an option of a wrong type or out of its range is refused by name', {}, async (env) => {
  await env.stage(64 * MiB, { web: 'hold --bytes 4MiB' });
  const isBack = env.remember();
  const handler = await env.handler();
  for (const [options, message] of [
    [{ policy: 'lowestPriority' }, /Expected the `policy` option to be a function/],
    [{ respondWithin: -1 }, /Expected the `respondWithin` option to be a time in milliseconds/],
    [{ handleWithin: '20s' }, /Expected the `handleWithin` option to be a time in milliseconds/],
    [{ maxVictims: 0 }, /Expected the `maxVictims` option to be a whole number above 0/],
    [{ fallback: ['kernel', lowestPriority] }, /Expected `fallback\[0\]` to be the last one/],
    [{ jobs: { web: { priority: 101 } } }, /Expected .*priority.* to be /],
    [{ reserve: '1GiB' }, /Expected the `reserve` option to be no more than the handler's/],
  ] as const) {
    const refused = handler.watch(env.scope, env.options({ policy: lowestPriority, ...options } as never));
    await expect(refused).rejects.toMatchObject({
      code: 'ERR_REPRIEVE_INVALID_ARGUMENT',
      message: expect.stringMatching(message),
    });
  }
  await expect(OomHandler.open({ reserve: 'much' } as never)).rejects.toMatchObject({
    code: 'ERR_REPRIEVE_INVALID_ARGUMENT',
  });
  expect(handler.watches).toEqual([]);
  await isBack();
});

behaviour(
  'watched-twice',
  'a scope that is watched is refused to a second watch, of this handler or another',
  {},
  async (env) => {
    await env.stage(64 * MiB, { web: 'hold --bytes 4MiB' });
    const { handler } = await env.watch({ policy: lowestPriority });
    const code = 'ERR_REPRIEVE_ALREADY_WATCHED';
    await expect(handler.watch(env.scope, env.options({}))).rejects.toMatchObject({ code });
    const other = await env.handler();
    await expect(other.watch(env.scope, env.options({}))).rejects.toMatchObject({ code });
    const elsewhere = await env
      .startHandler({}, 'process.on("exit", () => {});')
      .catch((error: Error) => error.message);
    expect(elsewhere).toMatch(/ended before it watched/);
    expect(handler.watches).toHaveLength(1);
    expect(other.watches).toEqual([]);
  },
);

behaviour(
  'report',
  'a report says who died and why, who lives and why, who waited, and when',
  { ...onV2(HELD), ...onSystem(HELD) },
  async (env) => {
    const { batch } = await env.stage(64 * MiB, { web: 'hold --bytes 16MiB', batch: env.leak });
    await env.watch({
      policy: async (snapshot) => {
        await new Promise((resolve) => setTimeout(resolve, 100));
        return lowestPriority(snapshot);
      },
      respondWithin: 2_000,
      jobs,
    });
    batch.go();
    const report = await env.report();
    expect(report).toMatchObject({ version: 1, owner: env.owner, scopes: [env.scope], outcome: 'cleared' });
    expect(report.snapshot?.usage).toBeGreaterThan(0);
    expect(report.decisions).toMatchObject([
      { action: 'kill', rung: 'policy', because: expect.stringMatching(/priority 10/) },
    ]);
    const { name, because } = report.victims[0] ?? {};
    expect([env.given(String(name)), because]).toEqual(['batch', expect.stringMatching(/priority 10 is the lowest/)]);
    const explained = report.explanation.join('\n');
    expect(explained).toMatch(/batch dies first/);
    expect(explained).toMatch(/web lives on/);
    const steps = report.steps.map(({ text }) => text).join('\n');
    if (env.parks) expect(report.waiters.map(({ job }) => env.given(job))).toContain('batch');
    else if (env.holds) expect(steps).toMatch(/holds .*batch/);
    const { snapshotUs, decidedUs, killedUs, deadUs, clearedUs, endedUs } = report.timings;
    const inOrder = [snapshotUs, decidedUs, killedUs, deadUs, endedUs].map(Number);
    expect(inOrder).toEqual([...inOrder].sort((a, b) => a - b));
    expect(decidedUs).toBeGreaterThanOrEqual(100_000);
    expect(clearedUs).toBeLessThanOrEqual(endedUs);
    expect(JSON.parse(JSON.stringify(report))).toEqual(report);
    expect(renderReport(report)).toMatch(/kills .*batch/);
  },
);

behaviour(
  'spurious',
  'a signal that finds nothing to handle is counted, and costs nobody',
  { ...onV2(LOOKED), ...onSystem(LOOKED) },
  async (env) => {
    const { web, batch } = await env.stage(64 * MiB, {
      web: 'hold --bytes 16MiB',
      batch: 'leak --delay 200 --every 0 --cap 64MiB',
    });
    const handler = await env.handler({ drill: false }); // which counts a signal that comes beside one of its own as that
    await handler.watch(env.scope, env.options({ policy: lowestPriority, jobs }));
    const before = handler.spurious;
    batch.go();
    await sleep(50);
    // Nothing of ours runs until there is room again.
    const end = Date.now() + 10_000;
    while (batch.stat('bytes') < 44 * MiB && Date.now() < end);
    const late = Date.now() + 100;
    while (Date.now() < late);
    env.write('', 'memory.limit_in_bytes', 128 * MiB);
    while (batch.stat('bytes') < 64 * MiB && Date.now() < end);
    await env.until(() => handler.spurious > before, 'it is counted');
    expect(env.acted).toEqual([]);
    expect([web.alive(), batch.alive()]).toEqual([true, true]);
  },
);
