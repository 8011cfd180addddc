import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, mkdirSync, readdirSync, readFileSync, rmdirSync, truncateSync, writeFileSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { setTimeout as sleep } from 'node:timers/promises';
import { expect, test } from 'vitest';
import {
  lowestPriority,
  type OomCondition,
  type OverchargeWindow,
  type Report,
  type WatchOptions,
} from '../../src/index.js';
import { workloadPath } from '../../src/native.js';
import { isRunning, startHandler } from '../support/handler-process.js';
import { describeHost, type Host, type Job, MiB, useHost } from '../support/memcg.js';

const LIMIT = 'memory.limit_in_bytes';
const MEMSW = 'memory.memsw.limit_in_bytes';
const BEFORE = 64 * MiB;
const RESERVE = 16 * MiB;
/** What a child in the window touches: most of the reserve, with room for what the kernel needs for it. */
const MOST = 14 * MiB;
const FREEZER = '/sys/fs/cgroup/freezer';
/** The kernel's figures of a memcg may be this much behind: it counts 64 pages a processor before it tells. */
const BEHIND = 64 * 4096 * availableParallelism();

/** A freezer cgroup of the test's own, for one job. */
function freezerOf(host: Host, name: string): string {
  const directory = `${FREEZER}/${host.name}-${name}`;
  mkdirSync(directory);
  host.onClear(async () => {
    writeFileSync(`${directory}/freezer.state`, 'THAWED');
    for (const pid of readFileSync(`${directory}/cgroup.procs`, 'utf8').split('\n').filter(Boolean)) {
      writeFileSync(`${FREEZER}/cgroup.procs`, pid);
    }
    rmdirSync(directory);
  });
  return directory;
}

function enter(directory: string, pid: number): void {
  writeFileSync(`${directory}/cgroup.procs`, String(pid));
}

function freezerStateOf(directory: string): string {
  return readFileSync(`${directory}/freezer.state`, 'utf8').trim();
}

function freezerPathOf(pid: number): string | undefined {
  return /:freezer:(.*)$/m.exec(readFileSync(`/proc/${pid}/cgroup`, 'utf8'))?.[1];
}

/** Freezer cgroups that a handler of that process made. */
function madeGroups(pid = process.pid): string[] {
  return readdirSync(FREEZER).filter((name) => name.startsWith(`reprieve-frozen-${pid}-`));
}

/** Anonymous memory and page cache of the memcg's jobs, in bytes. */
function held(host: Host, jobs: readonly string[]): number {
  return jobs.reduce(
    (sum, job) => sum + host.field(job, 'memory.stat', 'rss') + host.field(job, 'memory.stat', 'cache'),
    0,
  );
}

