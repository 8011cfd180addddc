// What a policy, or a caller, may do, and what happens where it does not.
import { setPriority } from 'node:os';
import { setTimeout as sleep } from 'node:timers/promises';
import { expect } from 'vitest';
import { lowestPriority, type OomCondition, type Policy } from '../../src/index.js';
import { type Job, MiB } from '../support/scene.js';
import { behaviour, different, impossible } from './behaviour.js';
import type { Environment } from './environment.js';

/** What takes its time is not waited for where nobody is held. */
const UNHELD = { v2: impossible('Nobody is held at the limit: by the time of the answer the kernel may have chosen.') };
const PREPARED = { v2: different('The kernel may choose first, among the jobs as they were prepared.') };

const never: Policy = () => new Promise(() => {});
const jobs = { web: { priority: 90 }, batch: { priority: 10 } };

/** A service beside a job that leaks until the scope is out of memory. */
const leaking = (env: Environment) => env.stage(64 * MiB, { web: 'hold --bytes 16MiB', batch: env.leak });

for (const [id, what, policy] of [
  [
    'throws',
    'throws',
    () => {
      throw new Error('broken');
    },
  ],
  ['rejects', 'rejects', () => Promise.reject(new Error('broken'))],
  ['nonsense', 'answers nonsense', () => 'kill them all' as never],
  ['no-job', 'names a job that is not there', () => ({ action: 'kill', victim: '/nobody', because: 'why not' })],
] satisfies [string, string, Policy][]) {
  const sentence = `a policy that ${what} has lost its turn: the next rung acts, and the report has a line on it`;
  behaviour(`policy-${id}`, sentence, id === 'rejects' ? UNHELD : {}, async (env) => {
    const { web, batch } = await leaking(env);
    await env.watch({ policy, jobs });
    batch.go();
    const report = await env.report();
    expect(report).toMatchObject({ outcome: 'cleared', victims: [{ rung: 'fallback 1' }] });
    expect(env.victims(report)).toEqual(['batch']);
    const lost = report.steps.filter(({ rung, text }) => rung === 'policy' && !text.startsWith('holds '));
    expect(lost).toHaveLength(1);
    expect(web.alive()).toBe(true);
  });
}

behaviour('policy-protected', 'a policy that names a protected job is refused, and the job lives', {}, async (env) => {
  const { web, batch } = await leaking(env);
  await env.watch({
    policy: (snapshot) => ({ action: 'kill', victim: env.idIn(snapshot, 'web'), because: 'why not' }),
    jobs: { ...jobs, web: { protected: true } },
  });
  batch.go();
  const report = await env.report();
  expect(env.victims(report)).toEqual(['batch']);
  expect(report.steps.map(({ text }) => text).join('\n')).toMatch(/web is protected/);
  expect(web.alive()).toBe(true);
});

behaviour(
  'policy-silent',
  'a policy that never answers: the fallback kills after respondWithin',
  UNHELD,
  async (env) => {
    const { web, batch } = await leaking(env);
    await env.watch({ policy: never, respondWithin: 200, jobs });
    batch.go();
    const report = await env.report();
    expect(report).toMatchObject({ outcome: 'cleared', victims: [{ rung: 'fallback 1' }] });
    expect(env.victims(report)).toEqual(['batch']);
    expect(report.timings.killedUs).toBeGreaterThanOrEqual(200_000);
    expect(web.alive()).toBe(true);
  },
);

behaviour('policy-slow', 'while a policy takes its time, tasks wait and nobody dies', UNHELD, async (env) => {
  const { web, batch } = await leaking(env);
  const bytes: number[] = [];
  const kills: number[] = [];
  await env.watch({
    policy: async (snapshot) => {
      await sleep(100); // a task inside a system call comes to a stop only when that is over
      for (const ms of [0, 300]) {
        await sleep(ms);
        bytes.push(batch.stat('bytes'));
        kills.push(env.kernelKills());
      }
      return lowestPriority(snapshot);
    },
    respondWithin: 2_000,
    jobs,
  });
  batch.go();
  const report = await env.report();
  expect(bytes[1]).toBe(bytes[0]);
  expect(kills).toEqual([0, 0]);
  expect(report).toMatchObject({ outcome: 'cleared', victims: [{ rung: 'policy' }] });
  expect(env.victims(report)).toEqual(['batch']);
  expect(web.alive()).toBe(true);
});

behaviour('wait', 'a policy that waits is asked again, within clearWithin in all', UNHELD, async (env) => {
  const { web, batch } = await leaking(env);
  let asked = 0;
  const patient: Policy = (snapshot) =>
    ++asked < 3 ? { action: 'wait', ms: 100, because: 'perhaps it comes back' } : lowestPriority(snapshot);
  await env.watch({ policy: patient, jobs });
  batch.go();
  const report = await env.report();
  expect(asked).toBe(3);
  expect(report).toMatchObject({ outcome: 'cleared', victims: [{ rung: 'policy' }] });
  expect(report.timings.killedUs).toBeGreaterThanOrEqual(200_000);
  expect(env.victims(report)).toEqual(['batch']);
  expect(web.alive()).toBe(true);
});

behaviour(
  'handle-within',
  'handleWithin bounds a ladder on which nothing answers; the kernel is last',
  UNHELD,
  async (env) => {
    const { web, batch } = await leaking(env);
    await env.watch({ policy: never, fallback: [never, never], respondWithin: 10_000, handleWithin: 400, jobs });
    batch.go();
    const report = await env.report();
    await batch.gone;
    expect(report.outcome).toBe('kernel');
    expect(report.steps.map(({ text }) => text).join('\n')).toMatch(/400 ms of handleWithin are over/);
    expect(env.kernelKills()).toBeGreaterThan(0);
    expect(web.alive()).toBe(true);
  },
);

