import { readFileSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { expect, test } from 'vitest';
import { lowestPriority } from '../../src/index.js';
import { describeHost, type Job, MiB, useHost } from '../support/memcg.js';

const priorities = { 'web*': { priority: 90 }, 'batch*': { priority: 10 } };

/** Nice value and policy of this thread (proc_pid_stat(5)): 2 is SCHED_RR. */
function scheduled(): { nice: number; policy: number } {
  const fields = readFileSync('/proc/self/stat', 'utf8').split(') ')[1]?.split(' ').map(Number) ?? [];
  return { nice: fields[16] ?? NaN, policy: fields[38] ?? NaN };
}

describeHost('an episode on a real memcg', () => {
  const newHost = useHost();

  test('the report tells what a policy cost that sleeps, touches new memory and allocates', async () => {
    const host = newHost();
    host.make('', 48 * MiB);
    host.make('batch');
    const batch = await host.start('batch', 'leak --every 0', { gate: true });
    let touched = 0;
    await host.watch({
      policy: (snapshot) => {
        Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 2);
        touched = Buffer.alloc(8 * MiB, 1).at(-1) ?? 0;
        const objects: object[] = [];
        for (let index = 0; index < 500_000; index++) objects[index % 100] = { index };
        return lowestPriority(snapshot);
      },
    });
    batch.go();
    const report = await host.report();
    expect(touched).toBe(1);
    expect(report.contextSwitches?.voluntary).toBeGreaterThanOrEqual(1);
    expect(report.faults?.minor).toBeGreaterThan(1000);
    expect(report.collections?.count).toBeGreaterThanOrEqual(1);
    expect(report.collections?.us).toBeGreaterThan(0);
  });

  test('only what is urgent is done at real-time priority', async () => {
    const host = newHost();
    host.make('', 48 * MiB);
    host.make('batch');
    const batch = await host.start('batch', 'leak --every 0', { gate: true });
    const handler = await host.handler({ drill: false });
    const urgent = handler.capabilities.scheduling?.got === 'realtime' ? 2 : 0;
    const seen: Record<string, ReturnType<typeof scheduled>> = { open: scheduled() };
    await handler.watch(host.scope, {
      policy: (snapshot) => {
        seen.deciding = scheduled();
        return lowestPriority(snapshot);
      },
    });
    handler.on('report', () => {
      seen.told = scheduled();
    });
    batch.go();
    await host.report();
    await sleep(100);
    seen.after = scheduled();
    const raised = expect.objectContaining({ policy: urgent });
    expect(seen).toEqual({ open: raised, deciding: raised, told: { nice: -20, policy: 0 }, after: raised });
  });

  test('without the drill the heap is left alone, and a job is killed all the same', async () => {
    const host = newHost();
    host.make('', 48 * MiB);
    host.make('batch');
    const batch = await host.start('batch', 'leak --every 0', { gate: true });
    const handler = await host.handler({ drill: false });
    expect(handler.capabilities.youngGeneration).toMatchObject({ bytes: 0, whyNot: expect.stringMatching(/drill/) });
    await handler.watch(host.scope, { policy: lowestPriority });
    batch.go();
    expect(await host.report()).toMatchObject({ outcome: 'cleared', victims: [{ name: 'batch' }] });
    await expect(host.handler({ fixedHeap: 1 as never })).rejects.toThrow(
      /Expected the `fixedHeap` option to be true or false/,
    );
    await expect(host.handler({ drill: 1 as never })).rejects.toThrow(
      /Expected the `drill` option to be true or false/,
    );
  });

  test('a parent with five watched children, two of them empty, loses one job and not five', async () => {
    const host = newHost();
    host.make('', 96 * MiB);
    const names = ['a', 'b', 'c', 'd', 'e'];
    for (const name of names) host.make(name);
    const jobs: Job[] = [];
    for (const name of ['a', 'b']) jobs.push(await host.start(name, 'hold --bytes 16MiB'));
    const leak = await host.start('c', 'leak --every 0', { gate: true });
    const { handler } = await host.watch({ policy: lowestPriority });
    for (const name of names) await handler.watch(`${host.scope}/${name}`, { policy: lowestPriority });
    leak.go();
    const report = await host.report();
    await sleep(500);
    expect(host.acted).toHaveLength(1);
    expect(report).toMatchObject({ owner: host.path, scopes: [host.scope], victims: [{ name: 'c' }] });
    expect(jobs.map((job) => job.alive())).toEqual([true, true]);
  });

  test('the limit above what is watched is hit: the watched jobs are all that may be touched', async () => {
    const host = newHost();
    host.make('', 64 * MiB);
    host.make('mine/batch');
    host.make('other');
    host.write('', 'memory.oom_control', 1); // somebody else holds the tasks there
    const other = await host.start('other', 'hold --bytes 20MiB');
    const batch = await host.start('mine/batch', 'leak --every 0', { gate: true });
    await host.watch({ policy: lowestPriority }, `${host.scope}/mine`);
    batch.go();
    const report = await host.report();
    expect(report).toMatchObject({ owner: host.path, outcome: 'cleared', snapshot: { above: true } });
    expect(report.snapshot?.jobs.map(({ name }) => name)).toEqual(['batch']);
    expect(other.alive()).toBe(true);
  });

  test('a flat memcg: its processes are the jobs', async () => {
    const host = newHost();
    host.make('', 64 * MiB);
    const web = await host.start('', 'work --set 16MiB --name web');
    const batch = await host.start('', 'leak --every 0 --name batch', { gate: true });
    await host.watch({ policy: lowestPriority, jobs: priorities });
    batch.go();
    const report = await host.report();
    expect(report.victims).toMatchObject([{ job: `pid:${batch.pid}`, name: 'batch' }]);
    expect(web.alive()).toBe(true);
  });

  test('a condition while the handler is busy is handled as soon as it is not', async () => {
    const host = newHost();
    host.make('', 48 * MiB);
    host.make('batch');
    const batch = await host.start('batch', 'leak --every 0', { gate: true });
    await host.watch({ policy: lowestPriority });
    batch.go();
    await sleep(1);
    const end = performance.now() + 500;
    while (performance.now() < end); // nothing of ours runs
    expect((await host.report()).outcome).toBe('cleared');
  });
});