/** A program in the window that touches so much, and then waits. */
async function touch(window: OverchargeWindow, bytes: number, join = window.directory) {
  const child = window.spawn(workloadPath(), ['hold', '--bytes', String(bytes), '--join', join], {
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  const gone = once(child, 'exit');
  await Promise.race([once(child.stdout as NodeJS.ReadableStream, 'data'), gone]);
  return { child, gone };
}

/** The first condition of a watch in the iterator style, with time for the test. */
async function nextCondition(host: Host, options: WatchOptions = {}) {
  const handler = await host.handler({ reserve: '32MiB' });
  const watch = await handler.watch(host.scope, { respondWithin: 30_000, handleWithin: 60_000, ...options });
  const conditions = watch[Symbol.asyncIterator]();
  return {
    handler,
    watch,
    async next(): Promise<OomCondition> {
      const { value } = await conditions.next();
      if (value === undefined) throw new Error('the watch has ended');
      return value;
    },
  };
}

/** Kills until the condition is over, and resolves with its report. */
async function killAll(host: Host, condition: OomCondition, window?: OverchargeWindow): Promise<Report> {
  while (condition.open) {
    const { victim } = lowestPriority(await condition.snapshot());
    if (victim === undefined) break;
    await condition.kill(victim).catch((error) => {
      if (/close the overcharge window/.test(error.message)) return window?.close();
      return sleep(10); // an action is under way, or it is over
    });
  }
  const report = await condition.closed;
  await host.until(() => host.read('', LIMIT).trim() === String(BEFORE), 'the limit is as it was');
  return report;
}

describeHost('the overcharge window', () => {
  const newHost = useHost();

  const shapes: Record<string, (host: Host) => Promise<string[]>> = {
    'one process': async (host) => {
      await host.start('a', 'leak --chunk 1MiB --every 1ms');
      return ['a'];
    },
    'eight processes': async (host) => {
      await host.start('a', 'leak --processes 8 --chunk 256KiB --every 1ms');
      return ['a'];
    },
    'eight threads': async (host) => {
      await host.start('a', 'leak --threads 8 --chunk 256KiB --every 1ms');
      return ['a'];
    },
    'a writer to tmpfs beside a leak': async (host) => {
      await host.start('a', `write --bytes 512MiB --file ${host.tmpfs()}/file`);
      await host.start('b', 'leak --chunk 256KiB --every 1ms');
      return ['a', 'b'];
    },
    forkers: async (host) => {
      await host.start('a', 'fork --children 150 --bytes 1MiB --every 1ms', {
        env: { GLIBC_TUNABLES: 'glibc.pthread.rseq=0' },
      });
      return ['a'];
    },
    'a reader in long system calls beside a leak': async (host) => {
      await host.start('a', 'read --bytes 24MiB');
      await host.start('b', 'leak --chunk 256KiB --every 1ms');
      return ['a', 'b'];
    },
    'a program of many threads, some of which sleep': async (host) => {
      const text = 'console.log(); const kept = []; setInterval(() => kept.push(Buffer.alloc(1 << 18, 1)), 1)';
      const child = spawn(process.execPath, ['--input-type=module', '-e', text], {
        stdio: ['ignore', 'pipe', 'inherit'],
      });
      host.onClear(async () => {
        const gone = once(child, 'exit');
        if (child.exitCode === null && child.signalCode === null && child.kill('SIGKILL')) await gone;
      });
      await once(child.stdout, 'data');
      host.write('a', 'cgroup.procs', child.pid as number);
      return ['a'];
    },
    'jobs of their own freezer cgroup': async (host) => {
      for (const name of ['a', 'b']) {
        const directory = freezerOf(host, name);
        const job = await host.start(name, 'leak --chunk 256KiB --every 1ms', { gate: true });
        enter(directory, job.pid);
        job.go();
      }
      return ['a', 'b'];
    },
    'processes directly in the memcg': async (host) => {
      await host.start('', 'leak --chunk 256KiB --every 1ms');
      await host.start('', 'leak --chunk 256KiB --every 1ms');
      return [''];
    },
  };
  for (const [name, start] of Object.entries(shapes)) {
    test(`is nobody's but its own: ${name}`, async () => {
      const host = newHost();
      host.make('', BEFORE);
      for (const job of ['a', 'b']) host.make(job);
      // Of two jobs the second is the one that leaks: the other is not what has to go.
      const { handler, next } = await nextCondition(host, { jobs: { b: { priority: 10 } } });
      const jobs = await start(host);
      const condition = await next();
      let refused = 0;
      let window: OverchargeWindow | undefined;
      for (let attempt = 0; window === undefined && attempt < 20; attempt++) {
        const usage = host.read('', LIMIT);
        window = await condition.reserve.overcharge(RESERVE).catch((error) => {
          expect(error.code).toBe('ERR_REPRIEVE_WINDOW_REFUSED');
          expect(host.read('', LIMIT)).toBe(usage);
          refused++;
          return undefined;
        });
      }
      console.log(`${name}: ${refused} windows were refused`);
      expect(handler.windows).toEqual({ opened: 1, refused, exhausted: 0 });
      if (window === undefined) throw new Error('no window was opened');
      expect(host.read('', LIMIT).trim()).toBe(String(BEFORE + RESERVE));
      const before = held(host, jobs);
      const { child, gone } = await touch(window, MOST);
      await sleep(200); // jobs that could would take it now
      expect(child.exitCode ?? child.signalCode).toBeNull();
      expect(window.charged).toBeGreaterThan(MOST);
      // In a memcg without children of its own, the window's is counted with it.
      if (jobs[0] !== '') expect(held(host, jobs)).toBeLessThanOrEqual(before + BEHIND);
      else expect(host.field('', 'memory.stat', 'rss')).toBeLessThanOrEqual(before + BEHIND);
      // With it open: who is thawed before the limit is back, such as the writer, may use up at once what a death brings.
      // It is closed first where a job was frozen just after it gave its memory back, such as the reader.
      const report = await killAll(host, condition, window);
      expect((await gone)[1]).toBe('SIGKILL');
      expect(madeGroups()).toEqual([]);
      expect(report.outcome).toBe('cleared');
      expect(report.windows.at(-1)).toMatchObject({ refused: null, exhausted: false, failed: null, limit: 'back' });
      expect(report.windows.at(-1)?.maxCharged).toBeGreaterThan(MOST);
    });
  }

  /** A condition whose jobs are a leak, and what `also` starts. */
  async function leaking(host: Host, options: WatchOptions = {}, also: () => Promise<unknown> = async () => {}) {
    host.make('', BEFORE);
    host.make('hog');
    const watched = await nextCondition(host, options);
    await also();
    const hog = await host.start('hog', 'leak --chunk 1MiB --every 1ms');
    return { ...watched, hog, condition: await watched.next() };
  }

  test('that is used up says so, and what ran in it is killed', async () => {
    const host = newHost();
    const { handler, condition } = await leaking(host);
    const window = await condition.reserve.overcharge(RESERVE);
    const before = held(host, ['hog']);
    const { gone } = await touch(window, 2 * RESERVE);
    expect((await gone)[1]).toBe('SIGKILL');
    await window.close();
    expect(window.signal.reason).toMatchObject({ code: 'ERR_REPRIEVE_RESERVE_EXHAUSTED' });
    expect(held(host, ['hog'])).toBeLessThanOrEqual(before + BEHIND);
    expect(() => window.spawn('true')).toThrow(expect.objectContaining({ code: 'ERR_REPRIEVE_RESERVE_CLOSED' }));
    expect(handler.windows.exhausted).toBe(1);
    // The condition goes on.
    await killAll(host, condition);
    expect((await condition.closed).windows).toMatchObject([{ exhausted: true, limit: 'back' }]);
  });

  test('is refused past the reserve, and while there is one', async () => {
    const host = newHost();
    const { handler, condition } = await leaking(host);
    const { reserve } = condition;
    await expect(reserve.overcharge('33MiB')).rejects.toMatchObject({ code: 'ERR_REPRIEVE_RESERVE_EXHAUSTED' });
    for (const size of [0, -1, 'much', 1.5, null]) {
      await expect(reserve.overcharge(size as number)).rejects.toMatchObject({ code: 'ERR_REPRIEVE_INVALID_ARGUMENT' });
    }
    await expect(reserve.overcharge(RESERVE, { stopWithin: 0 })).rejects.toThrow(/`stopWithin` option/);
    const window = await reserve.overcharge(RESERVE);
    expect(reserve.charged).toBe(RESERVE);
    await expect(reserve.overcharge('1MiB')).rejects.toMatchObject({ code: 'ERR_REPRIEVE_WINDOW_REFUSED' });
    expect(reserve.charged).toBe(RESERVE);
    await window.close();
    // What is still above the old limit stays charged until that is back.
    expect(reserve.charged).toBe(Number(host.read('', LIMIT)) - BEFORE);
    await killAll(host, condition);
    expect([handler.reserve.charged, handler.reserve.maxCharged]).toEqual([0, RESERVE + MiB]);
    await expect(reserve.overcharge(RESERVE)).rejects.toMatchObject({ code: 'ERR_REPRIEVE_RESERVE_CLOSED' });
  });

  test('is refused while a thread is in a system call that does not end, and says which', async () => {
    const host = newHost();
    let stuck: Job | undefined;
    const { condition, handler } = await leaking(host, {}, async () => {
      host.make('stuck');
      stuck = await host.start('stuck', 'stuck --name stubborn');
    });
    const home = freezerPathOf(stuck?.pid as number);
    await expect(condition.reserve.overcharge(RESERVE)).rejects.toThrow(
      new RegExp(`thread ${stuck?.pid} \\(stubborn\\) of stuck is in handle_userfault.* after 100 ms`),
    );
    expect(host.read('', LIMIT).trim()).toBe(String(BEFORE));
    expect(handler.windows).toEqual({ opened: 0, refused: 1, exhausted: 0 });
    expect(condition.reserve.charged).toBe(0);
    expect(madeGroups()).toEqual([]);
    expect(freezerPathOf(stuck?.pid as number)).toBe(home);
    await killAll(host, condition);
    expect((await condition.closed).steps.map(({ text }) => text)).toContainEqual(
      expect.stringMatching(/^no overcharge window: thread/),
    );
  });

  test('with a limit of memory and swap raises both, and puts both back', async () => {
    const host = newHost();
    host.make('', BEFORE);
    host.write('', MEMSW, BEFORE);
    host.make('hog');
    const { next } = await nextCondition(host);
    await host.start('hog', 'leak --chunk 1MiB --every 1ms');
    const condition = await next();
    const window = await condition.reserve.overcharge(RESERVE);
    expect([LIMIT, MEMSW].map((name) => host.read('', name).trim())).toEqual([
      String(BEFORE + RESERVE),
      String(BEFORE + RESERVE),
    ]);
    const { child } = await touch(window, MOST);
    expect(child.exitCode ?? child.signalCode).toBeNull();
    await window.close();
    await killAll(host, condition);
    expect(host.read('', MEMSW).trim()).toBe(String(BEFORE));
  });

  test('is refused where a memcg above has no room for it', async () => {
    const host = newHost();
    host.make('', BEFORE + 8 * MiB);
    host.make('in', BEFORE);
    host.make('in/hog');
    const handler = await host.handler({ reserve: '32MiB' });
    const watch = await handler.watch(`${host.scope}/in`, { respondWithin: 30_000 });
    const conditions = watch[Symbol.asyncIterator]();
    await host.start('in/hog', 'leak --chunk 1MiB --every 1ms');
    const condition = (await conditions.next()).value as OomCondition;
    await expect(condition.reserve.overcharge(RESERVE)).rejects.toThrow(
      new RegExp(`${host.path} above it has room for [78].* MiB only, 16 MiB were asked for`),
    );
    const window = await condition.reserve.overcharge('4MiB');
    await window.close();
    await condition.kill((await condition.snapshot()).jobs[0]?.id);
    await condition.closed;
    await host.until(() => host.read('in', LIMIT).trim() === String(BEFORE), 'the limit is as it was');
  });

  test('leaves a limit alone that somebody else has changed meanwhile', async () => {
    const host = newHost();
    const { condition } = await leaking(host);
    const window = await condition.reserve.overcharge(RESERVE);
    host.write('', LIMIT, 96 * MiB);
    await window.close();
    expect(host.read('', LIMIT).trim()).toBe(String(96 * MiB));
    await condition.closed;
    expect((await condition.closed).windows[0]?.limit).toBe('theirs');
    expect(condition.reserve.charged).toBe(0);
  });

  test('whose limit somebody else sets above what memory and swap were limited to leaves it there', async () => {
    const host = newHost();
    host.make('', BEFORE);
    host.write('', MEMSW, BEFORE);
    host.make('hog');
    const { next, handler } = await nextCondition(host);
    await host.start('hog', 'leak --chunk 1MiB --every 1ms');
    const condition = await next();
    const window = await condition.reserve.overcharge(RESERVE);
    const theirs = BEFORE + 8 * MiB; // what it may be only while the other one is raised
    host.write('', LIMIT, theirs);
    await window.close();
    expect([LIMIT, MEMSW].map((name) => host.read('', name).trim())).toEqual([String(theirs), String(theirs)]);
    expect(handler.reserve.charged).toBe(0);
    await condition.kill((await condition.snapshot()).jobs[0]?.id).catch(() => {}); // there may be room for it now
    await handler.close();
    expect([LIMIT, MEMSW].map((name) => host.read('', name).trim())).toEqual([String(theirs), String(theirs)]);
  });

  test('whose limit is due when somebody else sets it says so in the end', async () => {
    const host = newHost();
    const { condition } = await leaking(host);
    const window = await condition.reserve.overcharge(RESERVE);
    const file = `${host.tmpfs()}/file`; // stays charged when who wrote it is dead
    const child = window.spawn(workloadPath(), ['hold', '--bytes', String(8 * MiB), '--file', file], {
      stdio: ['ignore', 'pipe', 'inherit'],
    });
    await once(child.stdout as NodeJS.ReadableStream, 'data');
    await window.close();
    const theirs = Number(host.read('', LIMIT)) + 4 * MiB;
    host.write('', LIMIT, theirs);
    while (condition.open) {
      const { victim } = lowestPriority(await condition.snapshot());
      await condition.kill(victim).catch(() => sleep(10)); // there may be room for it now
    }
    const { windows, steps } = await condition.closed;
    expect(windows).toMatchObject([{ limit: 'theirs' }]);
    expect(steps.map(({ text }) => text)).toContain('the limit was changed by somebody else meanwhile, and is left so');
    expect(host.read('', LIMIT).trim()).toBe(String(theirs));
    expect(condition.reserve.charged).toBe(0);
  });

  test('that is being closed is not taken for its jobs: with memory back among them nobody dies', async () => {
    const host = newHost();
    const file = `${host.tmpfs()}/file`;
    const { condition, hog } = await leaking(host, {}, async () => {
      host.make('cache');
      await host.start('cache', `hold --bytes ${12 * MiB} --file ${file}`);
    });
    const window = await condition.reserve.overcharge(RESERVE);
    await touch(window, MOST);
    truncateSync(file);
    await host.until(() => !window.isFull, 'memory is back');
    const closing = window.close();
    await expect(condition.kill(`${host.path}/hog`)).rejects.toThrow(/memory has come back/);
    await closing;
    expect(hog.alive()).toBe(true);
    await killAll(host, condition);
  });

  test('says that a program cannot be started in it by a shell', async () => {
    const host = newHost();
    const { condition } = await leaking(host);
    const window = await condition.reserve.overcharge(RESERVE);
    for (const options of [{ shell: true }, { shell: '/bin/sh' }, { uid: 1 }, { gid: 1 }]) {
      expect(() => window.spawn('true', [], options)).toThrow(
        expect.objectContaining({ code: 'ERR_REPRIEVE_INVALID_ARGUMENT' }),
      );
    }
    await window.close();
    await killAll(host, condition);
  });

  test('closed while descriptors are short has its limit put back once they are there', async () => {
    const host = newHost();
    host.make('', BEFORE);
    host.make('hog');
    const handler = await startHandler(
      host,
      { reserve: '32MiB' },
      `options = { respondWithin: 20_000, handleWithin: 40_000 };
       const { closeSync, openSync } = await import('node:fs');
       policy = async (snapshot, { reserve }) => {
         const window = await reserve.overcharge(${RESERVE});
         const held = [];
         try { for (;;) held.push(openSync('/dev/null')); } catch {}
         setTimeout(() => { for (const fd of held) closeSync(fd); }, 100);
         await window.close();
         say('closed');
         await new Promise((go) => process.once('SIGUSR2', go));
         return lowestPriority(snapshot);
       };`,
    );
    const hog = await host.start('hog', 'leak --chunk 1MiB --every 1ms');
    await host.until(() => handler.lines.includes('closed'), 'the window is closed');
    expect(Number(host.read('', LIMIT))).toBeGreaterThan(BEFORE);
    handler.child.kill('SIGUSR2');
    await hog.gone;
    await host.until(() => host.read('', LIMIT).trim() === String(BEFORE), 'the limit is as it was');
    handler.child.kill('SIGTERM');
    await handler.gone;
  });

  test('leaves frozen what was frozen before', async () => {
    const host = newHost();
    const directory = freezerOf(host, 'before');
    const { condition } = await leaking(host, {}, async () => {
      host.make('before');
      enter(directory, (await host.start('before', 'hold --bytes 1MiB')).pid);
      writeFileSync(`${directory}/freezer.state`, 'FROZEN');
    });
    const window = await condition.reserve.overcharge(RESERVE);
    await window.close();
    expect(freezerStateOf(directory)).toBe('FROZEN');
    await killAll(host, condition);
    expect((await condition.closed).windows[0]?.frozen).toContainEqual({ job: 'before', how: 'before' });
  });

  test('is never opened by freezing a cgroup of two: processes go into one of their own, and back', async () => {
    const host = newHost();
    const directory = freezerOf(host, 'shared');
    let other: Job | undefined;
    let bystander: Job | undefined;
    const { condition, hog } = await leaking(host, {}, async () => {
      host.make('other');
      other = await host.start('other', 'hold --bytes 1MiB');
      bystander = await host.start('', 'hold --bytes 64KiB');
      enter('/sys/fs/cgroup/memory', bystander.pid); // of no job
      for (const { pid } of [other, bystander]) enter(directory, pid);
    });
    enter(directory, hog.pid);
    const window = await condition.reserve.overcharge(RESERVE);
    expect(freezerStateOf(directory)).toBe('THAWED');
    const pids = [hog.pid, other?.pid as number];
    expect(new Set(pids.map(freezerPathOf)).size).toBe(2);
    for (const pid of pids) expect(freezerPathOf(pid)).toMatch(new RegExp(`^/${host.name}-shared/reprieve-frozen-`));
    await window.close();
    for (const pid of [...pids, bystander?.pid as number]) expect(freezerPathOf(pid)).toBe(`/${host.name}-shared`);
    expect(readdirSync(directory).filter((name) => name.startsWith('reprieve'))).toEqual([]);
    await killAll(host, condition);
  });

  test('that is open when a victim is chosen lets that one go alone, and closes when it is dead', async () => {
    const host = newHost();
    const directory = freezerOf(host, 'own');
    const { condition, hog } = await leaking(host, {}, async () => {
      host.make('service');
      enter(directory, (await host.start('service', 'hold --bytes 8MiB')).pid);
    });
    const window = await condition.reserve.overcharge(RESERVE);
    const { gone } = await touch(window, MOST);
    const killed = await condition.kill(lowestPriority(await condition.snapshot()).victim);
    expect(killed).toMatchObject({ job: `${host.path}/hog`, dead: true });
    const report = await condition.closed;
    expect((await gone)[1]).toBe('SIGKILL');
    expect(hog.alive()).toBe(false);
    expect(window.open).toBe(false);
    expect(freezerStateOf(directory)).toBe('THAWED');
    expect(report.outcome).toBe('cleared');
    expect(report.windows).toMatchObject([{ limit: 'back' }]);
    const order = ['is dead', 'the overcharge window is closed', 'nobody waits any more'].map((part) =>
      report.steps.findIndex(({ text }) => text.includes(part)),
    );
    expect(order).toEqual([...order].sort((a, b) => a - b));
    expect(order).not.toContain(-1);
    expect(host.read('', LIMIT).trim()).toBe(String(BEFORE));
  });

  test('is closed before the ladder goes on, and before the memcg is handed over', async () => {
    const host = newHost();
    const { condition } = await leaking(host, { respondWithin: 600, fallback: ['kernel'] });
    const window = await condition.reserve.overcharge(RESERVE);
    await touch(window, MOST);
    const report = await condition.closed;
    expect(window.open).toBe(false);
    expect(report.outcome).toBe('kernel');
    const texts = report.steps.map(({ text }) => text);
    expect(texts.findIndex((text) => text.startsWith('the overcharge window is closed'))).toBeLessThan(
      texts.findIndex((text) => text.startsWith('handed over')),
    );
    await host.until(() => host.read('', LIMIT).trim() === String(BEFORE), 'the limit is as it was');
  });

  test('closes with its watch, and with its handler', async () => {
    const host = newHost();
    const { handler, condition, hog } = await leaking(host);
    const window = await condition.reserve.overcharge(RESERVE);
    await touch(window, MOST);
    await handler.close();
    expect(window.open).toBe(false);
    expect(host.read('', LIMIT).trim()).toBe(String(BEFORE));
    expect(madeGroups()).toEqual([]);
    await host.until(() => !hog.alive(), 'the kernel or the guard takes the leak');
  });

  test('of a scope is refused while there is one above or below it, and where the room above is promised to another', async () => {
    const host = newHost();
    host.make('', 140 * MiB);
    for (const job of ['x', 'y']) {
      host.make(job, BEFORE);
      host.make(`${job}/hog`);
    }
    const handler = await host.handler({ reserve: '64MiB' });
    const conditions: OomCondition[] = [];
    for (const job of ['x', 'y']) {
      const watch = await handler.watch(`${host.scope}/${job}`, { respondWithin: 30_000, handleWithin: 60_000 });
      await host.start(`${job}/hog`, 'leak --chunk 256KiB --every 1ms');
      conditions.push((await watch[Symbol.asyncIterator]().next()).value as OomCondition);
    }
    const [x, y] = conditions as [OomCondition, OomCondition];
    const both = await Promise.allSettled([x.reserve.overcharge('8MiB'), y.reserve.overcharge('8MiB')]);
    expect(both.map(({ status }) => status)).toEqual(['fulfilled', 'rejected']);
    expect((both[1] as PromiseRejectedResult).reason.message).toMatch(
      /above it has room for [0-4](\.\d+)? [MK]iB only/,
    );
    // The scope above becomes full: it has a condition of its own, whose jobs a window has frozen already.
    const watch = await handler.watch(host.scope, { respondWithin: 30_000, handleWithin: 60_000 });
    await host.start('', 'leak --chunk 64KiB --every 1ms');
    const above = (await watch[Symbol.asyncIterator]().next()).value as OomCondition;
    await expect(above.reserve.overcharge('1MiB')).rejects.toThrow(`there is one in ${host.path}/x`);
  });

  test('with a memcg made in it closes as any other', async () => {
    const host = newHost();
    const { condition } = await leaking(host);
    const window = await condition.reserve.overcharge(RESERVE);
    mkdirSync(`${window.directory}/made/there`, { recursive: true });
    const { gone } = await touch(window, 2 * RESERVE, `${window.directory}/made/there`);
    expect((await gone)[1]).toBe('SIGKILL');
    await window.close();
    expect(window.signal.reason).toMatchObject({ code: 'ERR_REPRIEVE_RESERVE_EXHAUSTED' });
    expect(readdirSync(host.file('', '')).filter((name) => name.startsWith('reprieve'))).toEqual([]);
    await killAll(host, condition);
  });

  test('closes when somebody else thaws a job, and says so', async () => {
    const host = newHost();
    const directory = freezerOf(host, 'own');
    const { condition } = await leaking(host, {}, async () => {
      host.make('other');
      enter(directory, (await host.start('other', 'hold --bytes 1MiB')).pid);
    });
    const window = await condition.reserve.overcharge(RESERVE);
    writeFileSync(`${directory}/freezer.state`, 'THAWED');
    await host.until(() => !window.open, 'it closes');
    await window.close();
    expect(window.signal.reason).toMatchObject({
      code: 'ERR_REPRIEVE_RESERVE_CLOSED',
      message: expect.stringContaining('somebody has thawed other'),
    });
    await killAll(host, condition);
  });

  test('leaves a cgroup alone that somebody is just freezing', async () => {
    const host = newHost();
    const directory = freezerOf(host, 'half');
    const { condition, hog } = await leaking(host);
    enter(directory, hog.pid);
    writeFileSync(`${directory}/freezer.state`, 'FROZEN'); // FREEZING, as its task waits for memory
    expect(freezerStateOf(directory)).toBe('FREEZING');
    const window = await condition.reserve.overcharge(RESERVE);
    await window.close();
    expect(freezerStateOf(directory)).toMatch(/^FR/);
    writeFileSync(`${directory}/freezer.state`, 'THAWED');
    await killAll(host, condition);
    expect((await condition.closed).windows).toMatchObject([{ failed: null, frozen: [{ job: 'hog', how: 'before' }] }]);
  });

  test('that is open when its watch is closed does not keep the right job from dying', async () => {
    const host = newHost();
    const { watch, condition, hog } = await leaking(
      host,
      { jobs: { service: { priority: 90 }, hog: { priority: 10 } } },
      async () => {
        host.make('service');
        await host.start('service', 'hold --bytes 40MiB');
      },
    );
    await condition.reserve.overcharge(RESERVE);
    await watch.close();
    await host.until(() => !hog.alive(), 'the leak dies');
    expect(host.pids('service')).toHaveLength(1);
    expect((await condition.closed).windows[0]).toMatchObject({ failed: null, refused: null });
    await host.until(() => host.read('', LIMIT).trim() === String(BEFORE), 'the limit is as it was');
  });

  test('leaves charged what stays above the old limit, and never climbs past the reserve', async () => {
    const host = newHost();
    const { condition, handler } = await leaking(host);
    const tmpfs = host.tmpfs();
    const { reserve } = condition;
    for (let number = 0; number < 6; number++) {
      const window = await reserve.overcharge('12MiB').catch((error) => {
        expect(error.code).toBe('ERR_REPRIEVE_RESERVE_EXHAUSTED');
        return null;
      });
      if (window === null) break;
      const child = window.spawn('dd', ['if=/dev/zero', `of=${tmpfs}/${number}`, 'bs=1M', 'count=10'], {
        stdio: 'ignore',
      });
      await Promise.race([once(child, 'exit'), once(window.signal, 'abort')]);
      await window.close();
      const above = Number(host.read('', LIMIT)) - BEFORE;
      expect(above).toBeLessThanOrEqual(32 * MiB);
      expect(reserve.charged).toBe(above);
    }
    expect(reserve.charged).toBeGreaterThan(20 * MiB);
    await killAll(host, condition);
    expect(handler.reserve.charged).toBe(0);
  });

  test('keeps what it was promised while the limit of one before it is due', async () => {
    const host = newHost();
    const { condition } = await leaking(host);
    const { reserve } = condition;
    const first = await reserve.overcharge('12MiB');
    const file = `of=${host.tmpfs()}/kept`;
    await once(first.spawn('dd', ['if=/dev/zero', file, 'bs=1M', 'count=8'], { stdio: 'ignore' }), 'exit');
    await first.close();
    const above = Number(host.read('', LIMIT)) - BEFORE;
    expect(above).toBeGreaterThan(7 * MiB); // the leak may have been stopped some pages below its limit
    const second = await reserve.overcharge(RESERVE);
    await sleep(1_500); // once a second it is tried to put back what is due
    // What is due may have become a little less meanwhile; all of it would be 8 MiB.
    expect(Number(host.read('', LIMIT)) - BEFORE).toBeGreaterThan(above + RESERVE - MiB);
    expect(reserve.charged).toBeGreaterThan(above + RESERVE - MiB);
    const { gone } = await touch(second, MOST);
    expect(second.signal.aborted).toBe(false);
    expect(second.charged).toBeGreaterThan(MOST);
    await killAll(host, condition);
    await gone;
  });

  test('stops who joins a job from outside', async () => {
    const host = newHost();
    const { condition } = await leaking(host);
    const window = await condition.reserve.overcharge(RESERVE);
    const late = await host.start('hog', 'leak --chunk 64KiB --every 20ms');
    await host.until(() => {
      const path = freezerPathOf(late.pid) ?? '';
      return path.includes('reprieve-frozen') && freezerStateOf(`${FREEZER}${path}`) === 'FROZEN';
    }, 'it is frozen');
    const before = host.field('hog', 'memory.stat', 'rss');
    await sleep(150);
    expect(host.field('hog', 'memory.stat', 'rss')).toBeLessThanOrEqual(before + BEHIND);
    await window.close();
    await killAll(host, condition);
  });

  test('that is closed while programs start in it leaves none of them', async () => {
    const host = newHost();
    const { condition } = await leaking(host);
    for (let count = 0; count < 20; count++) {
      const window = await condition.reserve.overcharge(RESERVE);
      const { gone } = await touch(window, MOST); // is not dead at once
      const late = Array.from({ length: 4 }, () =>
        once(window.spawn(workloadPath(), ['hold', '--bytes', '64KiB'], { stdio: 'ignore' }), 'exit'),
      );
      await window.close();
      await Promise.all([gone, ...late]);
    }
    await killAll(host, condition);
    const { windows } = await condition.closed;
    expect(windows.map(({ failed }) => failed)).toEqual(Array(20).fill(null));
  });

  test('of a handler that exits while programs start in it leaves none of them', async () => {
    const host = newHost();
    host.make('', BEFORE);
    host.make('hog');
    const handler = await startHandler(
      host,
      { reserve: '32MiB' },
      `options = { respondWithin: 2000 };
       policy = async (snapshot, { reserve }) => {
         const window = await reserve.overcharge(${RESERVE});
         const start = () => {
           const child = window.spawn(${JSON.stringify(workloadPath())}, ['hold', '--outlive-parent'], { stdio: 'ignore' });
           child.kill('SIGSTOP'); // most have not joined yet
           return child.pid;
         };
         say('pids', ...Array.from({ length: 8 }, start));
         process.exit(3);
       };`,
    );
    await host.start('hog', 'leak --chunk 1MiB --every 1ms');
    await handler.gone;
    const [, ...pids] =
      handler.lines
        .find((line) => line.startsWith('pids'))
        ?.split(' ')
        .map(Number) ?? [];
    expect(pids).toHaveLength(8);
    await host.until(() => host.read('', LIMIT).trim() === String(BEFORE), 'the limit is as it was');
    await host.until(() => !pids.some(isRunning), 'what ran in the window is dead', 5_000);
  });

  test('whose limit is due when the guard takes over leaves its handler be', async () => {
    const host = newHost();
    host.make('', BEFORE);
    host.make('hog');
    const file = `${host.tmpfs()}/file`;
    // What was written to a tmpfs stays in use when who wrote it is dead.
    const handler = await startHandler(
      host,
      { reserve: '32MiB' },
      `options = { respondWithin: 2000, handleWithin: 4000 };
       policy = async (snapshot, { reserve }) => {
         const window = await reserve.overcharge(${RESERVE});
         window.spawn(${JSON.stringify(workloadPath())}, ['hold', '--bytes', '${8 * MiB}', '--file', '${file}'], { stdio: ['ignore', 'pipe', 'ignore'] })
           .stdout.once('data', () => window.close().then(() => say('due')));
         await new Promise(() => {});
       };`,
    );
    const hog = await host.start('hog', 'leak --chunk 1MiB --every 1ms');
    await host.until(() => handler.lines.includes('due'), 'the window is closed');
    expect(Number(host.read('', LIMIT))).toBeGreaterThan(BEFORE);
    handler.child.kill('SIGSTOP');
    await hog.gone;
    await host.until(() => host.read('', LIMIT).trim() === String(BEFORE), 'the limit is as it was');
    await sleep(1_000); // its look for what is due, once a second, is then what comes first
    handler.child.kill('SIGCONT');
    await Promise.race([
      host.until(() => handler.lines.some((line) => line.startsWith('revoked')), 'it is told'),
      handler.gone.then(() => Promise.reject(new Error('it ended by itself'))),
    ]);
    expect(handler.child.exitCode).toBeNull();
  });

  for (const how of ['SIGKILL', 'SIGSTOP'] as const) {
    test(`whose handler gets ${how} ends with limit, freezer and processes as they were`, async () => {
      const host = newHost();
      host.make('', BEFORE);
      for (const job of ['service', 'hog']) host.make(job);
      const directory = freezerOf(host, 'own');
      const service = await host.start('service', 'hold --bytes 8MiB');
      enter(directory, service.pid);
      const home = freezerPathOf(process.pid);
      const handler = await startHandler(
        host,
        { reserve: '32MiB' },
        `options = { jobs: { service: { priority: 90 } }, respondWithin: 2000 };
         policy = async (snapshot, { reserve }) => {
           const window = await reserve.overcharge(${RESERVE});
           window.spawn(${JSON.stringify(workloadPath())}, ['hold', '--outlive-parent', '--bytes', '${MOST}'], { stdio: 'ignore' })
             .on('exit', () => say('child gone'));
           setTimeout(() => say('open', window.charged), 300);
           await new Promise(() => {});
         };`,
      );
      const hog = await host.start('hog', 'leak --chunk 1MiB --every 1ms');
      await host.until(() => handler.lines.some((line) => line.startsWith('open')), 'the window is open');
      expect(Number(handler.lines.find((line) => line.startsWith('open'))?.split(' ')[1])).toBeGreaterThan(MOST);
      expect(freezerStateOf(directory)).toBe('FROZEN');
      handler.child.kill(how);
      await hog.gone;
      expect(service.alive()).toBe(true);
      await host.until(() => host.read('', LIMIT).trim() === String(BEFORE), 'the limit is as it was');
      await host.until(() => freezerStateOf(directory) === 'THAWED', 'the service goes on');
      await host.until(
        () => !readdirSync(host.file('', '')).some((name) => name.startsWith('reprieve')),
        'the memcg of the window is gone',
      );
      await host.until(() => madeGroups(handler.pid).length === 0, 'freezer cgroups that were made are gone');
      expect(freezerPathOf(service.pid)).toBe(`/${host.name}-own`);
      expect(home).toBe('/');
      await host.until(
        () => host.field('', 'memory.oom_control', 'oom_kill_disable') === 0,
        'the memcg is the kernel’s',
      );
      expect(existsSync(`/proc/${service.pid}`)).toBe(true);
      if (how === 'SIGKILL') return;
      handler.child.kill('SIGCONT');
      await host.until(() => handler.lines.some((line) => line.startsWith('revoked')), 'it is told');
      handler.child.kill('SIGTERM'); // in order, so that nothing is left for the next start
      await handler.gone;
    });
  }
});
