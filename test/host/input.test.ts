import { execFile, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { chmodSync, rmdirSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { promisify } from 'node:util';
import { expect, test } from 'vitest';
import { lowestPriority, OomHandler, type Policy } from '../../src/index.js';
import { describeHost, type Host, MiB, useHost } from '../support/memcg.js';

const run = promisify(execFile);
const never: Policy = () => new Promise(() => {});
const dist = new URL('../../dist/index.js', import.meta.url).href;

/** Runs a program in a Node process of its own; the last line of what it prints, as data. */
async function inNode(program: string, prefix: string[] = []): Promise<unknown> {
  const [command = '', ...args] = [...prefix, process.execPath, '--input-type=module', '-e', program];
  const { stdout } = await run(command, args, { timeout: 30_000 });
  return JSON.parse(stdout.trim().split('\n').at(-1) ?? 'null');
}

/** A program that tries `body` and prints the error it meets. */
function program(body: string): string {
  return `import { OomHandler, lowestPriority } from ${JSON.stringify(dist)};
    try { ${body} console.log('null'); }
    catch ({ code, errno, message }) { console.log(JSON.stringify({ code, errno, message })); }`;
}

async function leaking(host: Host) {
  host.make('', 48 * MiB);
  host.make('batch');
  return host.start('batch', 'leak --every 0', { gate: true });
}

describeHost('bad input and things that go away', () => {
  const newHost = useHost();

  test('scopes that are none: each with its code, and nothing is armed', async () => {
    const host = newHost();
    host.make('', 48 * MiB);
    const handler = await host.handler();
    for (const [scope, code] of [
      [`memcg:${host.path}/memory.stat`, 'ERR_REPRIEVE_NOT_A_MEMCG'],
      [`memcg:${host.path}/../..`, 'ERR_REPRIEVE_INVALID_SCOPE'],
    ] as const) {
      await expect(handler.watch(scope, { policy: lowestPriority }), scope).rejects.toMatchObject({ code });
    }
    await handler.watch(host.scope, { policy: lowestPriority });
    await expect(handler.watch(`${host.scope}/`)).rejects.toMatchObject({ code: 'ERR_REPRIEVE_ALREADY_WATCHED' });
    expect(handler.watches.map(({ scope }) => scope)).toEqual([host.scope]);
  });

  test('a handler inside the scope is refused where it has no way out and no guard, and one that moves out is not', async () => {
    const host = newHost();
    host.make('', 256 * MiB);
    const join = `import { writeFileSync } from 'node:fs'; writeFileSync(${JSON.stringify(host.file('', 'cgroup.procs'))}, '0');`;
    const watch = (options: string) =>
      inNode(
        `${join} ${program(`const h = await OomHandler.open(${options}); await h.watch('${host.scope}'); await h.close();`)}`,
      );
    expect(await watch('{ ownMemcg: false, guard: false }')).toMatchObject({ code: 'ERR_REPRIEVE_INSIDE_SCOPE' });
    expect(await watch("{ ownMemcg: 'step-out', guard: false }")).toBe(null);
    expect(await watch('{}')).toBe(null);
    expect(host.field('', 'memory.oom_control', 'oom_kill_disable')).toBe(0);
  });

  test('without permission the error says so, with the errno', async () => {
    const host = newHost();
    host.make('', 48 * MiB);
    const asNobody = ['setpriv', '--reuid=65534', '--regid=65534', '--clear-groups'];
    chmodSync(host.directory, 0o777);
    const options = `{ reserve: 0, stateDirectory: '${host.directory}/state' }`;
    const body = `const h = await OomHandler.open(${options}); await h.watch('${host.scope}');`;
    expect(await inNode(program(body), asNobody)).toMatchObject({ code: 'ERR_REPRIEVE_PERMISSION', errno: 13 });
  });

  test('a reserve that cannot be locked is an error of open()', async () => {
    const limited = ['prlimit', '--memlock=65536', 'setpriv', '--reuid=65534', '--regid=65534', '--clear-groups'];
    const host = newHost();
    chmodSync(host.directory, 0o777);
    const options = `{ reserve: '4MiB', stateDirectory: '${host.directory}/state' }`;
    const error = await inNode(program(`await OomHandler.open(${options});`), limited);
    expect(error).toMatchObject({
      code: 'ERR_REPRIEVE_RESERVE_UNAVAILABLE',
      message: expect.stringMatching(/4 MiB.*ulimit -l/),
    });
  });

  test('the scope vanishes while it is handled', async () => {
    const host = newHost();
    const batch = await leaking(host);
    const { handler } = await host.watch({ policy: never, respondWithin: 30_000, handleWithin: 30_000 });
    const vanished = new Promise((resolve) => handler.once('vanished', resolve));
    batch.go();
    await host.until(() => host.field('', 'memory.oom_control', 'under_oom') === 1, 'tasks wait');
    await sleep(50);
    batch.child.kill('SIGKILL');
    await batch.gone;
    rmdirSync(host.file('batch', ''));
    rmdirSync(host.file('', ''));
    await vanished;
    await host.until(() => host.reports.length > 0, 'the report');
    expect(['vanished', 'cleared']).toContain(host.reports[0]?.outcome);
    expect(handler.watches).toEqual([]);
  });

  test('attributes of a memcg set its priority, also on a live job', async () => {
    const host = newHost();
    host.make('', 64 * MiB);
    for (const name of ['a', 'b']) host.make(name);
    const setAttribute = (below: string, name: string, value: string) =>
      spawnSync('setfattr', ['-n', name, '-v', value, host.file(below, '')], { stdio: 'inherit' });
    setAttribute('a', 'user.reprieve.priority', '10');
    const a = await host.start('a', 'hold --bytes 20MiB');
    const b = await host.start('b', 'leak --every 0', { gate: true });
    await host.watch({ policy: lowestPriority });
    setAttribute('b', 'trusted.reprieve.priority', '5');
    await sleep(100);
    b.go();
    const report = await host.report();
    expect(report.victims).toMatchObject([{ name: 'b' }]);
    expect(report.snapshot?.jobs.map(({ name, priority, settings }) => [name, priority, settings]).toSorted()).toEqual([
      ['a', 10, 'user.reprieve.priority'],
      ['b', 5, 'trusted.reprieve.priority'],
    ]);
    expect(a.alive()).toBe(true);
  });
});

describeHost('memcgs below the scope', () => {
  const newHost = useHost();

  test('recursive: one made later with a limit of its own is handled', async () => {
    const host = newHost();
    host.make('', 256 * MiB);
    const { watch } = await host.watch({ policy: lowestPriority, recursive: true });
    host.make('pod', 48 * MiB);
    host.make('pod/batch');
    await host.until(() => watch.armed.length === 3, 'the new ones are armed');
    const batch = await host.start('pod/batch', 'leak --every 0', { gate: true });
    batch.go();
    const report = await host.report();
    expect(report).toMatchObject({ owner: `${host.path}/pod`, victims: [{ name: 'pod/batch' }] });
    await watch.close();
    for (const below of ['', 'pod', 'pod/batch']) {
      expect(host.field(below, 'memory.oom_control', 'oom_kill_disable')).toBe(0);
    }
  });

  test('recursive: the limit of the scope is hit while those below are armed too: one job dies', async () => {
    const host = newHost();
    host.make('', 64 * MiB);
    for (const name of ['a/one', 'b', 'c']) host.make(name);
    const b = await host.start('b', 'hold --bytes 8MiB');
    const leak = await host.start('a/one', 'leak --every 0', { gate: true });
    await host.watch({ policy: lowestPriority, recursive: true });
    leak.go();
    expect(await host.report()).toMatchObject({ owner: host.path, victims: [{ name: 'a' }] });
    await sleep(300);
    expect(host.acted).toHaveLength(1);
    expect(b.alive()).toBe(true);
  });

  test('not recursive: one made later does not keep the inherited oom_kill_disable, so nobody hangs there', async () => {
    const host = newHost();
    host.make('', 256 * MiB);
    await host.watch({ policy: lowestPriority });
    host.make('pod', 48 * MiB);
    await host.until(() => host.field('pod', 'memory.oom_control', 'oom_kill_disable') === 0, 'it is put back');
    const batch = await host.start('pod', 'leak --every 0', { gate: true });
    batch.go();
    await batch.gone;
    expect(host.reports).toEqual([]);
  });
});

describeHost('ways out', () => {
  const newHost = useHost();

  for (const [how, leave] of Object.entries({
    'process.exit': 'process.exit(0);',
    'an exception that nobody catches': "setTimeout(() => { throw new Error('expected by the test'); }, 1);",
    'SIGTERM that nobody listens to': "process.kill(process.pid, 'SIGTERM'); setTimeout(() => {}, 10_000);",
  })) {
    test(`${how} puts everything back`, async () => {
      const host = newHost();
      host.make('', 48 * MiB);
      for (const name of ['batch', 'web']) host.make(name);
      const batch = await host.start('batch', 'hold --bytes 2MiB');
      const text = `import { OomHandler, lowestPriority } from ${JSON.stringify(dist)};
        import { readFileSync } from 'node:fs';
        const handler = await OomHandler.open({ reserve: '1MiB' });
        await handler.watch('${host.scope}', { policy: lowestPriority, jobs: { batch: { priority: 10 } } });
        console.log(readFileSync('/proc/${batch.pid}/oom_score_adj', 'utf8').trim(), handler.capabilities.ownMemcg.path);
        ${leave}`;
      const { stdout } = spawnSync(process.execPath, ['--input-type=module', '-e', text], { encoding: 'utf8' });
      const [score, own] = stdout.trim().split(' ');
      expect(score).toBe('1000');
      expect(host.scoreAdj(batch.pid)).toBe(0);
      expect(host.field('', 'memory.oom_control', 'oom_kill_disable')).toBe(0);
      expect(() => rmdirSync(`/sys/fs/cgroup/memory${own}`)).toThrow(/ENOENT/);
    });
  }

  test('one without a guard that was killed leaves it armed; the next one puts back what was there before that', async () => {
    const host = newHost();
    host.make('', 48 * MiB);
    const text = `import { OomHandler } from ${JSON.stringify(dist)};
      const handler = await OomHandler.open({ reserve: 0, guard: false });
      await handler.watch('${host.scope}');
      process.kill(process.pid, 'SIGKILL');`;
    spawnSync(process.execPath, ['--input-type=module', '-e', text]);
    expect(host.field('', 'memory.oom_control', 'oom_kill_disable')).toBe(1);
    host.make('child'); // inherits that
    const { handler } = await host.watch({ policy: lowestPriority });
    await handler.close();
    for (const below of ['', 'child']) expect(host.field(below, 'memory.oom_control', 'oom_kill_disable')).toBe(0);
  });

  test('the process exits during a condition: the kernel finds everybody in order and takes the leak', async () => {
    const host = newHost();
    host.make('', 96 * MiB);
    for (const name of ['batch', 'web']) host.make(name);
    const web = await host.start('web', 'hold --bytes 60MiB');
    const batch = await host.start('batch', 'leak --every 0', { gate: true });
    const text = `import { OomHandler } from ${JSON.stringify(dist)};
      const handler = await OomHandler.open({ reserve: 0 });
      await handler.watch('${host.scope}', { policy: () => process.exit(0), jobs: { batch: { priority: 10 } } });
      console.log('watching');`;
    const child = execFile(process.execPath, ['--input-type=module', '-e', text]);
    await once(child.stdout as NodeJS.ReadableStream, 'data');
    batch.go();
    await batch.gone;
    if (child.exitCode === null) await once(child, 'exit');
    await sleep(200);
    expect(web.alive()).toBe(true);
    expect(host.field('', 'memory.oom_control', 'oom_kill_disable')).toBe(0);
  });

  test('short of descriptors during an episode, the tasks are let go within the bound', async () => {
    const host = newHost();
    const batch = await leaking(host);
    const text = `import { OomHandler, lowestPriority } from ${JSON.stringify(dist)};
      import { openSync } from 'node:fs';
      const handler = await OomHandler.open({ reserve: 0 });
      await handler.watch('${host.scope}', { policy: lowestPriority, handleWithin: 1000 });
      handler.on('report', (report) => { console.log(report.outcome); });
      try { for (;;) openSync('/dev/null'); } catch {}
      console.log('watching');`;
    const child = execFile('prlimit', ['--nofile=256', process.execPath, '--input-type=module', '-e', text]);
    await once(child.stdout as NodeJS.ReadableStream, 'data');
    batch.go();
    await batch.gone;
    child.kill('SIGTERM');
    await once(child, 'exit');
    expect(host.field('', 'memory.oom_control', 'oom_kill_disable')).toBe(0);
  });

  test('short of descriptors a watch is closed all the same: the condition ends, nothing stays armed', async () => {
    const host = newHost();
    host.make('', 96 * MiB);
    for (const below of ['a', 'b']) host.make(below, 32 * MiB);
    for (const below of ['a/batch', 'b/batch']) host.make(below);
    const text = `import { OomHandler } from ${JSON.stringify(dist)};
      import { closeSync, openSync } from 'node:fs';
      const handler = await OomHandler.open({ reserve: 0 });
      const watch = await handler.watch('${host.scope}', { respondWithin: 20_000, recursive: true });
      console.log('watching');
      const { value } = await watch[Symbol.asyncIterator]().next();
      await value.handOver();
      const held = [];
      try { for (;;) held.push(openSync('/dev/null')); } catch {}
      const closed = await watch.close().then(() => 'closed', (error) => error.message);
      for (const fd of held) closeSync(fd);
      const { owner, outcome, steps } = await value.closed;
      console.log(JSON.stringify({ closed, owner, outcome, failed: steps.filter(({ text }) => /failed/.test(text)).length }));
      const stay = setInterval(() => {}, 1_000);
      process.once('SIGUSR2', () => handler.close().then(() => clearInterval(stay)));`;
    const child = execFile('prlimit', ['--nofile=256', process.execPath, '--input-type=module', '-e', text]);
    const gone = once(child, 'exit');
    host.onClear(() => child.kill('SIGKILL'));
    let told = '';
    child.stdout?.on('data', (data) => {
      told += data;
    });
    await host.until(() => told.includes('watching'), 'it watches');
    const first = await host.start('a/batch', 'leak --every 0');
    await host.until(() => told.includes('owner') || child.exitCode !== null, 'the condition has ended');
    await first.gone;
    expect(JSON.parse(told.trim().split('\n').at(-1) ?? '')).toEqual({
      closed: 'closed',
      owner: `${host.path}/a`,
      outcome: 'released',
      failed: 1,
    });
    const disabled = ['', 'a', 'b'].map((below) => host.field(below, 'memory.oom_control', 'oom_kill_disable'));
    expect(disabled).toEqual([0, 0, 0]);
    await (await host.start('b/batch', 'leak --every 0')).gone;
    child.kill('SIGUSR2');
    expect(await gone).toEqual([0, null]);
  });

  test('a worker is refused: what it arms it could not put back', async () => {
    const worker = `import { Worker } from 'node:worker_threads';
      const text = ${JSON.stringify(program('await OomHandler.open();'))};
      new Worker(new URL('data:text/javascript,' + encodeURIComponent(text)));`;
    expect(await inNode(worker)).toMatchObject({ code: 'ERR_REPRIEVE_UNSUPPORTED' });
  });

  test('a locked and raised handler survives the collector, and exits with 0', async () => {
    const churn = `const h = await OomHandler.open({ reserve: '16MiB' });
      if (h.capabilities.lockedText.bytes === 0 || h.capabilities.scheduling.got === 'keep') throw new Error('not hardened');
      let keep = [];
      for (let i = 0; i < 3e6; i++) { keep.push({ i, text: 'x' + i }); if (keep.length > 2e5) keep = []; }
      globalThis.gc(); await h.close(); globalThis.gc();`;
    expect(await inNode(program(churn), ['env', 'NODE_OPTIONS=--expose-gc'])).toBe(null);
  });

  test('two handlers of one process share its memcg; the last one moves it back', async () => {
    const [first, second] = [await OomHandler.open({ reserve: 0 }), await OomHandler.open({ reserve: 0 })];
    const path = first.capabilities.ownMemcg?.path;
    expect(second.capabilities.ownMemcg?.path).toBe(path);
    await first.close();
    expect(() => rmdirSync(`/sys/fs/cgroup/memory${path}`)).toThrow(/EBUSY/);
    await second.close();
    expect(() => rmdirSync(`/sys/fs/cgroup/memory${path}`)).toThrow(/ENOENT/);
  });
});
