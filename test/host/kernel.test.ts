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
import type { Memcg, TreeChange } from '../../src/cgroup/cgroup.js';
import { findMemoryV1, readCgroupMounts } from '../../src/cgroup/mounts.js';
import { HierarchyV1 } from '../../src/cgroup/v1.js';
import { native, workloadPath } from '../../src/native.js';
import { describeHost, type Host, type Job, MiB, useHost } from '../support/memcg.js';

const NOBODY = 65534;
const NO_RIGHT = ' [skipped: no CAP_SYS_RESOURCE]';
const PARKED = 'mem_cgroup_oom_synchronize';
const point = findMemoryV1(readCgroupMounts())?.point ?? '';

const proc = (pid: number | 'self', name: string) => readFileSync(`/proc/${pid}/${name}`, 'utf8');
/** CAP_SYS_RESOURCE (capabilities(7)) is held: oom_score_adj may be lowered. */
const mayLower = ((BigInt(`0x${/^CapEff:\s*(\w+)$/m.exec(proc('self', 'status'))?.[1]}`) >> 24n) & 1n) === 1n;
const isParked = (job: Job) => proc(job.pid, 'wchan') === PARKED;
const oom = (host: Host, below: string, key: string) => host.field(below, 'memory.oom_control', key);
const usage = (host: Host, below: string) => Number(host.read(below, 'memory.usage_in_bytes'));

/** Arms the scope and starts a job in it that meets the limit; resolves when it waits. */
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

