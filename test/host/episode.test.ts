import { setTimeout as sleep } from 'node:timers/promises';
import { expect, test } from 'vitest';
import { lowestPriority, type Policy } from '../../src/index.js';
import { describeHost, type Job, MiB, useHost } from '../support/memcg.js';

const never: Policy = () => new Promise(() => {});
const priorities = { 'web*': { priority: 90 }, 'batch*': { priority: 10 } };

describeHost('an episode on a real memcg', () => {
  const newHost = useHost();

  test('one waiter: the only job that leaks dies, by SIGKILL of ours and not of the kernel', async () => {
    const host = newHost();
    host.make('', 48 * MiB);
    host.make('batch');
    const batch = await host.start('batch', 'leak --every 0', { gate: true });
    await host.watch({ policy: lowestPriority });
    batch.go();
    const report = await host.report();
    expect(batch.alive()).toBe(false);
    expect(batch.child.signalCode).toBe('SIGKILL');
    expect(host.field('batch', 'memory.oom_control', 'oom_kill')).toBe(0);
    expect(report).toMatchObject({ owner: host.path, outcome: 'cleared', snapshot: { above: false, limit: 48 * MiB } });
    expect(report.victims).toMatchObject([{ name: 'batch', pids: [batch.pid], left: expect.any(Number) }]);
    expect(report.victims[0]?.freed).toBeGreaterThan(40 * MiB);
    const { faults, contextSwitches, collections } = report;
    const met = [faults?.minor, faults?.major, contextSwitches?.voluntary, contextSwitches?.involuntary].map(Number);
    expect(met.every((count) => Number.isInteger(count) && count >= 0)).toBe(true);
    expect(collections?.count).toBeGreaterThanOrEqual(0);
    expect(Number(collections?.us) > 0).toBe(Number(collections?.count) > 0);
    const { snapshotUs, decidedUs, killedUs, deadUs, clearedUs, endedUs } = report.timings;
    const inOrder = [snapshotUs, decidedUs, killedUs, deadUs, endedUs].map(Number);
    expect(inOrder).toEqual([...inOrder].sort((a, b) => a - b));
    expect(clearedUs).toBeLessThanOrEqual(endedUs);
    expect(host.field('', 'memory.oom_control', 'oom_kill_disable')).toBe(1);
  });

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

  test('many waiters: eight services wait and go on, the leak dies', async () => {
    const host = newHost();
    host.make('', 128 * MiB);
    const services: Job[] = [];
    for (let index = 0; index < 8; index++) {
      host.make(`web-${index}`);
      services.push(await host.start(`web-${index}`, 'work --set 6MiB --scratch 1MiB'));
    }
    host.make('batch');
    const batch = await host.start('batch', 'leak --every 0 --processes 4', { gate: true });
    await host.watch({ policy: lowestPriority, jobs: priorities });
    batch.go();
    const report = await host.report();
    await batch.gone;
    expect(report.victims.map(({ name }) => name)).toEqual(['batch']);
    const before = services.map((service) => service.stat('iterations'));
    await host.until(
      () => services.every((service, index) => service.stat('iterations') > (before[index] ?? 0) + 3),
      'every service goes on',
    );
    for (const service of services) expect(service.stat('errors') - service.stat('refused')).toBe(0);
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

  test('a nested job dies whole, with the memcgs below it', async () => {
    const host = newHost();
    host.make('', 64 * MiB);
    for (const below of ['batch/one', 'batch/two/deep', 'web']) host.make(below);
    const web = await host.start('web', 'work --set 8MiB');
    const idle = [await host.start('batch', 'hold --bytes 64KiB'), await host.start('batch/one', 'hold --bytes 64KiB')];
    const leak = await host.start('batch/two/deep', 'leak --every 0', { gate: true });
    await host.watch({ policy: lowestPriority, jobs: priorities });
    leak.go();
    const report = await host.report();
    await Promise.all([leak.gone, ...idle.map((job) => job.gone)]);
    expect(report.victims).toMatchObject([{ name: 'batch' }]);
    expect(report.victims[0]?.pids.toSorted()).toEqual([leak, ...idle].map(({ pid }) => pid).toSorted());
    expect(web.alive()).toBe(true);
  });

  test('a job that forks while it is killed dies whole', async () => {
    const host = newHost();
    host.make('', 64 * MiB);
    host.make('batch');
    host.make('web');
    const web = await host.start('web', 'work --set 8MiB');
    // Without rseq, children born into the full memcg do not die of it by themselves.
    const env = { GLIBC_TUNABLES: 'glibc.pthread.rseq=0' };
    const bomb = await host.start('batch', 'fork --children 300 --bytes 512KiB --every 0', { gate: true, env });
    await host.watch({ policy: lowestPriority, jobs: priorities });
    bomb.go();
    const report = await host.report();
    await bomb.gone;
    expect(report.victims.map(({ name }) => name)).toEqual(['batch']);
    expect(report.victims[0]?.pids.length).toBeGreaterThan(1);
    expect(host.pids('batch')).toEqual([]);
    expect(web.alive()).toBe(true);
  });

  test('a victim that takes long to die: no second one is picked meanwhile', async () => {
    const host = newHost();
    host.make('', 700 * MiB);
    for (const name of ['batch', 'next', 'web']) host.make(name);
    const next = await host.start('next', 'hold --bytes 32MiB');
    const web = await host.start('web', 'work --set 8MiB');
    const batch = await host.start('batch', 'leak --every 0 --chunk 4MiB', { gate: true });
    await host.watch({ policy: lowestPriority, jobs: { ...priorities, next: { priority: 20 } } });
    batch.go();
    const report = await host.report();
    expect(report.victims.map(({ name }) => name)).toEqual(['batch']);
    expect(report.victims[0]?.freed).toBeGreaterThan(600 * MiB);
    expect([next.alive(), web.alive()]).toEqual([true, true]);
  });

  test('a job on 40 MB of tmpfs is no candidate; the one that leaks dies though it is more important', async () => {
    const host = newHost();
    host.make('', 96 * MiB);
    host.make('files');
    host.make('batch');
    const files = await host.start('files', `hold --file ${host.tmpfs()}/data --bytes 40000000`);
    await host.until(() => host.field('files', 'memory.stat', 'total_shmem') > 39_000_000, 'the file is written');
    const batch = await host.start('batch', 'leak --every 0', { gate: true });
    await host.watch({ policy: lowestPriority, jobs: { files: { priority: 1 }, batch: { priority: 60 } } });
    batch.go();
    const report = await host.report();
    expect(report.victims.map(({ name }) => name)).toEqual(['batch']);
    expect(report.explanation.join('\n')).toMatch(/files is no candidate: .*tmpfs or page cache/);
    expect(files.alive()).toBe(true);
  });

  test('a kill that brings nothing back is said and counts', async () => {
    const host = newHost();
    host.make('', 96 * MiB);
    host.make('files');
    host.make('batch');
    await host.start('files', `hold --file ${host.tmpfs()}/data --bytes 40000000`);
    await host.until(() => host.field('files', 'memory.stat', 'total_shmem') > 39_000_000, 'the file is written');
    const batch = await host.start('batch', 'leak --every 0', { gate: true });
    const stubborn: Policy = ({ jobs }) => {
      const files = jobs.find(({ name, killed }) => name === 'files' && !killed);
      return { action: 'kill', victim: files?.id ?? `${host.path}/batch`, because: 'files first' };
    };
    await host.watch({ policy: stubborn, maxVictims: 2 });
    batch.go();
    const report = await host.report();
    expect(report.victims.map(({ name }) => name)).toEqual(['files', 'batch']);
    expect(report.victims[0]?.left).toBeGreaterThan(39_000_000);
    expect(report.victims[0]?.freed).toBeLessThan(4 * MiB);
    expect(report.steps.map(({ text }) => text).join('\n')).toMatch(/files is dead, but its death brought back only/);
  });

  test('a policy that never answers: the fallback kills after respondWithin', async () => {
    const host = newHost();
    host.make('', 64 * MiB);
    host.make('batch');
    host.make('web');
    const web = await host.start('web', 'work --set 16MiB');
    const batch = await host.start('batch', 'leak --every 0', { gate: true });
    await host.watch({ policy: never, respondWithin: 200, jobs: priorities });
    batch.go();
    const report = await host.report();
    expect(report).toMatchObject({ outcome: 'cleared', victims: [{ name: 'batch', rung: 'fallback 1' }] });
    expect(report.timings.killedUs).toBeGreaterThanOrEqual(200_000);
    expect(report.waiters.map(({ job }) => job)).toContain('batch');
    expect(web.alive()).toBe(true);
  });

  test('two conditions at once, in two memcgs', async () => {
    const host = newHost();
    host.make('');
    const jobs: Job[] = [];
    for (const name of ['one', 'two']) {
      host.make(name, 48 * MiB);
      host.make(`${name}/batch`);
      jobs.push(await host.start(`${name}/batch`, 'leak --every 0', { gate: true }));
    }
    const handler = await host.handler();
    const asked: string[] = [];
    const slow: Policy = async (snapshot) => {
      asked.push(snapshot.owner);
      await sleep(200);
      return lowestPriority(snapshot);
    };
    for (const name of ['one', 'two']) await handler.watch(`${host.scope}/${name}`, { policy: slow });
    for (const job of jobs) job.go();
    await host.report(2);
    expect(asked.toSorted()).toEqual([`${host.path}/one`, `${host.path}/two`]);
    expect(host.acted.map(({ owner, outcome }) => [owner, outcome]).toSorted()).toEqual([
      [`${host.path}/one`, 'cleared'],
      [`${host.path}/two`, 'cleared'],
    ]);
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

  test('iterating: the caller acts, with memory of the reserve', async () => {
    const host = newHost();
    host.make('', 64 * MiB);
    host.make('batch');
    host.make('web');
    const web = await host.start('web', 'hold --bytes 16MiB'); // gives nothing back: the condition is the caller's
    const batch = await host.start('batch', 'leak --every 0', { gate: true });
    const handler = await host.handler();
    const pending = handler.watch(host.scope, { jobs: priorities });
    await pending;
    batch.go();
    let lent = 0;
    for await (const condition of pending) {
      const snapshot = await condition.snapshot();
      using lease = condition.reserve.charge('64KiB');
      lent = lease.buffer.fill(1).reduce((sum, byte) => sum + byte, 0);
      const result = await condition.kill(lowestPriority(snapshot).victim);
      expect(result).toMatchObject({ job: `${host.path}/batch`, processes: 1, dead: true });
      break;
    }
    const report = await host.report();
    expect(report).toMatchObject({ victims: [{ name: 'batch', rung: 'caller' }], reserve: { maxCharged: 65536 } });
    expect(lent).toBe(65536);
    expect(handler.watches).toEqual([]);
    expect(web.alive()).toBe(true);
    expect(host.field('', 'memory.oom_control', 'oom_kill_disable')).toBe(0);
  });
});
