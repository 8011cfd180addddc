import { expect, test } from 'vitest';
import { lowestPriority, type Policy } from '../../src/index.js';
import { describeHost, type Host, type Job, MiB, useHost } from '../support/memcg.js';

const never: Policy = () => new Promise(() => {});
const LEAKERS = 8;

/** Eight small leakers beside one big important job: by size alone the kernel takes the important one. */
async function bigAndSmall(host: Host): Promise<{ big: Job; small: Job[] }> {
  host.make('', 256 * MiB);
  host.make('web');
  const big = await host.start('web', 'work --set 160MiB --scratch 1MiB');
  const small: Job[] = [];
  for (let index = 0; index < LEAKERS; index++) {
    host.make(`batch-${index}`);
    small.push(await host.start(`batch-${index}`, 'leak --chunk 256KiB --every 2ms', { gate: true }));
  }
  return { big, small };
}

function scores(job: Job, host: Host, below: string): number[] {
  expect(host.pids(below)).toContain(job.pid);
  return host.pids(below).map(host.scoreAdj);
}

describeHost("handing over to the kernel's own killer", () => {
  const newHost = useHost();

  test('by itself it takes the big important job', async () => {
    const host = newHost();
    const { big, small } = await bigAndSmall(host);
    for (const job of small) job.go();
    await host.until(() => !big.alive(), 'the kernel kills');
    expect(big.child.signalCode).toBe('SIGKILL');
  });

  test('prepared, it takes a leaker; what was prepared and armed is put back', async () => {
    const host = newHost();
    const { big, small } = await bigAndSmall(host);
    const jobs = { web: { priority: 90 }, 'batch-*': { priority: 10 } };
    const { handler } = await host.watch({ policy: never, respondWithin: 100, fallback: ['kernel'], jobs });
    expect(scores(small[0] as Job, host, 'batch-0')).toEqual([1000]);
    expect(scores(big, host, 'web')).toEqual([0]);
    for (const job of small) job.go();
    const report = await host.report();
    expect(report.outcome).toBe('kernel');
    expect(report.victims).toEqual([]);
    expect(report.kernelVictims.length).toBeGreaterThan(0);
    for (const { job } of report.kernelVictims) expect(job).toMatch(/^batch-/);
    expect(big.alive()).toBe(true);
    await host.until(() => host.field('', 'memory.oom_control', 'oom_kill_disable') === 1, 'armed again');
    await handler.close();
    expect(host.field('', 'memory.oom_control', 'oom_kill_disable')).toBe(0);
    for (let index = 0; index < LEAKERS; index++) {
      for (const pid of host.pids(`batch-${index}`)) expect(host.scoreAdj(pid)).toBe(0);
    }
  });

  test('the watch is closed while a condition is open: the kernel takes a leaker, nobody stays parked', async () => {
    const host = newHost();
    const { big, small } = await bigAndSmall(host);
    const abort = new AbortController();
    const handler = await host.handler();
    let asked = false;
    const watch = await handler.watch(host.scope, {
      policy: (snapshot, context) => {
        asked = true;
        return never(snapshot, context);
      },
      respondWithin: 60_000,
      handleWithin: 60_000,
      jobs: { web: { priority: 90 }, 'batch-*': { priority: 10 } },
      signal: abort.signal,
    });
    for (const job of small) job.go();
    await host.until(() => asked, 'the condition is open');
    abort.abort();
    expect((await host.report()).outcome).toBe('released');
    await watch.close();
    expect(host.field('', 'memory.oom_control', 'oom_kill_disable')).toBe(0);
    await host.until(() => small.some((job) => !job.alive()), 'the kernel kills');
    expect(big.alive()).toBe(true);
  });

  test('processes born while their parents are raised inherit that, and get the original back', async () => {
    const host = newHost();
    host.make('', 128 * MiB);
    host.make('batch');
    const batch = await host.start('batch', 'fork --children 6 --bytes 64KiB --every 300ms', { gate: true });
    host.setScoreAdj(batch.pid, 100);
    host.make('web');
    const { handler } = await host.watch({ policy: lowestPriority, jobs: { batch: { priority: 10 } } });
    expect(host.scoreAdj(batch.pid)).toBe(1000);
    batch.go();
    await host.until(() => host.pids('batch').length >= 4, 'children are born');
    const born = host.pids('batch');
    await handler.close();
    for (const pid of born) expect([pid, host.scoreAdj(pid)]).toEqual([pid, 100]);
  });

  test('a process that leaves a raised job gets its own value back; a job that nobody competes with is not raised', async () => {
    const host = newHost();
    host.make('', 128 * MiB);
    for (const name of ['batch', 'web']) host.make(name);
    const moved = await host.start('batch', 'hold --bytes 1MiB');
    const { handler } = await host.watch({ policy: lowestPriority, jobs: { batch: { priority: 10 } } });
    expect(host.scoreAdj(moved.pid)).toBe(1000);
    host.write('web', 'cgroup.procs', moved.pid);
    await host.until(() => host.scoreAdj(moved.pid) === 0, 'it is put back where it is now');
    await handler.watch(`${host.scope}/web`, { policy: lowestPriority });
    expect(host.scoreAdj(moved.pid)).toBe(0);
  });

  test('handleWithin bounds a ladder on which nothing answers', async () => {
    const host = newHost();
    host.make('', 48 * MiB);
    host.make('batch');
    const batch = await host.start('batch', 'leak --every 0', { gate: true });
    await host.watch({ policy: never, fallback: [never, never], respondWithin: 10_000, handleWithin: 400 });
    batch.go();
    const report = await host.report();
    await batch.gone;
    expect(report.outcome).toBe('kernel');
    expect(report.steps.map(({ text }) => text).join('\n')).toMatch(/400 ms of handleWithin are over/);
  });

  test('the processes that a policy spares to the end are the kernel’s in the end: maxVictims', async () => {
    const host = newHost();
    host.make('', 96 * MiB);
    for (const name of ['a', 'b', 'c', 'leak']) host.make(name);
    for (const name of ['a', 'b', 'c']) await host.start(name, 'hold --bytes 64KiB'); // so little that the leak has it at once
    const leak = await host.start('leak', 'leak --every 0', { gate: true });
    const unlucky: Policy = ({ jobs }) => {
      const victim = jobs.find(({ name, killed }) => name !== 'leak' && !killed);
      return { action: 'kill', victim: victim?.id ?? 'none', because: 'anybody but the leak' };
    };
    await host.watch({ policy: unlucky, fallback: ['kernel'], maxVictims: 2, jobs: { leak: { priority: 1 } } });
    leak.go();
    const report = await host.report();
    await leak.gone;
    expect(report.outcome).toBe('kernel');
    expect(report.victims.map(({ name }) => name)).toHaveLength(2);
    expect(report.kernelVictims.map(({ job }) => job)).toEqual(['leak']);
  });
});
