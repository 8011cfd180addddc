/**
 * What the code leans on, tried on the kernel that is there: one fact a test. Facts of single native classes are tried
 * in native/test. "memory.rst" is Documentation/admin-guide/cgroup-v1/memory.rst of the kernel.
 */
import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, mkdirSync, readFileSync, rmdirSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { constants, cpus } from 'node:os';
import { dirname } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterEach, beforeEach, expect, onTestFinished, test } from 'vitest';
import type { TreeChange } from '../../src/cgroup/cgroup.js';
import { findMemoryV1, readCgroupMounts } from '../../src/cgroup/mounts.js';
import { HierarchyV1 } from '../../src/cgroup/v1.js';
import { native, workloadPath } from '../../src/native.js';
import { isAtLimit } from '../../src/source/owner.js';
import { describeHost, type Host, type Job, MiB, useHost } from '../support/memcg.js';

const NOBODY = 65534;
const PARKED = 'mem_cgroup_oom_synchronize';
const point = findMemoryV1(readCgroupMounts())?.point ?? '';

const proc = (pid: number, name: string) => readFileSync(`/proc/${pid}/${name}`, 'utf8');
const isParked = (job: Job) => proc(job.pid, 'wchan') === PARKED;
const oom = (host: Host, below: string, key: string) => host.field(below, 'memory.oom_control', key);
const usage = (host: Host, below: string) => Number(host.read(below, 'memory.usage_in_bytes'));

/** Writes one byte more than there is room for, in a memcg that waits; resolves when the job does. */
async function park(host: Host, args = 'leak --every 0', limit = 48 * MiB): Promise<Job> {
  host.make('', limit);
  host.write('', 'memory.oom_control', 1);
  const job = await host.start('', args);
  await host.until(() => isParked(job), 'the task waits');
  return job;
}

async function killedByKernel(host: Host, job: Job, below = ''): Promise<void> {
  await job.gone;
  expect(job.child.signalCode).toBe('SIGKILL');
  expect(oom(host, below, 'oom_kill')).toBe(1);
}

/** Starts a program that the test ends. */
function run(command: string, args: string[], options: { uid?: number } = {}): ChildProcess {
  const child = spawn(command, args, { stdio: ['pipe', 'pipe', 'inherit'], ...options });
  onTestFinished(() => void child.kill('SIGKILL'));
  return child;
}

/** The next lines that a program prints. */
async function lines(child: ChildProcess, count: number): Promise<string[]> {
  let text = '';
  while (text.split('\n').length <= count) text += (await once(child.stdout as NodeJS.ReadableStream, 'data'))[0];
  return text.trim().split('\n');
}

