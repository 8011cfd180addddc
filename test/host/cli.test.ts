import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { expect, test } from 'vitest';
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