behaviour('max-victims', 'maxVictims bounds what a condition costs, whatever a policy answers', UNHELD, async (env) => {
  // So little that the leak has it at once.
  const words = { a: 'hold --bytes 64KiB', b: 'hold --bytes 64KiB', c: 'hold --bytes 64KiB', leak: env.leak };
  const { leak } = await env.stage(96 * MiB, words);
  setPriority(leak.pid, -15); // and also on a machine that is busy
  const unlucky: Policy = (snapshot) => {
    const victim = snapshot.jobs.find(({ name, killed }) => ['a', 'b', 'c'].includes(env.given(name)) && !killed);
    return { action: 'kill', victim: victim?.id ?? 'none', because: 'anybody but the leak' };
  };
  await env.watch({ policy: unlucky, fallback: ['kernel'], maxVictims: 2, jobs: { leak: { priority: 1 } } });
  leak.go();
  const report = await env.report();
  await leak.gone;
  expect(report.outcome).toBe('kernel');
  expect(report.victims).toHaveLength(2);
  // Where nobody parks another may run into the end before the leak's memory is back.
  if (env.parks) expect(env.kernelVictims(report)).toEqual(['leak']);
  else expect(env.kernelVictims(report)).toContain('leak');
});

behaviour(
  'hand-over',
  'handing over, the kernel takes a small job of low priority, and not the big one that it would take by itself',
  PREPARED,
  async (env) => {
    const names = ['batch-0', 'batch-1', 'batch-2', 'batch-3'];
    const leaks = Object.fromEntries(names.map((name) => [name, 'leak --chunk 256KiB --every 2ms']));
    const staged: Record<string, Job> = await env.stage(128 * MiB, { web: 'hold --bytes 80MiB', ...leaks });
    const isBack = env.remember();
    const { handler } = await env.watch({
      policy: never,
      respondWithin: 100,
      fallback: ['kernel'],
      jobs: { web: { priority: 90 }, 'batch-*': { priority: 10 } },
    });
    for (const name of names) staged[name]?.go();
    const report = await env.report();
    expect(report).toMatchObject({ outcome: 'kernel', victims: [] });
    expect(env.kernelVictims(report).length).toBeGreaterThan(0);
    for (const name of env.kernelVictims(report)) expect(name).toMatch(/^batch-/);
    expect(staged.web?.alive()).toBe(true);
    await handler.close();
    await isBack();
  },
);

/** Takes the first condition of the scope, and says what became of what is done with it. */
async function iterate<Result>(env: Environment, act: (condition: OomCondition) => Promise<Result>) {
  const { web, batch } = await leaking(env);
  const handler = await env.handler();
  const pending = handler.watch(env.scope, env.options({ jobs }));
  await pending;
  batch.go();
  for await (const condition of pending) {
    const result = await act(condition);
    const report = await condition.closed;
    return { result, report, web, batch, handler };
  }
  throw new Error('the watch ended without a condition');
}

behaviour('iterate-kill', 'iterating, the caller kills, with memory of the reserve', UNHELD, async (env) => {
  const { result, report, web, batch, handler } = await iterate(env, async (condition) => {
    const snapshot = await condition.snapshot();
    using lease = condition.reserve.charge('64KiB');
    const lent = lease.buffer.fill(1).reduce((sum, byte) => sum + byte, 0);
    return { lent, ...(await condition.kill(lowestPriority(snapshot).victim as string)) };
  });
  expect(result).toMatchObject({ lent: 65536, processes: 1, dead: true });
  expect(report).toMatchObject({ outcome: 'cleared', victims: [{ rung: 'caller' }], reserve: { maxCharged: 65536 } });
  expect(env.victims(report)).toEqual(['batch']);
  await batch.gone;
  expect(web.alive()).toBe(true);
  expect(handler.watches).toEqual([]);
});

behaviour(
  'iterate-wait',
  'iterating, the caller puts its deadline off by waiting, and kills then',
  UNHELD,
  async (env) => {
    const { report, web } = await iterate(env, async (condition) => {
      await condition.wait(2_000); // resolves at once: it is its turn that lasts longer
      await sleep(800);
      await condition.kill(lowestPriority(await condition.snapshot()).victim as string);
    });
    expect(env.victims(report)).toEqual(['batch']);
    expect(report.timings.killedUs).toBeGreaterThanOrEqual(800_000);
    expect(web.alive()).toBe(true);
  },
);

behaviour(
  'iterate-hand-over',
  'iterating, the caller hands over to the kernel, which takes the right job',
  PREPARED,
  async (env) => {
    const { report, web, batch } = await iterate(env, async (condition) => {
      await condition.handOver();
    });
    await batch.gone;
    expect(report).toMatchObject({ outcome: 'kernel', victims: [] });
    expect(env.kernelVictims(report)).toEqual(['batch']);
    expect(web.alive()).toBe(true);
  },
);

behaviour(
  'iterate-late',
  'iterating, what comes after respondWithin is refused, and the ladder has acted',
  UNHELD,
  async (env) => {
    const { batch } = await leaking(env);
    const handler = await env.handler();
    const pending = handler.watch(env.scope, env.options({ jobs, respondWithin: 100 }));
    await pending;
    batch.go();
    for await (const condition of pending) {
      const report = await condition.closed;
      await expect(condition.kill('whoever')).rejects.toMatchObject({ code: 'ERR_REPRIEVE_CONDITION_CLOSED' });
      expect(env.victims(report)).toEqual(['batch']);
      expect(report.victims[0]?.rung).toBe('fallback 1');
      break;
    }
  },
);