describeHost('the kernel', () => {
  const newHost = useHost();
  let hierarchy: HierarchyV1;
  beforeEach(() => {
    hierarchy = new HierarchyV1(point);
    hierarchy.keepAlive(true);
  });
  afterEach(() => hierarchy.close());

  // --- Waiting: memory.rst, section 10; mem_cgroup_oom_synchronize() in mm/memcontrol-v1.c ---

  test('a task at the limit waits in state D, and its stat, status and cmdline can be read', async () => {
    const host = newHost();
    const job = await park(host);
    await sleep(300);
    expect(isParked(job)).toBe(true);
    expect(proc(job.pid, 'stat')).toMatch(/^\d+ \(.*\) D /);
    expect(Number(/^RssAnon:\s+(\d+) kB$/m.exec(proc(job.pid, 'status'))?.[1])).toBeGreaterThan(40 * 1024);
    expect(proc(job.pid, 'cmdline').split('\0')).toContain('leak');
    expect(oom(host, '', 'under_oom')).toBe(1);
  });

  test('every thread that waits is seen by itself', async () => {
    const host = newHost();
    const job = await park(host, 'leak --every 0 --threads 4');
    const memcg = hierarchy.open(host.path);
    await host.until(() => hierarchy.listWaiters(memcg, 9).length === 4, 'four threads wait');
    expect(new Set(hierarchy.listWaiters(memcg, 9).map(({ tid }) => tid)).size).toBe(4);
    expect(hierarchy.listWaiters(memcg, 9).map(({ pid }) => pid)).toEqual(Array(4).fill(job.pid));
    memcg.close();
  });

  test('SIGKILL ends a task that waits, with nothing freed before', async () => {
    const host = newHost();
    const job = await park(host);
    job.child.kill('SIGKILL');
    await job.gone;
    expect(job.child.signalCode).toBe('SIGKILL');
    expect(host.read('', 'memory.oom_control')).toMatch(/^oom_kill_disable 1\nunder_oom 0\noom_kill 0$/m);
    expect(usage(host, '')).toBeLessThan(4 * MiB);
  });

  test('writing 0 to oom_control wakes the waiter, and the kernel kills', async () => {
    const host = newHost();
    const job = await park(host);
    expect(oom(host, '', 'oom_kill')).toBe(0);
    host.write('', 'memory.oom_control', 0);
    await killedByKernel(host, job);
  });

  test('raising the limit wakes the waiter, and it goes on', async () => {
    const host = newHost();
    const job = await park(host, 'leak --every 0 --cap 64MiB');
    expect(job.stat('bytes')).toBeLessThan(64 * MiB);
    host.write('', 'memory.limit_in_bytes', 80 * MiB);
    await host.until(() => job.stat('bytes') === 64 * MiB, 'it has all it wants');
    expect(oom(host, '', 'under_oom')).toBe(0);
    expect(job.alive()).toBe(true);
  });

  test('the death of the listener releases nobody: the task waits until 0 is written', async () => {
    const host = newHost();
    host.make('');
    const program = `const { EventSet, Directory } = require(process.argv[1]);
      const events = new EventSet(new Int32Array(8), () => console.log('signalled'));
      events.addCgroupEvent(new Directory(process.argv[2]), 'memory.oom_control', '');
      console.log('listening');`;
    const listener = run(process.execPath, ['-e', program, `${dirname(workloadPath())}/reprieve.node`, host.file('', '')]);
    expect(await lines(listener, 1)).toEqual(['listening']);
    const signalled = lines(listener, 1);
    const job = await park(host);
    expect((await signalled)[0]).toBe('signalled');
    listener.kill('SIGKILL');
    await once(listener, 'exit');
    await sleep(500);
    expect(isParked(job)).toBe(true);
    expect(host.read('', 'memory.oom_control')).toMatch(/^oom_kill_disable 1\nunder_oom 1\noom_kill 0$/m);
    host.write('', 'memory.oom_control', 0);
    await killedByKernel(host, job);
  });

  test('with the killer on, the listener is signalled and the kernel kills all the same', async () => {
    const host = newHost();
    host.make('', 48 * MiB);
    let signals = 0;
    hierarchy.listenOom(hierarchy.open(host.path), () => signals++);
    const job = await host.start('', 'leak --every 0');
    await killedByKernel(host, job);
    await host.until(() => signals > 0, 'the signal');
  });

  // memory.rst, section 10: only page faults of user space wait; try_charge_memcg() fails the others.
  test('a system call that touches memory gets ENOMEM at the limit instead of waiting, and nothing is signalled', async () => {
    const host = newHost();
    host.make('', 32 * MiB);
    host.write('', 'memory.oom_control', 1);
    let signals = 0;
    hierarchy.listenOom(hierarchy.open(host.path), () => signals++);
    const job = await host.start('', 'populate --bytes 64MiB', { gate: true });
    const result = lines(job.child, 1);
    job.go();
    expect(JSON.parse((await result)[0] ?? '')).toMatchObject({ errno: constants.errno.ENOMEM });
    await sleep(100);
    expect([isParked(job), oom(host, '', 'under_oom'), signals]).toEqual([false, 0, 0]);
  });

  // --- Whose switch counts ---

  test('oom_kill_disable is inherited at mkdir, and only then', () => {
    const host = newHost();
    host.make('before');
    host.write('', 'memory.oom_control', 1);
    host.make('after');
    expect([oom(host, 'before', 'oom_kill_disable'), oom(host, 'after', 'oom_kill_disable')]).toEqual([0, 1]);
    host.write('', 'memory.oom_control', 0);
    expect(oom(host, 'after', 'oom_kill_disable')).toBe(1);
  });

  test('a memcg made below an armed one, with its own limit, waits until 0 is written to it and not above', async () => {
    const host = newHost();
    host.make('');
    host.write('', 'memory.oom_control', 1);
    host.make('child', 24 * MiB);
    const job = await host.start('child', 'leak --every 0');
    await host.until(() => isParked(job), 'the task waits');
    host.write('', 'memory.oom_control', 0);
    await sleep(300);
    expect(isParked(job)).toBe(true);
    host.write('child', 'memory.oom_control', 0);
    await killedByKernel(host, job, 'child');
  });

  test('the switch of the memcg over its limit counts: the kernel kills in an armed child of one that is not', async () => {
    const host = newHost();
    host.make('', 48 * MiB);
    host.make('child');
    host.write('child', 'memory.oom_control', 1);
    const job = await host.start('child', 'leak --every 0');
    await killedByKernel(host, job, 'child');
    expect(oom(host, 'child', 'oom_kill_disable')).toBe(1);
  });

  // mem_cgroup_oom_control_write() refuses the root whatever is written: 0 is what it is already.
  test.skipIf(!existsSync(`${point}/release_agent`))('the root memcg refuses the switch with EINVAL', () => {
    expect(readFileSync(`${point}/memory.oom_control`, 'utf8')).toMatch(/^oom_kill_disable 0$/m);
    expect(() => writeFileSync(`${point}/memory.oom_control`, '0')).toThrow(/EINVAL/);
    newHost().make(''); // any other takes it
  });

  test('an OOM of a parent shows in every child, and only the parent is at its limit', async () => {
    const host = newHost();
    host.make('', 48 * MiB);
    host.write('', 'memory.oom_control', 1);
    const names = ['job', 'other', 'empty', 'empty/below'];
    for (const name of names) host.make(name, 64 * MiB);
    await host.start('other', 'hold --bytes 8MiB');
    const job = await host.start('job', 'leak --every 0');
    await host.until(() => isParked(job), 'the task waits');
    for (const name of ['', ...names]) expect([name, oom(host, name, 'under_oom')]).toEqual([name, 1]);
    const full = ['', ...names].filter((name) => {
      const memcg = hierarchy.open(name === '' ? host.path : `${host.path}/${name}`);
      const atLimit = isAtLimit(memcg);
      memcg.close();
      return atLimit;
    });
    expect(full).toEqual(['']);
  });

  // memcg_memory_event() goes up the tree on v2 alone.
  test("the kernel's kill is counted in the memcg of the victim, not in the one over its limit", async () => {
    const host = newHost();
    host.make('', 48 * MiB);
    host.make('job');
    const job = await host.start('job', 'leak --every 0');
    await killedByKernel(host, job, 'job');
    expect(oom(host, '', 'oom_kill')).toBe(0);
  });

  // --- What is charged where: memory.rst, section 2.3 and 4 ---

  async function fileOf32MiB(host: Host): Promise<string> {
    const file = `${host.tmpfs()}/data`;
    host.make('', 64 * MiB);
    host.make('files');
    const writer = await host.start('files', `hold --file ${file} --bytes 32MiB`);
    await host.until(() => usage(host, 'files') >= 32 * MiB, 'the file is written');
    writer.child.kill('SIGKILL');
    await writer.gone;
    return file;
  }

  test('tmpfs stays charged when its job has died, until the file is removed', async () => {
    const host = newHost();
    const file = await fileOf32MiB(host);
    expect(host.pids('files')).toEqual([]);
    expect(usage(host, 'files')).toBeGreaterThanOrEqual(32 * MiB);
    expect(host.field('files', 'memory.stat', 'total_shmem')).toBeGreaterThan(31 * MiB);
    rmSync(file);
    expect(usage(host, 'files')).toBeLessThan(4 * MiB);
  });

  test('what a removed memcg leaves behind stays charged to its parent', async () => {
    const host = newHost();
    const file = await fileOf32MiB(host);
    rmdirSync(host.file('files', ''));
    expect(usage(host, '')).toBeGreaterThanOrEqual(32 * MiB);
    expect(host.field('', 'memory.stat', 'total_shmem')).toBeGreaterThan(31 * MiB);
    rmSync(file);
    await host.until(() => usage(host, '') < 4 * MiB, 'it comes back');
  });

  test('removing a file of tmpfs wakes the waiter', async () => {
    const host = newHost();
    const file = await fileOf32MiB(host);
    const job = await park(host, 'leak --every 0 --cap 48MiB', 64 * MiB);
    rmSync(file);
    await host.until(() => job.stat('bytes') === 48 * MiB, 'it goes on');
  });

  test('a process that moves to another memcg leaves its charges where they were', async () => {
    const host = newHost();
    host.make('');
    for (const name of ['from', 'to']) host.make(name);
    const job = await host.start('from', 'hold --bytes 24MiB');
    await host.until(() => job.stat('bytes') === 24 * MiB, 'the memory is touched');
    host.write('to', 'cgroup.procs', job.pid);
    expect([host.pids('from'), host.pids('to')]).toEqual([[], [job.pid]]);
    expect(usage(host, 'from')).toBeGreaterThanOrEqual(24 * MiB);
    expect(usage(host, 'to')).toBeLessThan(4 * MiB);
  });

  // memcg_rstat_updated() lets up to 64 changes wait on each CPU, and as many for each before a reader adds them up.
  test("a job's total_rss follows its memory at once, but for what the CPUs keep to themselves", async () => {
    const host = newHost();
    host.make('');
    const rss = () => host.field('', 'memory.stat', 'total_rss');
    const slack = 2 * 64 * 4096 * cpus().length;
    const job = await host.start('', 'hold --bytes 32MiB', { gate: true });
    const before = rss();
    job.go();
    await lines(job.child, 1);
    const grown = rss() - before;
    console.log('RSS', (grown - 32 * MiB) / 1024, before/1024);
    expect(Math.abs(grown - 32 * MiB)).toBeLessThan(slack);
    job.child.kill('SIGKILL');
    await job.gone;
    const left = rss();
    console.log('LEFT', left / 1024);
    expect(left).toBeLessThan(slack);
  });

  test('a memcg without a limit reads as no limit', () => {
    const host = newHost();
    host.make('');
    const memcg = hierarchy.open(host.path);
    expect(memcg.limit()).toBe(Number.POSITIVE_INFINITY);
    host.write('', 'memory.limit_in_bytes', 48 * MiB);
    expect(memcg.limit()).toBe(48 * MiB);
    memcg.close();
  });

  // --- The kernel's choice: oom_badness() in mm/oom_kill.c, proc_pid_oom_score_adj(5) ---

  test('the kernel takes a small process with oom_score_adj 1000 before the big one that leaks', async () => {
    const host = newHost();
    host.make('', 96 * MiB);
    for (const name of ['big', 'small']) host.make(name);
    const small = await host.start('small', 'hold --bytes 20MiB');
    host.setScoreAdj(small.pid, 1000);
    await host.until(() => small.stat('bytes') === 20 * MiB, 'the memory is touched');
    const big = await host.start('big', 'leak --every 0 --cap 84MiB');
    await killedByKernel(host, small, 'small');
    await host.until(() => big.stat('bytes') === 84 * MiB, 'the big one goes on');
    expect([big.alive(), oom(host, 'big', 'oom_kill')]).toEqual([true, 0]);
  });

  test('the kernel never takes a process with oom_score_adj -1000, however big', async () => {
    const host = newHost();
    host.make('', 96 * MiB);
    for (const name of ['big', 'small']) host.make(name);
    const big = await host.start('big', 'hold --bytes 72MiB');
    host.setScoreAdj(big.pid, -1000);
    await host.until(() => big.stat('bytes') === 72 * MiB, 'the memory is touched');
    const small = await host.start('small', 'leak --every 0');
    await killedByKernel(host, small, 'small');
    expect(small.stat('bytes')).toBeLessThan(30 * MiB);
    expect([big.alive(), oom(host, 'big', 'oom_kill')]).toEqual([true, 0]);
  });

  test('without a capability oom_score_adj may be raised and lowered back, not below; a child inherits it', () => {
    const program = `cd /proc; me=$$
      echo 700 > $me/oom_score_adj; sleep 60 & cat $!/oom_score_adj
      echo 0 > $!/oom_score_adj && echo 0 > $me/oom_score_adj && cat $!/oom_score_adj $me/oom_score_adj
      (echo -1 > $me/oom_score_adj) 2>&1; cat $me/oom_score_adj; kill $!`;
    const { stdout } = spawnSync('sh', ['-c', program], { uid: NOBODY, gid: NOBODY, encoding: 'utf8' });
    expect(stdout.split('\n').slice(0, 3)).toEqual(['700', '0', '0']);
    expect(stdout).toMatch(/Permission denied\n0\n$/);
  });

  // __set_oom_adj() in fs/proc/base.c sets oom_score_adj_min too.
  test('written with the capability, oom_score_adj is the floor of its process from then on', async () => {
    const host = newHost();
    const shell = run('sh', [], { uid: NOBODY });
    const lower = async () => {
      shell.stdin?.write('(echo 300 > /proc/$$/oom_score_adj) 2>/dev/null; cat /proc/$$/oom_score_adj\n');
      return (await lines(shell, 1))[0];
    };
    expect(await lower()).toBe('300');
    host.setScoreAdj(shell.pid as number, 1000);
    expect(await lower()).toBe('1000');
    host.setScoreAdj(shell.pid as number, 0);
    expect(await lower()).toBe('300');
  });

  // process_mrelease(2): EINVAL unless the task is about to die (task_will_free_mem() in mm/oom_kill.c).
  test('process_mrelease refuses a live process', async () => {
    const host = newHost();
    host.make('');
    const job = await host.start('', 'hold --bytes 64KiB');
    const killing = hierarchy.startKilling(() => {}, true);
    const target = hierarchy.openProcess(job.pid);
    if (target === null) throw new Error('it is gone');
    expect(killing.signal(target)).toBe(1);
    expect(killing.release()).toEqual([0, 1]);
    expect(native().probeRelease()).toBe(constants.errno.EINVAL);
    expect(job.alive()).toBe(true);
    killing.close();
    target.close();
  });

  // --- Directories of the hierarchy ---

  // css_task_iter_advance() in kernel/cgroup/cgroup.c passes over tasks that are dying.
  test('cgroup.procs does not list a process that has exited and is not reaped yet', async () => {
    const host = newHost();
    host.make('');
    const script = `echo $$ > ${host.file('', 'cgroup.procs')}; sleep 0.2 & echo $!; exec sleep 60`;
    const parent = run('sh', ['-c', script]);
    const zombie = Number((await lines(parent, 1))[0]);
    expect(host.pids()).toContain(zombie);
    await host.until(() => / Z /.test(proc(zombie, 'stat')), 'it has exited');
    expect(host.pids()).toEqual([parent.pid]);
  });

  test('a memcg with a process cannot be removed; one that has only charges left can', async () => {
    const host = newHost();
    await fileOf32MiB(host);
    const job = await host.start('files', 'hold --bytes 64KiB');
    expect(() => rmdirSync(host.file('files', ''))).toThrow(/EBUSY/);
    job.child.kill('SIGKILL');
    await job.gone;
    expect(usage(host, 'files')).toBeGreaterThan(0);
    await host.until(() => host.pids('files').length === 0, 'it has left');
    rmdirSync(host.file('files', ''));
  });

  test('a memcg that is removed and made anew has another inode', () => {
    const host = newHost();
    host.make('');
    const inode = () => statSync(host.file('', '')).ino;
    const first = inode();
    expect(inode()).toBe(first);
    rmdirSync(host.file('', ''));
    mkdirSync(host.file('', ''));
    expect(inode()).not.toBe(first);
  });

  // xattr(7), inotify(7); kernfs keeps them (fs/kernfs/inode.c).
  test('user.* and trusted.* attributes of a memcg are kept, and a change is told as one of attributes', async () => {
    const host = newHost();
    host.make('job');
    const changes: TreeChange[] = [];
    const parent = hierarchy.open(host.path);
    hierarchy.listenTree(parent, (change) => changes.push(change));
    for (const [index, name] of ['user.reprieve.test', 'trusted.reprieve.test'].entries()) {
      spawnSync('setfattr', ['-n', name, '-v', 'yes', host.file('job', '')], { stdio: 'inherit' });
      expect(parent.child('job').attribute(name)).toBe('yes');
      await host.until(() => changes.length > index, `${name} is told`);
      expect(changes[index]).toEqual({ name: 'job', kind: 'attributes' });
    }
    spawnSync('setfattr', ['-x', 'user.reprieve.test', host.file('job', '')], { stdio: 'inherit' });
    expect(parent.child('job').attribute('user.reprieve.test')).toBeNull();
    await host.until(() => changes.length > 2, 'the removal is told');
  });

  // --- Near the limit: memory.rst, sections 9 and 11 ---

  test.each([
    ['the usage threshold, set at 95 % of the limit,', true],
    ['critical pressure', false],
  ])('%s is told before the OOM of a leak', async (_, limited) => {
    const host = newHost();
    host.make('', limited ? 64 * MiB : undefined);
    host.write('', 'memory.oom_control', 1);
    const memcg = hierarchy.open(host.path);
    const told: string[] = [];
    hierarchy.listenNear(memcg, () => told.push('near'));
    host.write('', 'memory.limit_in_bytes', 64 * MiB);
    hierarchy.listenOom(memcg, () => told.push('oom'));
    await host.start('', 'leak --every 2ms');
    await host.until(() => told.includes('oom'), 'the OOM');
    console.log(told);
    expect(told[0]).toBe('near');
  });
});
