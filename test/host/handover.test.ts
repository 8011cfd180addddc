import { expect, test } from 'vitest';
import { lowestPriority } from '../../src/index.js';
import { describeHost, type Job, MiB, useHost } from '../support/memcg.js';

describeHost("handing over to the kernel's own killer", () => {
  const newHost = useHost();

  test('by itself it takes the big important job', async () => {
    const host = newHost();
    host.make('', 256 * MiB);
    host.make('web');
    const big = await host.start('web', 'work --set 160MiB --scratch 1MiB');
    const small: Job[] = [];
    for (let index = 0; index < 8; index++) {
      host.make(`batch-${index}`);
      small.push(await host.start(`batch-${index}`, 'leak --chunk 256KiB --every 2ms', { gate: true }));
    }
    for (const job of small) job.go();
    await host.until(() => !big.alive(), 'the kernel kills');
    expect(big.child.signalCode).toBe('SIGKILL');
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
});
