// Who dies, and how.
import { setTimeout as sleep } from 'node:timers/promises';
import { expect } from 'vitest';
import { lowestPriority, type Policy } from '../../src/index.js';
import { type Job, MiB } from '../support/scene.js';
import { behaviour, different, onSystem } from './behaviour.js';

const priorities = { 'web*': { priority: 90 }, 'batch*': { priority: 10 } };

/** So slow that what it takes until a victim is dead is less than what then is left: else it is met once more, before its cap. */
const GROWS = 'leak --chunk 64KiB --every 1';

const OUTRUN = different("The kernel's killer is there all the time: it may be quicker, and takes the same job.");
const byUs = 'the only job that leaks dies by our SIGKILL, and not by the kernel';
behaviour('one-waiter', byUs, { v2: OUTRUN, ...onSystem(OUTRUN) }, async (env) => {
  const { batch } = await env.stage(48 * MiB, { batch: env.leak });
  await env.watch({ policy: lowestPriority });
  batch.go();
  const report = await env.report();
  await batch.gone;
  expect(batch.child.signalCode).toBe('SIGKILL');
  expect(report.owner).toBe(env.owner);
  expect([...new Set([...env.victims(report), ...env.kernelVictims(report)])]).toEqual(['batch']);
  if (env.kernelKills() > 0 && env.mayBeOutrun) return;
  expect(env.kernelKills()).toBe(0);
  expect(report).toMatchObject({ outcome: 'cleared', snapshot: { above: false } });
  expect(report.victims[0]?.pids).toEqual([batch.pid]);
  expect(report.victims[0]?.freed).toBeGreaterThan(30 * MiB);
});

behaviour(
  'many-waiters',
  'eight services stand still and go on undamaged; the job that leaks dies',
  {},
  async (env) => {
    const names = Array.from({ length: 8 }, (_, index) => `web-${index}`);
    const services = Object.fromEntries(names.map((name) => [name, 'work --set 6MiB --scratch 1MiB']));
    const staged: Record<string, Job> = await env.stage(128 * MiB, { ...services, batch: `${env.leak} --processes 4` });
    await env.watch({ policy: lowestPriority, jobs: priorities });
    staged.batch?.go();
    const report = await env.report();
    await staged.batch?.gone;
    expect(env.dead(report)).toEqual(['batch']);
    const jobs = names.map((name) => staged[name] as Job);
    const before = jobs.map((job) => job.stat('iterations'));
    const goOn = () => jobs.every((job, index) => job.stat('iterations') > (before[index] ?? 0) + 3);
    await env.until(goOn, 'every service goes on');
    for (const job of jobs) expect(job.stat('errors') - job.stat('refused')).toBe(0);
  },
);

behaviour('priority', 'a small job of low priority dies, and a large important one lives', {}, async (env) => {
  const jobs = { web: 'hold --bytes 40MiB', batch: 'hold --bytes 32MiB', grower: `${GROWS} --cap 48MiB` };
  const { web, batch, grower } = await env.stage(112 * MiB, jobs);
  await env.watch({ policy: lowestPriority, jobs: { ...priorities, grower: { priority: 50 } } });
  grower.go();
  const report = await env.report();
  expect(env.dead(report)).toEqual(['batch']);
  await batch.gone;
  expect([web.alive(), grower.alive()]).toEqual([true, true]);
  await env.until(() => grower.stat('bytes') === 48 * MiB, 'who needed the memory has it');
});

behaviour(
  'reservation',
  'a job above its reservation dies before a larger and less important one within its own',
  {},
  async (env) => {
    const jobs = { within: 'hold --bytes 44MiB', over: 'hold --bytes 32MiB', grower: `${GROWS} --cap 44MiB` };
    const { within, over, grower } = await env.stage(104 * MiB, jobs);
    await env.watch({
      policy: lowestPriority,
      jobs: {
        within: { priority: 40, reservation: '64MiB' },
        over: { priority: 60, reservation: '4MiB' },
        grower: { priority: 90, reservation: '200MiB' },
      },
    });
    grower.go();
    const report = await env.report();
    expect(env.dead(report)).toEqual(['over']);
    await over.gone;
    expect([within.alive(), grower.alive()]).toEqual([true, true]);
  },
);

behaviour('protected', 'a protected job is never taken, whatever its priority', {}, async (env) => {
  const { safe, batch } = await env.stage(64 * MiB, { safe: 'hold --bytes 24MiB', batch: env.leak });
  await env.watch({
    policy: lowestPriority,
    jobs: { safe: { priority: 0, protected: true }, batch: { priority: 100 } },
  });
  batch.go();
  expect(env.dead(await env.report())).toEqual(['batch']);
  await batch.gone;
  expect(safe.alive()).toBe(true);
});

behaviour('nested', 'a job dies whole, with all that is below it', {}, async (env) => {
  await env.bound(64 * MiB);
  for (const below of ['web', 'batch/one', 'batch/two/deep']) env.make(below);
  const web = await env.start('web', 'work --set 8MiB');
  const idle = await env.start('batch/one', 'hold --bytes 64KiB');
  const leak = await env.start('batch/two/deep', env.leak, { gate: true });
  await env.watch({ policy: lowestPriority, jobs: priorities });
  leak.go();
  const report = await env.report();
  await Promise.all([leak.gone, idle.gone]);
  expect(env.dead(report)).toEqual(['batch']);
  expect(report.victims[0]?.pids.toSorted()).toEqual([leak.pid, idle.pid].toSorted());
  expect(web.alive()).toBe(true);
});

