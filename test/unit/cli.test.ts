import { spawnSync } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { expect, test } from 'vitest';
import { probeCapabilities } from '../../src/capabilities.js';
import { diagnose } from '../../src/cli/doctor.js';

const main = fileURLToPath(new URL('../../dist/cli/main.js', import.meta.url));

function reprieve(...args: string[]) {
  return spawnSync(process.execPath, [main, ...args], { encoding: 'utf8', timeout: 40_000 });
}

test('the demo in process says so in its first line, and ends well', () => {
  const { stdout, status } = reprieve('demo', '--simulate');
  expect(stdout.split('\n')[0]).toMatch(/^Simulated, in process: as you asked/);
  expect(stdout).toMatch(/batch dies first: its priority 10 is the lowest/);
  expect(stdout).toMatch(/web lives on: /);
  expect(stdout).toMatch(/The leak is gone, and the others went on\.\n$/);
  expect(status).toBe(0);
});

test('the demo as data', () => {
  const { stdout, status } = reprieve('demo', '--simulate', '--json', '--fallback');
  expect(status).toBe(0);
  const data = JSON.parse(stdout);
  expect(Object.keys(data)).toEqual([
    'version',
    'simulated',
    'condition',
    'snapshot',
    'decision',
    'action',
    'explanation',
    'timings',
    'faults',
    'contextSwitches',
    'collections',
    'jobs',
    'reserve',
  ]);
  expect(data).toMatchObject({
    simulated: true,
    condition: { outcome: 'cleared' },
    decision: { action: 'kill', rung: 'fallback 1' },
    action: { victims: [{ name: 'batch' }] },
    jobs: { database: { alive: true }, web: { alive: true }, batch: { alive: false } },
    faults: { minor: 0, major: 0 },
    contextSwitches: { voluntary: 0, involuntary: 0 },
    collections: { count: 0, us: 0 },
  });
  expect(data.timings.killedUs).toBeGreaterThanOrEqual(500_000);
});

test('doctor tells every row with what its want costs and how to get it', () => {
  const bare = diagnose(
    {
      ...probeCapabilities(),
      memoryV1: null,
      cgroupV2: null,
      oomControl: false,
      eventControl: false,
      kernelReserve: false,
      freezer: false,
      psi: 'none',
      pidfd: false,
      mrelease: false,
      populate: false,
      guard: { path: null, whyNot: 'gone' },
      refuge: false,
      state: { directory: '/run/reprieve', writable: false },
      lockableBytes: 65536,
      held: [],
    },
    [],
  );
  expect(bare.ready).toBe(false);
  for (const row of bare.rows) {
    expect(row, row.name).toMatchObject({
      ok: false,
      costs: expect.stringMatching(/\w/),
      fix: expect.stringMatching(/\w/),
    });
  }
  const here = reprieve('doctor', '--json');
  const report = JSON.parse(here.stdout);
  expect(report.rows.map(({ name }: { name: string }) => name)).toEqual(bare.rows.map(({ name }) => name));
  expect(here.status).toBe(report.ready ? 0 : 1);
  expect(report.longestWaitMs).toEqual({ handler: 20_000, guard: 26_500 });
  expect(reprieve('doctor').stdout).toMatch(
    /The longest that a task waits, with the default deadlines:\n {2}20 s while .*\n {2}26\.5 s if it is killed/,
  );
});

test('what the command line does not know is refused', () => {
  expect(reprieve('dmeo')).toMatchObject({ status: 1, stderr: expect.stringMatching(/Did you mean demo/) });
  expect(reprieve('demo', '--jsn')).toMatchObject({ status: 1, stderr: expect.stringMatching(/Did you mean --json/) });
});
