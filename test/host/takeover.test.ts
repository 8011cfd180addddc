import { execFileSync } from 'node:child_process';
import { mkdirSync, readdirSync, readFileSync, rmdirSync, writeFileSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { expect, test } from 'vitest';
import { OomHandler } from '../../src/index.js';
import { expectAllBack, guard, oom, recordIn, stage } from '../support/guarded.js';
import { isRunning, startHandler } from '../support/handler-process.js';
import { describeHost, type Host, MiB, useHost } from '../support/memcg.js';

const jobs = '{ "web*": { priority: 90 }, "batch*": { priority: 10 } }';
const ground = JSON.stringify(fileURLToPath(new URL('../../dist/self/ground.js', import.meta.url)));

/** A cgroup of the freezer, with some processes in it; thawed and removed when the test is over. */
function freezerOf(host: Host, pids: number[]) {
  const directory = `/sys/fs/cgroup/freezer${host.path}`;
  mkdirSync(directory);
  for (const pid of pids) writeFileSync(`${directory}/cgroup.procs`, String(pid));
  const state = (value?: string) =>
    value === undefined
      ? readFileSync(`${directory}/freezer.state`, 'utf8').trim()
      : writeFileSync(`${directory}/freezer.state`, value);
  host.onClear(async () => {
    state('THAWED');
    for (const pid of pids) writeFileSync('/sys/fs/cgroup/freezer/cgroup.procs', String(pid));
    rmdirSync(directory);
  });
  return state;
}

describeHost('whose out-of-memory it is', () => {
  const newHost = useHost();

  /** A service with a limit of its own that it is near to, and a job beside it that will fill the whole scope. */
  async function nested(host: Host) {
    host.make('', 96 * MiB);
    host.make('web', 40 * MiB);
    host.make('batch');
    const web = await host.start('web', 'hold --bytes 39MiB');
    const batch = await host.start('batch', 'leak --every 0', { gate: true });
    return { web, batch, state: `${host.directory}/state` };
  }

  test('a memcg below the full one that is near its own limit loses nobody', async () => {
    const host = newHost();
    const { web, batch, state } = await nested(host);
    const body = `options = { jobs: ${jobs} }; await handler.watch(${JSON.stringify(host.scope)} + '/web', { policy });`;
    const handler = await startHandler(host, { guard, stateDirectory: state }, body);
    batch.go();
    await host.until(() => oom(host, '', 'under_oom') === 1, 'the leak waits');
    handler.child.kill('SIGKILL');
    await batch.gone;
    await expectAllBack(host, handler, state);
    expect(web.alive()).toBe(true);
  });

  test('nor does its shorter deadline end a handler that is within the one of the full one', async () => {
    const host = newHost();
    const { web, batch, state } = await nested(host);
    const body = `options = { jobs: ${jobs}, respondWithin: 4_000, handleWithin: 8_000 };
      await handler.watch(${JSON.stringify(host.scope)} + '/web', { policy, respondWithin: 100, clearWithin: 200, handleWithin: 500 });
      policy = async (snapshot) => { await new Promise((resolve) => setTimeout(resolve, 2_500)); return lowestPriority(snapshot); };`;
    const handler = await startHandler(host, { guard, stateDirectory: state }, body);
    batch.go();
    await batch.gone;
    await host.until(() => handler.lines.some((line) => line.startsWith('report')), 'it is over');
    expect(handler.lines.filter((line) => /^(report|revoked|alarm)/.test(line))).toEqual(['report cleared batch']);
    expect([web.alive(), isRunning(handler.guardPid)]).toEqual([true, true]);
  });

  test('with `recursive` the guard knows the jobs of each memcg', async () => {
    const host = newHost();
    host.make('');
    host.make('group', 64 * MiB);
    for (const name of ['web', 'batch']) host.make(`group/${name}`);
    const web = await host.start('group/web', 'hold --bytes 30MiB');
    const batch = await host.start('group/batch', 'leak --every 0', { gate: true });
    const state = `${host.directory}/state`;
    const body =
      'options = { recursive: true, jobs: { "group/web": { priority: 90 }, "group/batch": { priority: 10 } } };';
    const handler = await startHandler(host, { guard, stateDirectory: state }, body);
    batch.go();
    await host.until(() => oom(host, 'group', 'under_oom') === 1, 'the leak waits');
    handler.child.kill('SIGKILL');
    await batch.gone;
    expect(await recordIn(host, state)).toMatch(/kills group\/batch/);
    expect([web.alive(), oom(host, 'group/batch', 'oom_kill')]).toEqual([true, 0]);
  });

  test('a raised limit in one memcg costs nobody in another', async () => {
    const host = newHost();
    for (const [name, limit] of [
      ['one', 32],
      ['two', 64],
    ] as const)
      host.make(name, limit * MiB);
    for (const name of ['one/batch', 'two/web']) host.make(name);
    const state = `${host.directory}/state`;
    const web = await host.start('two/web', 'hold --bytes 20MiB');
    const batch = await host.start('one/batch', 'leak --every 0 --cap 36MiB', { gate: true });
    const body = `
      const { openGround } = await import(${ground});
      await handler.close();
      const standing = await openGround(${JSON.stringify({ reserve: 0, guard, stateDirectory: state })});
      const second = OomHandler.over(standing);
      const path = ${JSON.stringify(host.path)};
      await second.watch('memcg:' + path + '/two', { policy });
      await second.watch('memcg:' + path + '/one', { respondWithin: 5_000, handleWithin: 9_000, policy: async () => {
        standing.files.change('memory', path + '/one', 'memory.limit_in_bytes', '${48 * MiB}');
        setTimeout(() => {
          for (const name of ['/one', '/two']) standing.hierarchy.guard.opened(standing.hierarchy.open(path + name));
          setTimeout(() => process.kill(process.pid, 'SIGKILL'), 100);
        }, 300);
        await new Promise(() => {});
      } });
      say('watching', second.guard.pid);
      await new Promise(() => {});`;
    const handler = await startHandler(host, { guard: false, stateDirectory: `${state}-first` }, body);
    batch.go();
    await Promise.all([handler.gone, batch.gone]);
    await host.until(() => !isRunning(handler.guardPid), 'the guard is gone');
    expect(host.read('one', 'memory.limit_in_bytes').trim()).toBe(String(32 * MiB));
    expect(web.alive()).toBe(true);
  });

  test('a process that was moved elsewhere is not killed for where it was', async () => {
    const host = newHost();
    host.make('', 48 * MiB);
    const other = `${host.file('', '')}-other`;
    mkdirSync(other);
    const moved = await host.start('', 'hold --bytes 20MiB --name batch');
    const leak = await host.start('', 'leak --every 0 --name web', { gate: true });
    host.onClear(async () => {
      moved.child.kill('SIGKILL');
      await moved.gone;
      await host.until(() => readFileSync(`${other}/cgroup.procs`, 'utf8') === '', 'it is empty');
      rmdirSync(other);
    });
    const state = `${host.directory}/state`;
    const handler = await startHandler(host, { guard, stateDirectory: state }, `options = { jobs: ${jobs} };`);
    handler.child.kill('SIGSTOP');
    writeFileSync(`${other}/cgroup.procs`, String(moved.pid));
    leak.go();
    await leak.gone;
    await host.until(() => oom(host, '', 'oom_kill_disable') === 0, 'the memcg is given back');
    expect(moved.alive()).toBe(true);
  });
});

describeHost('waits that no signal tells of', () => {
  const newHost = useHost();

  for (const [how, body] of [
    ['was stopped', ''],
    ['loops for ever', 'options.recursive = true; setTimeout(() => { say("loops"); for (;;); }, 300);'],
  ] as const) {
    test(`in a memcg that was made below while the handler ${how}`, async () => {
      const host = newHost();
      host.make('', 64 * MiB);
      const state = `${host.directory}/state`;
      const handler = await startHandler(host, { guard, stateDirectory: state }, body);
      if (body === '') handler.child.kill('SIGSTOP');
      else await host.until(() => handler.lines.includes('loops'), 'it loops');
      host.make('new', 16 * MiB);
      expect(oom(host, 'new', 'oom_kill_disable')).toBe(1);
      const leak = await host.start('new', 'leak --every 0');
      await leak.gone;
      expect(await recordIn(host, state)).toMatch(/reason silent/);
      expect([oom(host, '', 'oom_kill_disable'), oom(host, 'new', 'oom_kill_disable')]).toEqual([0, 0]);
    });
  }

  test('in the freezer, after the condition is over, as the handler loops for ever', async () => {
    const host = newHost();
    const { web, batch, state } = await stage(host);
    const frozen = freezerOf(host, [web.pid]);
    const body = `
      const { openGround } = await import(${ground});
      await handler.close();
      const standing = await openGround(${JSON.stringify({ reserve: 0, guard, stateDirectory: state })});
      const second = OomHandler.over(standing);
      second.on('report', () => { say('report'); for (;;); });
      await second.watch(${JSON.stringify(host.scope)}, { respondWithin: 5_000, handleWithin: 9_000, jobs: ${jobs}, policy: async () => {
        standing.files.change('freezer', ${JSON.stringify(host.path)}, 'freezer.state', 'FROZEN');
        say('frozen');
        await new Promise(() => {});
      } });
      say('watching', second.guard.pid);
      await new Promise(() => {});`;
    const handler = await startHandler(host, { guard: false, stateDirectory: `${state}-first` }, body);
    batch.go();
    await host.until(() => handler.lines.includes('frozen'), 'it is frozen');
    batch.child.kill('SIGKILL'); // by somebody else
    await host.until(() => handler.lines.includes('report'), 'it is over');
    await host.until(() => frozen() === 'THAWED', 'it is thawed');
    expect(await recordIn(host, state)).toMatch(/reason silent/);
    handler.child.kill('SIGKILL');
  });

  test('in the freezer, for longer than a condition may last, though the handler lives', async () => {
    const host = newHost();
    const { web, batch, state } = await stage(host);
    const frozen = freezerOf(host, [web.pid]);
    const body = `
      const { openGround } = await import(${ground});
      await handler.close();
      const standing = await openGround(${JSON.stringify({ reserve: 0, guard, stateDirectory: state })});
      const second = OomHandler.over(standing);
      second.on('revoked', (why) => say('revoked', why));
      await second.watch(${JSON.stringify(host.scope)}, { respondWithin: 300, clearWithin: 300, handleWithin: 600, jobs: ${jobs}, policy: async () => {
        standing.files.change('freezer', ${JSON.stringify(host.path)}, 'freezer.state', 'FROZEN');
        // As one whose own clock has gone wrong: the condition is never ended.
        standing.hierarchy.clock.after = () => () => {};
        setInterval(() => standing.guard.epoch.beat(), 20);
        await new Promise(() => {});
      } });
      say('watching', second.guard.pid);
      await new Promise(() => {});`;
    const handler = await startHandler(host, { guard: false, stateDirectory: `${state}-first` }, body);
    batch.go();
    await host.until(() => frozen() === 'FROZEN', 'it is frozen');
    await host.until(() => frozen() === 'THAWED', 'it is thawed');
    expect(await recordIn(host, state)).toMatch(/reason overdue/);
    handler.child.kill('SIGKILL');
  });
});

describeHost('a handler that lives on', () => {
  const newHost = useHost();

  test('does the rest itself when its guard is killed in the midst of it', async () => {
    const host = newHost();
    const { web, batch, state } = await stage(host);
    freezerOf(host, [web.pid])('FROZEN'); // by somebody else: a victim that does not die
    const body = `options = { jobs: { web: { priority: 10 }, batch: { priority: 90 } }, respondWithin: 100 };
      policy = () => { const end = Date.now() + 1_500; while (Date.now() < end); };`;
    const handler = await startHandler(host, { guard, stateDirectory: state }, body);
    batch.go();
    await host.until(() => /State:\s*D/.test(readFileSync(`/proc/${web.pid}/status`, 'utf8')), 'it is frozen');
    await host.until(() => host.read('', 'memory.oom_control').includes('under_oom 1'), 'the leak waits');
    await sleep(700); // the guard has begun after 400 ms, and waits a second for a death that does not come
    process.kill(handler.guardPid, 'SIGKILL');
    await host.until(() => handler.lines.some((line) => line.startsWith('revoked')), 'it is told, and has closed');
    await batch.gone;
    for (const below of ['', 'web', 'batch']) expect(oom(host, below, 'oom_kill_disable')).toBe(0);
    expect(readdirSync(state)).toEqual(['records']);
    handler.child.kill('SIGKILL');
  });

  test('and was revoked may open another at once, which finds everything as it was', async () => {
    const host = newHost();
    const { web, batch, state } = await stage(host);
    const open = JSON.stringify({ reserve: 0, guard, stateDirectory: state });
    const body = `options = { jobs: ${jobs}, respondWithin: 100 };
      policy = () => { const end = Date.now() + 1_500; while (Date.now() < end); };
      handler.on('revoked', async () => {
        const next = await OomHandler.open(${open});
        await next.watch(${JSON.stringify(host.scope)}, { policy: lowestPriority });
        say('next');
        process.on('SIGUSR2', () => next.close().then(() => say('closed')));
      });`;
    const handler = await startHandler(host, { guard, stateDirectory: state }, body);
    batch.go();
    await host.until(() => handler.lines.includes('next'), 'the next one watches');
    expect(oom(host, '', 'oom_kill_disable')).toBe(1);
    handler.child.kill('SIGUSR2');
    await host.until(() => handler.lines.includes('closed'), 'it has closed');
    expect([oom(host, '', 'oom_kill_disable'), web.alive()]).toEqual([0, true]);
    handler.child.kill('SIGKILL');
    await handler.gone;
    expect(readdirSync(state)).toEqual(['records']);
  });

  test('and closes in good order is not killed for what it cannot put back', async () => {
    const host = newHost();
    host.make('', 32 * MiB);
    host.make('job');
    const state = `${host.directory}/state`;
    const open = JSON.stringify({ reserve: 0, guard: { ...guard, killHandler: true }, stateDirectory: state });
    const body = `
      const { openGround } = await import(${ground});
      await handler.close();
      const standing = await openGround(${open});
      const second = OomHandler.over(standing);
      await second.watch(${JSON.stringify(host.scope)}, { policy });
      standing.files.change('memory', ${JSON.stringify(host.path)}, 'memory.limit_in_bytes', '${64 * MiB}');
      second.on('revoked', (why) => say('revoked', why));
      say('watching', second.guard.pid);
      process.on('SIGUSR2', () => second.close().then(() => setImmediate(() => say('closed'))));
      await new Promise(() => setInterval(() => {}, 1_000));`;
    const handler = await startHandler(host, { guard: false, stateDirectory: `${state}-first` }, body);
    const job = await host.start('job', 'hold --bytes 40MiB'); // more than the limit that goes back
    await host.until(() => Number(host.read('job', 'memory.usage_in_bytes')) > 38 * MiB, 'it holds it');
    handler.child.kill('SIGUSR2');
    await host.until(() => handler.lines.includes('closed'), 'it has closed');
    expect([job.alive(), isRunning(handler.pid), oom(host, '', 'oom_kill_disable')]).toEqual([true, true, 0]);
    expect(handler.lines.filter((line) => line.startsWith('revoked'))).toEqual([]);
    expect(await recordIn(host, state)).toMatch(/reason left/);
    handler.child.kill('SIGKILL');
    await handler.gone;
    job.child.kill('SIGKILL');
    await job.gone;
    await OomHandler.open({ stateDirectory: state, reserve: 0 }).then((next) => next.close());
    expect(host.read('', 'memory.limit_in_bytes').trim()).toBe(String(32 * MiB));
    expect(readdirSync(state)).toEqual(['records']);
  });

  test('and watches what two others have left armed does not take that for what was there', async () => {
    const host = newHost();
    const { state } = await stage(host);
    const handler = await host.handler({ stateDirectory: state });
    const other = await startHandler(host, { guard, stateDirectory: state });
    for (const pid of [other.pid, other.guardPid]) process.kill(pid, 'SIGSTOP');
    for (const pid of [other.guardPid, other.pid]) process.kill(pid, 'SIGKILL');
    await other.gone;
    expect(oom(host, '', 'oom_kill_disable')).toBe(1);
    await handler.watch(host.scope);
    await handler.close();
    expect(oom(host, '', 'oom_kill_disable')).toBe(0);
  });
});

describeHost('who may die', () => {
  const newHost = useHost();

  test('a job that came right before the caller was asked is known', async () => {
    const host = newHost();
    host.make('', 64 * MiB);
    const state = `${host.directory}/state`;
    const keep = await host.start('', 'hold --bytes 8MiB');
    const body = `
      const watch = handler.watch(${JSON.stringify(host.scope)}, { respondWithin: 3_000 });
      await watch;
      say('watching', handler.guard.pid);
      for await (const condition of watch) for (;;);`;
    const handler = await startHandler(host, { guard, stateDirectory: state }, body);
    const leak = await host.start('', 'leak --every 0');
    await leak.gone;
    await host.until(() => !isRunning(handler.guardPid), 'the guard is gone');
    expect([keep.alive(), oom(host, '', 'oom_kill')]).toEqual([true, 0]);
    handler.child.kill('SIGKILL');
  });

  test('a job that is protected in the midst of a condition lives', async () => {
    const host = newHost();
    const { web, batch, state } = await stage(host);
    const body =
      'options = { respondWithin: 6_000, clearWithin: 6_000, handleWithin: 12_000, jobs: { web: { priority: 10 }, batch: { priority: 90 } } };';
    const handler = await startHandler(host, { guard, stateDirectory: state }, body);
    batch.go();
    await host.until(() => oom(host, '', 'under_oom') === 1, 'the leak waits');
    execFileSync('setfattr', ['-n', 'user.reprieve.protected', '-v', 'true', host.file('web', '')]);
    await sleep(100);
    handler.child.kill('SIGKILL');
    await batch.gone;
    await expectAllBack(host, handler, state);
    expect(web.alive()).toBe(true);
  });

  test('a job that was killed, and was started again, is one like others', async () => {
    const host = newHost();
    const { web, batch, state } = await stage(host);
    web.child.kill('SIGKILL');
    await web.gone;
    const leak = await host.start('web', 'leak --every 0', { gate: true });
    const body = `options = { jobs: ${jobs} };
      let first = true;
      policy = (snapshot) => {
        if (!first) return new Promise(() => {});
        first = false;
        return { action: 'kill', victim: snapshot.jobs.find(({ name }) => name === 'web').id, because: 'it leaks' };
      };`;
    const handler = await startHandler(host, { guard, stateDirectory: state }, body);
    leak.go();
    await host.until(() => handler.lines.includes('report cleared web'), 'it is killed');
    const again = await host.start('web', 'hold --bytes 20MiB');
    batch.go();
    await host.until(() => oom(host, '', 'under_oom') === 1, 'the other one waits');
    handler.child.kill('SIGKILL');
    await batch.gone;
    await expectAllBack(host, handler, state);
    expect(again.alive()).toBe(true);
  });

  test('a memcg that had its own oom_kill_disable keeps it, whatever becomes of the handler', async () => {
    const host = newHost();
    const { batch, state } = await stage(host);
    host.make('own');
    host.write('own', 'memory.oom_control', 1);
    const body = `options = { jobs: ${jobs}, respondWithin: 100 };
      policy = () => { const end = Date.now() + 800; while (Date.now() < end); };`;
    const handler = await startHandler(host, { guard, stateDirectory: state }, body);
    batch.go();
    await host.until(() => handler.lines.some((line) => line.startsWith('revoked')), 'it is told');
    expect([oom(host, '', 'oom_kill_disable'), oom(host, 'own', 'oom_kill_disable')]).toEqual([0, 1]);
    handler.child.kill('SIGKILL');
  });
});
