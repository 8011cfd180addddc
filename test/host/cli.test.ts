import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { expect, test } from 'vitest';
import type { DoctorReport } from '../../src/cli/doctor.js';
import { describeHost } from '../support/memcg.js';

const main = fileURLToPath(new URL('../../dist/cli/main.js', import.meta.url));
const point = '/sys/fs/cgroup/memory';

function demo(...args: string[]): ChildProcess & { text: () => string } {
  const child = spawn(process.execPath, [main, 'demo', ...args], { stdio: ['ignore', 'pipe', 'inherit'] });
  let text = '';
  child.stdout.on('data', (data) => {
    text += data;
  });
  return Object.assign(child, { text: () => text });
}

/** Processes in the demo's memcgs. */
function jobsOf(pid: number | undefined): number[] {
  const memcg = `${point}/reprieve-demo-${pid}`;
  if (!existsSync(memcg)) return [];
  return ['database', 'web', 'batch'].flatMap((job) => {
    const procs = `${memcg}/${job}/cgroup.procs`;
    return existsSync(procs) ? readFileSync(procs, 'utf8').split('\n').filter(Boolean).map(Number) : [];
  });
}

async function running(child: ChildProcess): Promise<void> {
  const end = Date.now() + 20_000;
  while (jobsOf(child.pid).length < 3) {
    if (Date.now() > end) throw new Error('the demo did not start its jobs');
    await sleep(5);
  }
}

/** What doctor says to who is shut in by unshare(1), which leaves nothing here when it ends. */
function doctorIn(unshare: string[], before: string) {
  const { stdout, status } = spawnSync(
    'unshare',
    [...unshare, 'sh', '-ec', `${before}exec "$@"`, 'sh', process.execPath, main, 'doctor', '--json'],
    { encoding: 'utf8', timeout: 40_000 },
  );
  const report = JSON.parse(stdout) as DoctorReport;
  const row = (name: string) => report.rows.find((row) => row.name === name);
  return { status, row, ...report };
}

describeHost('doctor of a container', () => {
  test('that may only read its cgroups: the machine can be watched, no memcg', () => {
    const doctor = doctorIn(['--mount'], `mount -o remount,bind,ro ${point}; `);
    expect(doctor.row('memory cgroups')).toMatchObject({ ok: true, found: `cgroup v1 at ${point}, read-only` });
    expect(doctor.row('memory.oom_control')).toMatchObject({ ok: false, weight: 'memcg' });
    expect(doctor.row('memcg of its own')).toMatchObject({ ok: false });
    expect(doctor.scopes).toMatchObject({ memcg: { by: null }, system: { by: 'v1' } });
    expect(doctor).toMatchObject({ ready: true, status: 0 });
  });

  test('that sees no cgroups: jobs are what processes have in common', () => {
    const doctor = doctorIn(['--mount'], 'umount -R /sys/fs/cgroup; ');
    expect(doctor.row('memory cgroups')).toMatchObject({ ok: false, found: 'not mounted' });
    expect(doctor.row('memory.oom_control')).toBeUndefined();
    expect(doctor.scopes).toMatchObject({ memcg: { by: null }, system: { by: 'processes', whileThinking: 'goes on' } });
    expect(doctor).toMatchObject({ ready: true, status: 0 });
  });

  test('whose root is one of a user namespace: what it holds there counts for its own processes only', () => {
    const doctor = doctorIn(['--user', '--map-root-user'], '');
    expect(doctor.row('CAP_KILL')).toMatchObject({ ok: true });
    expect(doctor.row('CAP_SYS_NICE')).toMatchObject({ ok: false });
    expect(doctor.row('oom_score_adj')).toMatchObject({ ok: false });
  });
});

describeHost('the demo on real memcgs', () => {
  for (const args of [[], ['--fallback']]) {
    test(`demo ${args.join(' ')}`.trim(), async () => {
      const child = demo(...args);
      const [status] = await once(child, 'exit');
      expect(child.text()).toMatch(/^On real memory cgroups: /);
      expect(child.text()).toMatch(/database: alive, stood still for .* at most; .* 0 wrong results/);
      expect(child.text()).toMatch(/The leak is gone, and the others went on\.\n$/);
      expect(status).toBe(0);
      expect(existsSync(`${point}/reprieve-demo-${child.pid}`)).toBe(false);
    });
  }

  test('SIGTERM in the middle of an episode: nothing is left', async () => {
    const child = demo('--fallback'); // half a second in which tasks wait
    await running(child);
    await sleep(300);
    child.kill('SIGTERM');
    expect((await once(child, 'exit'))[0]).toBe(143);
    expect(readdirSync(point).filter((name) => name.endsWith(`-${child.pid}`))).toEqual([]);
  });

  test('SIGKILL in the middle: the jobs die with it, and the next demo removes the memcgs', async () => {
    const child = demo('--fallback');
    await running(child);
    await sleep(300);
    child.kill('SIGKILL');
    await once(child, 'exit');
    const end = Date.now() + 20_000;
    while (jobsOf(child.pid).length > 0 && Date.now() < end) await sleep(5);
    expect(jobsOf(child.pid)).toEqual([]);
    await once(demo(), 'exit');
    expect(readdirSync(point).filter((name) => name.endsWith(`-${child.pid}`))).toEqual([]);
  });
});
