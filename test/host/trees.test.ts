import { spawn } from 'node:child_process';
import { copyFileSync, readFileSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { expect, test } from 'vitest';
import { KernelPreference } from '../../src/action/kernel-preference.js';
import { ScoreRegister } from '../../src/action/scores.js';
import { findMemoryV1, readCgroupMounts } from '../../src/cgroup/mounts.js';
import { HierarchyV1 } from '../../src/cgroup/v1.js';
import { Victims } from '../../src/condition/victims.js';
import { workloadPath } from '../../src/native.js';
import type { LiveJob, TreeJob } from '../../src/snapshot/jobs.js';
import { pidsOf } from '../../src/snapshot/jobs.js';
import { MachineJobs } from '../../src/snapshot/machine.js';
import { JobRules } from '../../src/snapshot/settings.js';
import { describeHost, type Host, MiB, useHost } from '../support/memcg.js';

const point = findMemoryV1(readCgroupMounts())?.point ?? '';

/** The jobs of this machine; only those of the test are ever touched. */
function machine(host: Host, jobs: unknown, { memcgs = false } = {}) {
  const hierarchy = new HierarchyV1(point);
  const root = memcgs ? hierarchy.open('/') : null;
  const scores = new ScoreRegister(hierarchy);
  const found = new MachineJobs({
    hierarchy,
    root,
    rules: new JobRules(jobs),
    spared: () => new Set(),
    scoreBefore: (process) => scores.before(process),
    warn: (message) => expect.fail(message),
  });
  host.onClear(() => {
    found.close();
    root?.close();
    hierarchy.close();
  });
  return { hierarchy, jobs: found, scores };
}

function jobOf(jobs: MachineJobs, pid: number): LiveJob | undefined {
  return jobs.live().find((job) => pidsOf(job).includes(pid));
}

function isAlive(pid: number): boolean {
  try {
    return !/^\d+ \(.*\) [ZX]/s.test(readFileSync(`/proc/${pid}/stat`, 'latin1'));
  } catch {
    return false; // it is gone
  }
}

/** Kills a job as a condition does; resolves with its processes when all are dead. */
async function kill(host: Host, hierarchy: HierarchyV1, job: LiveJob): Promise<number[]> {
  const steps: string[] = [];
  const victims = new Victims(
    hierarchy,
    hierarchy.clock.nowUs(),
    () => {},
    (text) => void steps.push(text),
  );
  victims.kill(job, MiB, 'policy', null);
  await host.until(() => {
    victims.check();
    return victims.dying.length === 0;
  }, 'the death of the job');
  victims.close();
  return victims.records[0]?.pids ?? [];
}

describeHost('jobs of processes', () => {
  const newHost = useHost();

  test('by program, user, session and cgroup', async () => {
    const host = newHost();
    host.make();
    const [first, second] = [
      await host.start('', 'hold --bytes 8MiB --name rt-one'),
      await host.start('', 'hold --bytes 1MiB'),
    ];
    const args = ['--reuid', '12345', '--clear-groups', 'sleep', '30'];
    const others = [
      spawn('setpriv', args, { stdio: 'ignore' }),
      spawn('sleep', ['30'], { stdio: 'ignore', detached: true }),
    ];
    host.onClear(() => others.map((child) => child.kill('SIGKILL')));
    const [user, session] = others.map(({ pid }) => pid as number) as [number, number];
    const { jobs } = machine(host, [
      { match: { comm: 'rt-o*' }, name: 'one', priority: 10 },
      { match: { uid: 12345 }, priority: 20 },
      { match: { session }, protected: true },
      { match: { cgroup: host.path }, reservation: '1MiB' },
    ]);
    await host.until(() => jobOf(jobs, user)?.id === 'uid:12345', 'the user of a process');
    expect(jobOf(jobs, first.pid)).toMatchObject({ id: `tree:${first.pid}`, name: 'one', settings: { priority: 10 } });
    expect(jobOf(jobs, session)).toMatchObject({ id: `session:${session}`, settings: { protected: true } });
    const cgroup = { id: `cgroup:${host.path}`, name: host.name, settings: { reservation: MiB } };
    expect(jobOf(jobs, second.pid)).toMatchObject(cgroup);
    // This process, whose own job must not die, and those that nobody names.
    expect(jobs.live().every(({ id, settings }) => id !== 'tree:1' || settings.protected)).toBe(true);
    expect(jobs.live().flatMap(pidsOf)).not.toContain(2);
    const job = jobs.sample(new Set()).find(({ name }) => name === 'one');
    expect(job?.anon).toBeGreaterThan(8 * MiB);
    expect(job?.anon).toBeLessThan(24 * MiB);
  });

  test('a process that lost its parent stays in its job, and dies with it; its memory is counted', async () => {
    const host = newHost();
    const shell = `${host.directory}/rt-shell`;
    copyFileSync('/bin/sh', shell);
    const script = `"$0" -c 'setsid "$0" -c "sleep 40 & sleep 40" & sleep 0.7' "$0" & sleep 40`;
    const child = spawn(shell, ['-c', script, shell], { stdio: 'ignore', detached: true });
    const { hierarchy, jobs } = machine(host, [{ match: { exe: `${host.directory}/*` } }]);
    const job = () => jobs.find(`tree:${child.pid}`) as TreeJob;
    const members = () => {
      jobs.live();
      return job()?.tree.pids() ?? [];
    };
    await host.until(() => members().length >= 6, 'six processes');
    const all = members();
    await host.until(() => members().length <= all.length - 2, 'the death of those in between');
    expect(members().every((pid) => all.includes(pid))).toBe(true);
    const left = members();
    expect(left.length).toBeGreaterThanOrEqual(4);
    await kill(host, hierarchy, job());
    expect(left.filter(isAlive)).toEqual([]);
  });

  test('a fork bomb dies whole', async () => {
    const host = newHost();
    host.make('', 256 * MiB);
    const bomb = await host.start('', 'fork --bytes 64KiB --children 300 --every 1ms --name rt-bomb --outlive-parent');
    const { hierarchy, jobs } = machine(host, [{ match: { comm: 'rt-bomb' } }]);
    const size = () => (jobOf(jobs, bomb.pid) as TreeJob | undefined)?.tree.size ?? 0;
    await host.until(() => size() > 60, '60 processes');
    const pids = await kill(host, hierarchy, jobs.find(`tree:${bomb.pid}`) as LiveJob);
    expect(pids.length).toBeGreaterThan(60);
    expect(host.pids().filter(isAlive)).toEqual([]);
  });

  test('one that becomes another program late is known by that', async () => {
    const host = newHost();
    host.make('', 128 * MiB);
    const words = ['hold', '--bytes', '64KiB', '--name', 'rt-late', '--timeout', '30'];
    const late = spawn('sh', ['-c', 'read line; exec "$0" "$@"', workloadPath(), ...words], {
      stdio: ['pipe', 'ignore', 'inherit'],
    });
    try {
      host.write('', 'cgroup.procs', late.pid as number);
      const { jobs } = machine(host, [{ match: { comm: 'rt-late' }, priority: 7 }]);
      await sleep(2_500); // older than what is looked at again by itself
      jobs.refresh();
      expect(jobOf(jobs, late.pid as number)?.settings.priority).not.toBe(7);
      late.stdin.write('go\n');
      await host.until(() => {
        jobs.refresh();
        return jobOf(jobs, late.pid as number)?.settings.priority === 7;
      }, 'the rule');
    } finally {
      late.kill('SIGKILL');
    }
  });

  test('a number that is used again is another process', async () => {
    const host = newHost();
    host.make();
    const first = await host.start('', 'hold --bytes 1MiB --name rt-one');
    const { hierarchy, jobs } = machine(host, [{ match: { comm: 'rt-one' } }]);
    const job = jobOf(jobs, first.pid) as TreeJob;
    first.child.kill('SIGKILL');
    await first.gone;
    jobs.refresh();
    expect(jobs.sample(new Set()).some(({ id }) => id === job.id)).toBe(false);
    expect(jobs.find(job.id)).toBeUndefined();
    expect(await kill(host, hierarchy, job)).toEqual([]); // nobody is signalled, whoever has the number
  });

  test('scores are raised, hints are those of before, and all is put back, on children too', async () => {
    const host = newHost();
    host.make('', 128 * MiB);
    const bomb = await host.start('', 'fork --bytes 64KiB --children 400 --every 20ms --name rt-fork');
    const { jobs, scores } = machine(host, [{ match: { comm: 'rt-fork' }, priority: 0 }]);
    await host.until(() => jobOf(jobs, bomb.pid) !== undefined, 'the job');
    const job = jobOf(jobs, bomb.pid) as TreeJob;
    const preference = new KernelPreference(scores, null);
    // As if there were another job to prefer it to; of this machine's others none is touched.
    const other = { ...job, id: 'other' };
    const both = { live: () => [job, other], nurseryOf: () => ({ tree: job.tree }) } as never;
    const own = jobs.sample(new Set()).filter(({ id }) => id === job.id);
    preference.prepare([both], [...own, ...own.map((sampled) => ({ ...sampled, id: 'other', protected: true }))]);
    expect(host.scoreAdj(bomb.pid)).toBe(1000);
    const before = host.pids().length;
    await host.until(() => host.pids().length > before + 3, 'children that inherit it');
    bomb.child.kill('SIGSTOP'); // who is forked between the last look and the write to its parent is not seen
    preference.restoreAll();
    expect(host.pids().map((pid) => host.scoreAdj(pid))).toEqual(host.pids().map(() => 0));
  });
});

describeHost('jobs of memcgs', () => {
  const newHost = useHost();

  test('the topmost that hold processes, but those that a rule names, wherever they lie', async () => {
    const host = newHost();
    for (const below of ['slice/service/inner', 'slice/empty', 'mixed/named/inner']) host.make(below);
    const [service, inner, loose, named] = [
      await host.start('slice/service', 'hold --bytes 1MiB'),
      await host.start('slice/service/inner', 'hold --bytes 1MiB'),
      await host.start('mixed', 'hold --bytes 1MiB --name rt-loose'),
      await host.start('mixed/named/inner', 'hold --bytes 1MiB'),
    ];
    const rules = [{ match: { cgroup: `${host.path}/*/named` }, priority: 90 }, { match: { comm: 'rt-loose' } }];
    const { jobs } = machine(host, rules, { memcgs: true });
    const id = (pid: number) => jobOf(jobs, pid)?.id;
    expect([service, inner, named, loose].map(({ pid }) => id(pid))).toEqual([
      `${host.path}/slice/service`,
      `${host.path}/slice/service`,
      `${host.path}/mixed/named`,
      `tree:${loose.pid}`,
    ]);
    const ids = jobs.live().map((job) => job.id);
    expect(ids.filter((other) => other.startsWith(host.path))).toHaveLength(2);
    expect(jobs.live().some((job) => job.settings.from.includes('the handler lives in it'))).toBe(true);
    // One that is made later is known with the next look.
    host.make('slice/late');
    const late = await host.start('slice/late', 'hold --bytes 1MiB');
    await host.until(() => id(late.pid) === `${host.path}/slice/late`, 'the late one');
  });
});
