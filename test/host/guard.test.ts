import { execFileSync, spawnSync } from 'node:child_process';
import {
  chmodSync,
  copyFileSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmdirSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { expect, test } from 'vitest';
import { OomHandler } from '../../src/index.js';
import { guardPath } from '../../src/native.js';
import { bound, deadlines, expectAllBack, guard, oom, recordIn, stage } from '../support/guarded.js';
import { isRunning, startHandler } from '../support/handler-process.js';
import { describeHost, type Host, type Job, MiB, useHost } from '../support/memcg.js';

const cli = fileURLToPath(new URL('../../dist/cli/main.js', import.meta.url));

describeHost('the guard takes over', () => {
  const newHost = useHost();

  test('from a handler that aborts while a task waits', async () => {
    const host = newHost();
    const { web, batch, state } = await stage(host);
    const body = `options = ${deadlines}; policy = () => process.abort();`;
    const handler = await startHandler(host, { guard, stateDirectory: state }, body);
    batch.go();
    await handler.gone;
    expect(handler.child.signalCode).toBe('SIGABRT');
    await batch.gone;
    await expectAllBack(host, handler, state);
    expect(oom(host, 'batch', 'oom_kill')).toBe(0); // ours and not the kernel's
    expect(await recordIn(host, state)).toMatch(
      /reason died.*kills batch.*page faults of the guard since it was ready: 0$/ms,
    );
    const before = web.stat('iterations');
    await host.until(() => web.stat('iterations') > before, 'the service goes on');
    expect(web.stat('longestStallUs')).toBeLessThan(bound * 1000);
  });

  const hangs = {
    'that was stopped (SIGSTOP) before the memcg was full': { stop: true, body: '' },
    'whose policy loops for ever': { stop: false, body: 'policy = () => { for (;;); };' },
    'whose policy fills its heap, until V8 ends it': {
      stop: false,
      body: 'policy = () => { const all = []; for (;;) all.push(new Array(1e5).fill({})); };',
    },
  };
  for (const [how, { stop, body }] of Object.entries(hangs)) {
    test(`from a handler ${how}, which does nothing more when it goes on`, async () => {
      const host = newHost();
      const { web, batch, state } = await stage(host);
      const handler = await startHandler(host, { guard, stateDirectory: state }, `options = ${deadlines}; ${body}`);
      if (stop) handler.child.kill('SIGSTOP');
      batch.go();
      await batch.gone;
      await host.until(() => oom(host, '', 'oom_kill_disable') === 0, 'the memcg is given back');
      expect(await recordIn(host, state)).toMatch(
        /reason (silent|died).*kills batch.*page faults of the guard since it was ready: 0$/ms,
      );
      if (stop) {
        handler.child.kill('SIGCONT');
        await host.until(() => handler.lines.some((line) => line.startsWith('revoked')), 'it is told');
        await sleep(300);
        expect(handler.lines.filter((line) => line.startsWith('report'))).toEqual([]);
      }
      handler.child.kill('SIGKILL');
      await handler.gone;
      expect([web.alive(), oom(host, '', 'oom_kill_disable')]).toEqual([true, 0]);
      await OomHandler.open({ stateDirectory: state, reserve: 0 }).then((next) => next.close());
      await expectAllBack(host, handler, state);
    });
  }

  test('a handler that its owner wants dead rather than silent is killed', async () => {
    const host = newHost();
    const { batch, state } = await stage(host);
    const open = { guard: { ...guard, killHandler: true }, stateDirectory: state };
    const handler = await startHandler(host, open, `options = ${deadlines}; policy = () => { for (;;); };`);
    batch.go();
    await handler.gone;
    expect(handler.child.signalCode).toBe('SIGKILL');
    await batch.gone;
    await expectAllBack(host, handler, state);
  });

  test('a handler killed right after its own kill costs no second job', async () => {
    const host = newHost();
    const { web, batch, state } = await stage(host);
    host.make('second');
    const second = await host.start('second', 'hold --bytes 16MiB');
    const body = `options = ${deadlines}; policy = (snapshot) => { setImmediate(() => process.kill(process.pid, 'SIGKILL')); return lowestPriority(snapshot); };`;
    const handler = await startHandler(host, { guard, stateDirectory: state }, body);
    batch.go();
    await Promise.all([handler.gone, batch.gone]);
    await expectAllBack(host, handler, state);
    await sleep(100);
    expect([web.alive(), second.alive()]).toEqual([true, true]);
  });

  test('a job that has grown since the guard was told dies before one that has not', async () => {
    const host = newHost();
    const { batch, state } = await stage(host);
    host.make('batch-idle');
    const idle = await host.start('batch-idle', 'hold --bytes 2MiB');
    const handler = await startHandler(host, { guard, stateDirectory: state }, `options = ${deadlines};`);
    handler.child.kill('SIGSTOP');
    await sleep(50);
    batch.go();
    await batch.gone;
    expect(idle.alive()).toBe(true);
    handler.child.kill('SIGKILL');
    await handler.gone;
    await OomHandler.open({ stateDirectory: state, reserve: 0 }).then((next) => next.close());
  });

  test('frozen jobs are thawed and a raised limit is put back, in the order that lets nothing slip', async () => {
    const host = newHost();
    const { web, batch, state } = await stage(host);
    const freezer = `/sys/fs/cgroup/freezer${host.path}`;
    for (const name of ['web', 'batch']) {
      mkdirSync(`${freezer}/${name}`, { recursive: true });
      for (const pid of host.pids(name)) writeFileSync(`${freezer}/${name}/cgroup.procs`, String(pid));
    }
    try {
      const ground = fileURLToPath(new URL('../../dist/self/ground.js', import.meta.url));
      const body = `options = ${deadlines};
        const { openGround } = await import(${JSON.stringify(ground)});
        await handler.close();
        const standing = await openGround(${JSON.stringify({ reserve: 0, guard, stateDirectory: state })});
        const second = OomHandler.over(standing);
        await second.watch(${JSON.stringify(host.scope)}, { ...options, policy: () => {
          for (const name of ['web', 'batch']) standing.files.change('freezer', '${host.path}/' + name, 'freezer.state', 'FROZEN');
          standing.files.change('memory', ${JSON.stringify(host.path)}, 'memory.limit_in_bytes', '${72 * MiB}');
          process.kill(process.pid, 'SIGKILL');
        } });
        say('watching', second.guard.pid);
        await new Promise(() => {});`;
      const handler = await startHandler(host, { guard: false, stateDirectory: `${state}-first` }, body);
      batch.go();
      await Promise.all([handler.gone, batch.gone]);
      await expectAllBack(host, handler, state);
      expect(await recordIn(host, state)).toMatch(/page faults of the guard since it was ready: 0$/m);
      expect(host.read('', 'memory.limit_in_bytes').trim()).toBe(String(64 * MiB));
      for (const name of ['web', 'batch'])
        expect(readFileSync(`${freezer}/${name}/freezer.state`, 'utf8').trim()).toBe('THAWED');
      const before = web.stat('iterations');
      await host.until(() => web.stat('iterations') > before, 'the service goes on');
    } finally {
      await host.clear();
      for (const name of ['web', 'batch', '']) rmdirSync(`${freezer}/${name}`);
    }
  });
});

describeHost('the one exception to the bound', () => {
  const newHost = useHost();

  test('where nobody can be killed tasks stay parked, with an alarm, until somebody can', async () => {
    const host = newHost();
    const { web, batch, state } = await stage(host);
    // -1000 can only be written with CAP_SYS_RESOURCE, which is not to be had everywhere: the guard is shown a file.
    const never = `${host.directory}/never`;
    writeFileSync(never, '-1000\n');
    const scores = [web, batch].map(({ pid }) => `/proc/${pid}/oom_score_adj`);
    for (const score of scores) execFileSync('mount', ['--bind', never, score]);
    const unmount = () => {
      for (const score of scores.splice(0)) execFileSync('umount', [score]);
    };
    host.onClear(unmount);
    const options = `options = { ...${deadlines}, jobs: { '*': { protected: true } } };`;
    const handler = await startHandler(host, { guard, stateDirectory: state }, options);
    batch.go();
    await host.until(() => oom(host, '', 'under_oom') === 1, 'the leak waits');
    handler.child.kill('SIGKILL');
    expect(await recordIn(host, state)).toMatch(/ALARM: nobody can be killed/);
    expect([web.alive(), batch.alive(), oom(host, '', 'oom_kill_disable')]).toEqual([true, true, 1]);
    expect(isRunning(handler.guardPid)).toBe(true);
    unmount();
    await host.until(() => oom(host, '', 'oom_kill_disable') === 0, 'the guard has looked again');
    await expectAllBack(host, handler, state);
    await Promise.race([batch.gone, web.gone]); // whom the kernel takes: it is its turn
    expect(await recordIn(host, state)).toMatch(/nobody is parked any more/);
  });
});

describeHost('the guard itself', () => {
  const newHost = useHost();

  test('is small, and sleeps', async () => {
    const host = newHost();
    host.make('', 64 * MiB);
    const { handler } = await host.watch({});
    const status = () => readFileSync(`/proc/${handler.guard?.pid}/status`, 'utf8');
    const number = (key: string) => Number(new RegExp(`^${key}:\\s*(\\d+)`, 'm').exec(status())?.[1]);
    expect(number('VmRSS')).toBeLessThanOrEqual(1536);
    expect(number('VmRSS') - number('VmLck')).toBeLessThanOrEqual(64); // all of it, but what the kernel counts otherwise
    const before = number('voluntary_ctxt_switches');
    await sleep(4_000);
    expect(number('voluntary_ctxt_switches') - before).toBeLessThanOrEqual(6); // the heartbeat, once a second
  });

  for (const signal of ['SIGKILL', 'SIGSTOP'] as const) {
    test(`is replaced after ${signal}, and the next one guards as well`, async () => {
      const host = newHost();
      const { web, batch, state } = await stage(host);
      const handler = await startHandler(host, { guard, stateDirectory: state }, `options = ${deadlines};`);
      process.kill(handler.guardPid, signal);
      await host.until(() => handler.lines.some((line) => line.startsWith('guard ')), 'it is replaced');
      const guardPid = Number(handler.lines.find((line) => line.startsWith('guard '))?.split(' ')[1]);
      expect(isRunning(handler.guardPid)).toBe(false);
      batch.go();
      await host.until(() => oom(host, '', 'under_oom') === 1, 'the leak waits');
      handler.child.kill('SIGKILL');
      await batch.gone;
      await expectAllBack(host, { ...handler, guardPid }, state);
      expect(web.alive()).toBe(true);
    });
  }

  test('that cannot be replaced leaves nothing armed', async () => {
    const host = newHost();
    const { state } = await stage(host);
    const path = `${host.directory}/guard`;
    copyFileSync(guardPath(), path);
    chmodSync(path, 0o755);
    for (const name of ['one', 'two']) host.make(name);
    const body = `
      process.on('SIGUSR2', async () => {
        const watching = ['one', 'two'].map((name) => handler.watch(${JSON.stringify(host.scope)} + '/' + name));
        say('again', ...(await Promise.allSettled(watching)).map(({ status }) => status));
      });`;
    const handler = await startHandler(host, { guard: { ...guard, path }, stateDirectory: state }, body);
    rmSync(path);
    process.kill(handler.guardPid, 'SIGKILL');
    await host.until(() => oom(host, '', 'oom_kill_disable') === 0, 'it is disarmed');
    await host.until(() => handler.lines.some((line) => /^alarm .*guard.*did not start/.test(line)), 'it is said');
    // Once it can be started again, whoever watches has it started, and only once.
    copyFileSync(guardPath(), path);
    chmodSync(path, 0o755);
    handler.child.kill('SIGUSR2');
    await host.until(() => handler.lines.includes('again fulfilled fulfilled'), 'both watch');
    await sleep(200);
    expect(handler.lines.filter((line) => line.startsWith('revoked'))).toEqual([]);
    expect([oom(host, 'one', 'oom_kill_disable'), oom(host, 'two', 'oom_kill_disable')]).toEqual([1, 1]);
    handler.child.kill('SIGTERM');
    await handler.gone;
    expect(readdirSync(state)).toEqual(['records']);
  });

  test('that does not start, or is none, is an error of open(), and nothing stays', async () => {
    const host = newHost();
    const stateDirectory = `${host.directory}/state`;
    for (const path of [`${host.directory}/nothing`, '/bin/true', '/bin/cat']) {
      const opened = OomHandler.open({ reserve: 0, stateDirectory, guard: { path } });
      await expect(opened).rejects.toMatchObject({
        code: 'ERR_REPRIEVE_GUARD',
        message: expect.stringContaining(path),
      });
    }
    expect(readdirSync(stateDirectory)).toEqual(['records']);
  });

  test('two handlers have a guard each', async () => {
    const host = newHost();
    const { batch, state } = await stage(host);
    host.make('other', 32 * MiB);
    const first = await startHandler(host, { guard, stateDirectory: state }, `options = ${deadlines};`);
    const second = await startHandler(
      host,
      { guard, stateDirectory: state },
      `options = ${deadlines};`,
      `${host.scope}/other`,
    );
    batch.go();
    await host.until(() => oom(host, '', 'under_oom') === 1, 'the leak waits');
    first.child.kill('SIGKILL');
    await batch.gone;
    await host.until(() => !isRunning(first.guardPid), 'its guard is gone');
    expect([oom(host, '', 'oom_kill_disable'), oom(host, 'other', 'oom_kill_disable')]).toEqual([0, 1]);
    expect(isRunning(second.guardPid)).toBe(true);
    second.child.kill('SIGTERM');
    await second.gone;
    await host.until(() => !isRunning(second.guardPid), 'the other one is gone too');
    expect(oom(host, 'other', 'oom_kill_disable')).toBe(0);
    expect(readdirSync(state)).toEqual(['records']);
  });

  for (const broken of ['read-only', 'full'] as const) {
    test(`nothing is armed where it cannot be written down: ${broken}`, async () => {
      const host = newHost();
      host.make('', 64 * MiB);
      const tmpfs = host.tmpfs();
      const stateDirectory = `${tmpfs}/state`;
      mkdirSync(stateDirectory);
      if (broken === 'full') spawnSync('fallocate', ['-l', '512M', `${tmpfs}/ballast`]);
      if (broken === 'full')
        spawnSync('dd', ['if=/dev/zero', `of=${tmpfs}/rest`, 'bs=4096', 'status=none'], { stdio: 'ignore' });
      else execFileSync('mount', ['-o', 'remount,ro', tmpfs]);
      const opened = OomHandler.open({ reserve: 0, stateDirectory });
      await expect(opened).rejects.toMatchObject({
        code: 'ERR_REPRIEVE_STATE',
        message: expect.stringContaining(stateDirectory),
      });
      expect(oom(host, '', 'oom_kill_disable')).toBe(0);
    });
  }
});

describeHost('handler and guard killed in the same instant', () => {
  const newHost = useHost();

  async function leaveAll(host: Host, batch: Job, state: string) {
    const handler = await startHandler(host, { guard, stateDirectory: state }, `options = ${deadlines};`);
    expect(host.scoreAdj(batch.pid)).toBe(1000);
    for (const pid of [handler.pid, handler.guardPid]) process.kill(pid, 'SIGSTOP');
    for (const pid of [handler.guardPid, handler.pid]) process.kill(pid, 'SIGKILL');
    await handler.gone;
    host.make('new'); // inherits what nobody puts back
    batch.go();
    await host.until(() => oom(host, '', 'under_oom') === 1, 'the leak waits, and nobody is there');
    return handler;
  }

  test('the next handler puts everything back, also on what was born since', async () => {
    const host = newHost();
    const { web, batch, state } = await stage(host);
    const handler = await leaveAll(host, batch, state);
    expect(oom(host, 'new', 'oom_kill_disable')).toBe(1);
    const next = await OomHandler.open({ reserve: 0, stateDirectory: state });
    const warnings: string[] = [];
    next.on('warning', (message) => warnings.push(message));
    expect(oom(host, 'new', 'oom_kill_disable')).toBe(0);
    await batch.gone; // by the kernel, which found it prepared
    expect(web.alive()).toBe(true);
    await next.close();
    await expectAllBack(host, handler, state);
    await host.until(() => warnings.some((line) => line.includes(host.path)), 'it is said');
  });

  test('so it is where the guard was stopped before: that one is killed', async () => {
    const host = newHost();
    const { web, batch, state } = await stage(host);
    const handler = await startHandler(host, { guard, stateDirectory: state }, `options = ${deadlines};`);
    process.kill(handler.guardPid, 'SIGSTOP');
    handler.child.kill('SIGKILL');
    await handler.gone;
    batch.go();
    await host.until(() => oom(host, '', 'under_oom') === 1, 'the leak waits, and nobody is there');
    const next = await OomHandler.open({ reserve: 0, stateDirectory: state });
    await batch.gone;
    expect(web.alive()).toBe(true);
    await next.close();
    await expectAllBack(host, handler, state);
  });

  test('reprieve restore does the same by hand, and says before what it would do', async () => {
    const host = newHost();
    const { web, batch, state } = await stage(host);
    host.setScoreAdj(web.pid, 7);
    const handler = await leaveAll(host, batch, state);
    const restore = (...args: string[]) =>
      spawnSync(process.execPath, [cli, 'restore', '--directory', state, ...args], { encoding: 'utf8' });
    const dry = restore('--dry-run');
    expect([dry.status, dry.stdout]).toEqual([0, expect.stringContaining(`memory.oom_control of ${host.path}`)]);
    expect([oom(host, '', 'oom_kill_disable'), host.scoreAdj(batch.pid)]).toEqual([1, 1000]);
    expect(restore()).toMatchObject({ status: 0 });
    await batch.gone;
    expect(host.scoreAdj(web.pid)).toBe(7);
    await expectAllBack(host, handler, state);
    expect(restore()).toMatchObject({ status: 0, stdout: expect.stringMatching(/nothing/i) });
  });

  test('a memcg that was removed and made anew is another one', async () => {
    const host = newHost();
    host.make('', 64 * MiB);
    const state = `${host.directory}/state`;
    const handler = await startHandler(host, { guard, stateDirectory: state });
    for (const pid of [handler.pid, handler.guardPid]) process.kill(pid, 'SIGSTOP');
    for (const pid of [handler.guardPid, handler.pid]) process.kill(pid, 'SIGKILL');
    await handler.gone;
    rmdirSync(host.file('', ''));
    host.make('', 64 * MiB);
    host.write('', 'memory.oom_control', 1); // somebody else's wish
    const next = await OomHandler.open({ reserve: 0, stateDirectory: state });
    await next.close();
    expect(oom(host, '', 'oom_kill_disable')).toBe(1);
  });
});