const FORKS = different(
  'Forks take memory inside the kernel, past what holds tasks: the kernel may kill some of the job too.',
);
behaviour('fork', 'a job that forks while it is killed dies whole', { 'v2-hold': FORKS }, async (env) => {
  await env.bound(64 * MiB);
  for (const below of ['web', 'batch']) env.make(below);
  const web = await env.start('web', 'work --set 8MiB');
  // Without rseq, children born into a full memcg do not die of it by themselves.
  const rseq = { GLIBC_TUNABLES: 'glibc.pthread.rseq=0' };
  // And without a tie to their parent its death takes none of them with it: whoever is gone was killed.
  const words = 'fork --children 300 --bytes 512KiB --every 0 --outlive-parent';
  const bomb = await env.start('batch', words, { gate: true, env: rseq });
  await env.watch({ policy: lowestPriority, jobs: priorities });
  bomb.go();
  const report = await env.report();
  await bomb.gone;
  expect([...new Set([...env.victims(report), ...env.kernelVictims(report)])]).toEqual(['batch']);
  expect(report.victims[0]?.pids.length).toBeGreaterThan(1);
  await env.until(() => env.pids('batch').length === 0, 'all of it is gone');
  expect(web.alive()).toBe(true);
});

behaviour('slow-death', 'while a victim takes long to die, nobody else is picked', {}, async (env) => {
  const jobs = { web: 'work --set 8MiB', next: 'hold --bytes 32MiB', batch: `${env.leak} --chunk 4MiB` };
  const { web, next, batch } = await env.stage(400 * MiB, jobs);
  await env.watch({ policy: lowestPriority, jobs: { ...priorities, next: { priority: 20 } } });
  batch.go();
  const report = await env.report();
  expect(env.dead(report)).toEqual(['batch']);
  expect(report.victims[0]?.freed).toBeGreaterThan(300 * MiB);
  expect([next.alive(), web.alive()]).toEqual([true, true]);
});

behaviour('tmpfs', 'a job whose memory is tmpfs is no candidate, as that would stay', {}, async (env) => {
  const words = { files: `hold --file ${env.tmpfs()}/data --bytes 40MiB`, batch: env.leak };
  const { files, batch } = await env.stage(96 * MiB, words);
  await env.watch({ policy: lowestPriority, jobs: { files: { priority: 1 }, batch: { priority: 60 } } });
  batch.go();
  const report = await env.report();
  expect(env.dead(report)).toEqual(['batch']);
  expect(report.explanation.join('\n')).toMatch(/files is no candidate: .*tmpfs or page cache/);
  await batch.gone;
  expect(files.alive()).toBe(true);
});

behaviour('nothing-back', 'a kill that brings nothing back is said, and counts', {}, async (env) => {
  const words = { files: `hold --file ${env.tmpfs()}/data --bytes 40MiB`, batch: env.leak };
  const { batch } = await env.stage(96 * MiB, words);
  const stubborn: Policy = (snapshot) => {
    const files = snapshot.jobs.find(({ name, killed }) => env.given(name) === 'files' && !killed);
    return { action: 'kill', victim: files?.id ?? env.idIn(snapshot, 'batch'), because: 'files first' };
  };
  await env.watch({ policy: stubborn, maxVictims: 2 });
  batch.go();
  const report = await env.report();
  expect(env.victims(report)).toEqual(['files', 'batch']);
  expect(report.victims[0]?.freed).toBeLessThan(4 * MiB);
  expect(report.steps.map(({ text }) => text).join('\n')).toMatch(/files is dead, but its death brought back only/);
});

behaviour(
  'burst',
  'a burst as fast as the machine can give costs the job that bursts, and nobody else',
  {},
  async (env) => {
    const jobs = { web: 'work --set 16MiB --scratch 1MiB', batch: 'leak --every 0 --chunk 16MiB --processes 4' };
    const { web, batch } = await env.stage(160 * MiB, jobs);
    await env.watch({ policy: lowestPriority, jobs: priorities });
    batch.go();
    const report = await env.report();
    await batch.gone;
    expect([...env.victims(report), ...env.kernelVictims(report)]).toEqual(['batch']);
    const before = web.stat('iterations');
    await env.until(() => web.stat('iterations') > before, 'the service goes on');
    expect(web.stat('errors') - web.stat('refused')).toBe(0);
  },
);

behaviour('page-cache', 'a job that streams a file through the page cache opens no condition', {}, async (env) => {
  // On a machine MemAvailable leaves out half of the cache, up to the low watermarks: 27 MiB of what is read here.
  await env.bound(64 * MiB);
  for (const below of ['web', 'batch']) env.make(below);
  const file = env.largeFile(96 * MiB);
  const web = await env.start('web', 'work --set 8MiB');
  const stream = await env.start('batch', `stream --file ${file} --seconds 4`, { gate: true });
  const asked: string[] = [];
  const { handler } = await env.watch({
    policy: (snapshot) => {
      asked.push(snapshot.owner);
      return lowestPriority(snapshot);
    },
    jobs: priorities,
  });
  let froze = 0;
  stream.go();
  const end = Promise.race([stream.gone, sleep(20_000)]).then(() => 'end');
  while ((await Promise.race([end, sleep(10)])) !== 'end') froze += env.frozen().length;
  expect(stream.child.exitCode).toBe(0);
  expect(stream.stat('bytes')).toBeGreaterThan(68 * MiB); // more than the limit
  expect({ asked, froze, kills: env.kernelKills(), reports: env.reports.length }).toEqual({
    asked: [],
    froze: 0,
    kills: 0,
    reports: 0,
  });
  expect(web.alive()).toBe(true);
  expect(handler.watches).toHaveLength(1);
});