/** Resolves when the memcg could be removed: a process may be seen as gone a moment before it has left. */
async function removed(host: Host, below: string): Promise<void> {
  const attempt = () => {
    try {
      rmdirSync(host.file(below, ''));
      return true;
    } catch {
      return false;
    }
  };
  await host.until(attempt, `${below} is removed`);
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

  function open(host: Host, below = ''): Memcg {
    const memcg = hierarchy.open(host.path + below);
    onTestFinished(() => memcg.close());
    return memcg;
  }

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
    const memcg = open(host);
    await host.until(() => hierarchy.listWaiters(memcg, 9).length === 4, 'four threads wait');
    expect(new Set(hierarchy.listWaiters(memcg, 9).map(({ tid }) => tid)).size).toBe(4);
    expect(hierarchy.listWaiters(memcg, 9).map(({ pid }) => pid)).toEqual(Array(4).fill(job.pid));
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
    const addon = `${dirname(workloadPath())}/reprieve.node`;
    const listener = run(process.execPath, ['-e', program, addon, host.file('', '')]);
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
    hierarchy.listenOom(open(host), () => signals++);
    const job = await host.start('', 'leak --every 0');
    await killedByKernel(host, job);
    await host.until(() => signals > 0, 'the signal');
  });

  // memory.rst, section 10: only page faults of user space wait; try_charge_memcg() fails the others.
  test('a system call that needs memory at the limit fails instead of waiting, and nothing is signalled', async () => {
    const host = newHost();
    host.make('', 32 * MiB);
    host.write('', 'memory.oom_control', 1);
    let signals = 0;
    hierarchy.listenOom(open(host), () => signals++);
    const job = await host.start('', 'populate --bytes 64MiB', { gate: true });
    job.go();
    await host.until(() => job.stat('iterations') === 1, 'the call is over');
    expect(job.stat('refused')).toBe(1);
    expect(usage(host, '')).toBeGreaterThan(30 * MiB);
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
    const host = newHost();
    host.make('');
    host.write('', 'memory.oom_control', 0); // any other takes it
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
    const full = ['', ...names].filter((name) => open(host, name && `/${name}`).isFull());
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

  // --- What is charged where: memory.rst, sections 4.2, 4.3 and 5.2 ---

  async function fileOf32MiB(host: Host): Promise<string> {
    const file = `${host.tmpfs()}/data`;
    host.make('', 64 * MiB);
    host.make('files');
    const writer = await host.start('files', `hold --file ${file} --bytes 32MiB`);
    await host.until(() => writer.stat('bytes') === 32 * MiB, 'the file is written');
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
    await host.until(() => usage(host, 'files') < 4 * MiB, 'it comes back');
  });

  test('what a removed memcg leaves behind stays charged to its parent', async () => {
    const host = newHost();
    const file = await fileOf32MiB(host);
    await removed(host, 'files');
    expect(usage(host, '')).toBeGreaterThanOrEqual(32 * MiB);
    await host.until(() => host.field('', 'memory.stat', 'total_shmem') > 31 * MiB, 'the totals follow');
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

  // memcg_rstat_updated() in mm/memcontrol.c: each CPU may keep 64 changes, and a reader does not add up 64 more for each.
  test("a job's total_rss follows its memory, but for 128 pages a CPU", async () => {
    const host = newHost();
    host.make('');
    const slack = 128 * 4096 * cpus().length;
    const chunk = 64 * 1024;
    const rss = () => host.field('', 'memory.stat', 'total_rss');
    const job = await host.start('', `leak --chunk ${chunk} --cap ${4 * slack} --every 2ms`, { gate: true });
    const before = rss();
    job.go();
    while (job.stat('bytes') < 4 * slack) {
      const [least, seen, most] = [job.stat('bytes'), rss() - before, job.stat('bytes') + chunk];
      expect(seen).toBeGreaterThan(least - slack);
      expect(seen).toBeLessThan(most + slack);
      await sleep(1);
    }
    job.child.kill('SIGKILL');
    await job.gone;
    expect(rss()).toBeLessThan(slack);
  });

  // A flush that runs meanwhile may leave the totals above behind until flush_memcg_stats_dwork() flushes all, every 2 s.
  test('the totals of a memcg follow the memory of those below it, in the end', async () => {
    const host = newHost();
    host.make('job/below');
    const rss = (below: string) => host.field(below, 'memory.stat', 'total_rss');
    const job = await host.start('job/below', 'hold --bytes 32MiB');
    await host.until(() => job.stat('bytes') === 32 * MiB, 'the memory is touched');
    await host.until(() => rss('job') > 31 * MiB, 'the total follows');
    expect(rss('job')).toBeLessThan(34 * MiB);
    job.child.kill('SIGKILL');
    await job.gone;
    await host.until(() => rss('job') < MiB, 'the total follows');
  });

  test('a memcg without a limit reads as no limit', () => {
    const host = newHost();
    host.make('');
    const memcg = open(host);
    expect(memcg.limit()).toBe(Number.POSITIVE_INFINITY);
    host.write('', 'memory.limit_in_bytes', 48 * MiB);
    expect(memcg.limit()).toBe(48 * MiB);
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

  const never = `the kernel never takes a process with oom_score_adj -1000, however big${mayLower ? '' : NO_RIGHT}`;
  test.skipIf(!mayLower)(never, async () => {
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

  test('without CAP_SYS_RESOURCE oom_score_adj can be raised, and lowered back but not below; a child inherits it', () => {
    const program = `cd /proc; me=$$; exec 2> /dev/null
      echo 700 > $me/oom_score_adj; sleep 60 & child=$!; cat $me/oom_score_adj $child/oom_score_adj
      echo 0 > $me/oom_score_adj; echo 0 > $child/oom_score_adj; cat $me/oom_score_adj $child/oom_score_adj
      echo -1 > $child/oom_score_adj; cat $child/oom_score_adj; kill $child`;
    const { stdout } = spawnSync('sh', ['-c', program], { uid: NOBODY, gid: NOBODY, encoding: 'utf8' });
    expect(stdout).toBe('700\n700\n0\n0\n0\n');
  });

  // __set_oom_adj() in fs/proc/base.c sets oom_score_adj_min if the writer has the capability.
  test(`a write of oom_score_adj ${mayLower ? 'with' : 'without'} CAP_SYS_RESOURCE ${mayLower ? 'moves' : 'leaves'} the floor`, async () => {
    const host = newHost();
    const shell = run('sh', [], { uid: NOBODY });
    const lowered = async () => {
      // A second line tells that nothing reads any more: a read that goes on meets the next value.
      shell.stdin?.write('(echo 300 > /proc/$$/oom_score_adj) 2> /dev/null; cat /proc/$$/oom_score_adj; echo\n');
      return (await lines(shell, 2))[0];
    };
    expect(await lowered()).toBe('300');
    host.setScoreAdj(shell.pid as number, 1000);
    expect(await lowered()).toBe(mayLower ? '1000' : '300');
    host.setScoreAdj(shell.pid as number, 0);
    expect(await lowered()).toBe('300');
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
    const script = `echo $$ > ${host.file('', 'cgroup.procs')}; sleep 60 & echo $!; exec sleep 60`;
    const parent = run('sh', ['-c', script]);
    const zombie = Number((await lines(parent, 1))[0]);
    expect(host.pids()).toContain(zombie);
    await host.until(() => proc(parent.pid as number, 'comm') === 'sleep\n', 'nobody reaps it any more');
    process.kill(zombie, 'SIGKILL');
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
    expect(usage(host, 'files')).toBeGreaterThanOrEqual(32 * MiB);
    await removed(host, 'files');
    expect(existsSync(host.file('files', ''))).toBe(false);
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
    const job = open(host, '/job');
    hierarchy.listenTree(open(host), (change) => changes.push(change));
    for (const [index, name] of ['user.reprieve.test', 'trusted.reprieve.test'].entries()) {
      spawnSync('setfattr', ['-n', name, '-v', 'yes', host.file('job', '')], { stdio: 'inherit' });
      expect(job.attribute(name)).toBe('yes');
      await host.until(() => changes.length > index, `${name} is told`);
      expect(changes[index]).toEqual({ name: 'job', kind: 'attributes' });
    }
    spawnSync('setfattr', ['-x', 'user.reprieve.test', host.file('job', '')], { stdio: 'inherit' });
    expect(job.attribute('user.reprieve.test')).toBeNull();
    await host.until(() => changes.length > 2, 'the removal is told');
  });

  // --- Near the limit: memory.rst, section 9 ---

  test('the usage threshold at 95 % of the limit is told while there is room', async () => {
    const host = newHost();
    host.make('', 128 * MiB);
    const memcg = open(host);
    let told = 0;
    hierarchy.listenNear(memcg, () => told++);
    const job = await host.start('', 'leak --every 0 --cap 110MiB');
    await host.until(() => job.stat('bytes') === 110 * MiB, 'the memory is touched');
    await sleep(100);
    expect(told).toBe(0);
    await host.start('', 'leak --every 0 --cap 15MiB');
    await host.until(() => told > 0, 'the threshold');
    expect(Number(host.read('', 'memory.failcnt'))).toBe(0);
  });
});
