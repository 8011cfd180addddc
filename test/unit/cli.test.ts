import { spawnSync } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { expect, test } from 'vitest';
import { type Findings, probeCapabilities } from '../../src/capabilities.js';
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

/** A machine where nothing is. */
const bare: Findings = {
  ...probeCapabilities(),
  memoryV1: null,
  cgroupV2: null,
  memcgs: null,
  v2: null,
  oomControl: false,
  eventControl: false,
  kernelReserve: false,
  freezer: null,
  psi: 'none',
  pidfd: false,
  mrelease: false,
  populate: false,
  guard: { path: null, whyNot: 'gone' },
  refuge: null,
  state: { directory: '/run/reprieve', writable: false },
  lockableBytes: 65536,
  held: [],
  lowersScore: false,
  swap: { total: 0, zram: 0 },
};
const able: Partial<Findings> = {
  pidfd: true,
  guard: { path: '/guard', whyNot: '' },
  state: { directory: '/run/reprieve', writable: true },
};
const v1 = { memcgs: 'v1', memoryV1: { point: '/sys/fs/cgroup/memory', writable: true } } as const;
const v2 = { memcgs: 'v2', cgroupV2: { point: '/sys/fs/cgroup', writable: true, memory: true } } as const;
const delegated = '/user.slice/user-1000.slice/user@1000.service';

test.each<[string, Partial<Findings>]>([
  ['without memory cgroups', {}],
  ['on v1', { ...v1, memoryV1: { point: '/sys/fs/cgroup/memory', writable: false } }],
  ['on v2', { ...v2, v2: { ground: null, limits: false, kill: false, oomGroup: false } }],
])('doctor tells every row with what its want costs and how to get it, %s', (_, found) => {
  const { rows, ready } = diagnose({ ...bare, ...found }, []);
  expect(ready).toBe(false);
  for (const row of rows.filter(({ name }) => name !== 'swap' && !(found.memcgs && name === 'memory cgroups'))) {
    expect(row, row.name).toMatchObject({
      ok: false,
      costs: expect.stringMatching(/\w/),
      fix: expect.stringMatching(/\w/),
    });
  }
});

test.each<[string, Partial<Findings>, object]>([
  ['nothing but processes', {}, { memcg: { by: null }, system: { by: 'processes', whileThinking: 'goes on' } }],
  [
    'v1',
    { ...v1, oomControl: true, eventControl: true, freezer: 'v1' },
    { memcg: { by: 'v1', whileThinking: 'waits' }, system: { by: 'v1', whileThinking: 'frozen' } },
  ],
  [
    'v1 that a container may only read',
    { ...v1, memoryV1: { point: '/sys/fs/cgroup/memory', writable: false } },
    { memcg: { by: null, lacks: ['cgroup v1 is mounted read-only here'] }, system: { by: 'v1' } },
  ],
  [
    'v1 without its event_control',
    { ...v1, oomControl: true },
    { memcg: { by: null, lacks: ['cgroup.event_control cannot be written'] } },
  ],
  [
    'v2',
    { ...v2, v2: { ground: '/' }, freezer: 'v2', held: ['CAP_KILL'], psi: 'any window', lowersScore: true },
    {
      memcg: { by: 'v2', whileThinking: 'throttled', lacks: [] },
      system: { by: 'v2', whileThinking: 'frozen', lacks: [] },
    },
  ],
  [
    'v2 of which a part was delegated',
    { ...v2, v2: { ground: delegated }, freezer: 'v2' },
    {
      memcg: {
        by: 'v2',
        whileThinking: 'throttled',
        lacks: expect.arrayContaining([expect.stringContaining(delegated)]),
      },
    },
  ],
  [
    'v2 that a container may only read',
    { ...v2, v2: { ground: null } },
    { memcg: { by: 'v2', whileThinking: 'goes on' }, system: { by: 'v2', whileThinking: 'goes on' } },
  ],
])('doctor says what can be watched: %s', (_, found, scopes) => {
  const report = diagnose({ ...bare, ...able, ...found }, []);
  expect(report.scopes).toMatchObject(scopes);
  expect(report.ready).toBe(true); // the machine can be watched anywhere
  expect(diagnose({ ...bare, ...able, ...found, pidfd: false }, []).ready).toBe(false);
});

test('what doctor says of swap', () => {
  const say = (swap: Findings['swap']) =>
    diagnose({ ...bare, swap }, []).rows.find(({ name }) => name === 'swap')?.found;
  expect(say({ total: 0, zram: 0 })).toMatch(/^none: /);
  expect(say({ total: 2 ** 30, zram: 2 ** 29 })).toMatch(/^1 GiB, 512 MiB of it zram, of which half counts: /);
});

test('doctor of this machine, as data and as text', () => {
  const here = reprieve('doctor', '--json');
  const report = JSON.parse(here.stdout);
  expect(report.version).toBe(1);
  expect(here.status).toBe(report.ready ? 0 : 1);
  expect(report.longestWaitMs).toEqual({ handler: 20_000, guard: 26_500 });
  const { stdout } = reprieve('doctor');
  expect(stdout).toMatch(/^'system' can be watched, by /m);
  expect(stdout).toMatch(
    /The longest that a task waits, with the default deadlines:\n {2}20 s while .*\n {2}26\.5 s if it is killed/,
  );
});

test('what the command line does not know is refused', () => {
  expect(reprieve('dmeo')).toMatchObject({ status: 1, stderr: expect.stringMatching(/Did you mean demo/) });
  expect(reprieve('demo', '--jsn')).toMatchObject({ status: 1, stderr: expect.stringMatching(/Did you mean --json/) });
});
