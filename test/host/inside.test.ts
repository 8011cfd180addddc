// A handler that lives in the very memcg that is full.
import { existsSync, readFileSync, rmdirSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { expect, test } from 'vitest';
import type { Report } from '../../src/index.js';
import { deadlines, expectAllBack, guard, oom, recordIn, stage } from '../support/guarded.js';
import { type HandlerProcess, isRunning, startHandler } from '../support/handler-process.js';
import { describeHost, type Host, MiB, useHost } from '../support/memcg.js';

const EPISODES = 200;

const lowest = `options = ${deadlines}; policy = lowestPriority;
  handler.on('report', (report) => say('json', JSON.stringify(report)));`;

/** Path of a process's memcg. */
function placeOf(pid: number): string | undefined {
  return /memory:(.*)/.exec(readFileSync(`/proc/${pid}/cgroup`, 'utf8'))?.[1];
}

const refugeOf = ({ pid }: HandlerProcess) => `/reprieve-handler-${pid}`;
const open = (host: Host, more: object = {}) => ({
  ownMemcg: 'step-out',
  guard,
  reserve: '1MiB',
  stateDirectory: `${host.directory}/state`,
  ...more,
});

function reportsOf({ lines }: HandlerProcess): Report[] {
  return lines.filter((line) => line.startsWith('json ')).map((line) => JSON.parse(line.slice(5)));
}

const textOf = (report: Report | undefined) => report?.steps.map(({ text }) => text).join('\n');

/** One that leaks in a memcg below the scope, until it is killed. */
async function leakIn(host: Host, below: string): Promise<void> {
  const leak = await host.start(below, 'leak --every 0', { gate: true });
  leak.go();
  await leak.gone;
}

function room(host: Host, mib: number): void {
  host.make('', mib * MiB);
  for (const name of ['web', 'batch']) host.make(name);
}

describeHost('a handler that steps out of what it watches', () => {
  const newHost = useHost();

  // Once in some thousand episodes it is parked before it is out, and the guard acts: docs/how-it-works.md. So a second try.
  test(`kills the right one, and is back, ${EPISODES} times of ${EPISODES}`, {
    timeout: 180_000,
    retry: 1,
  }, async () => {
    const host = newHost();
    room(host, 128);
    const web = await host.start('web', 'work --set 20MiB --timeout 180s');
    const handler = await startHandler(host, open(host), lowest, host.scope, '');
    for (let episode = 1; episode <= EPISODES; episode++) {
      await leakIn(host, 'batch');
      await host.until(() => reportsOf(handler).length >= episode, 'the report');
      await host.until(() => placeOf(handler.pid) === host.path, 'it is back');
    }
    const reports = reportsOf(handler);
    expect(reports.map(({ outcome, victims }) => [outcome, ...victims.map(({ name }) => name)])).toEqual(
      Array(EPISODES).fill(['cleared', 'batch']),
    );
    for (const report of reports) {
      expect(textOf(report)).toContain(`stepped out of ${host.path} in`);
      expect(textOf(report)).not.toMatch(/ENOMEM|failed/);
    }
    expect(handler.lines.filter((line) => !/^(json|report|watching)/.test(line))).toEqual([]);
    expect([web.alive(), oom(host, 'batch', 'oom_kill'), placeOf(handler.guardPid)]).toEqual([
      true,
      0,
      refugeOf(handler),
    ]);
    handler.child.kill('SIGTERM');
    await handler.gone;
    await expectAllBack(host, handler, `${host.directory}/state`);
  });

  test('and is killed in the midst of an episode: what it started outside goes back, and nobody stays parked', async () => {
    const host = newHost();
    const { web, batch, state } = await stage(host);
    host.write('', 'memory.limit_in_bytes', 128 * MiB);
    const body = `${lowest} const { spawn } = await import('node:child_process');
      policy = () => { say('child', spawn('sleep', ['60'], { stdio: 'ignore' }).pid); return new Promise(() => {}); };`;
    const handler = await startHandler(host, open(host), body, host.scope, '');
    expect(placeOf(handler.pid)).toBe(host.path);
    batch.go();
    await host.until(() => handler.lines.some((line) => line.startsWith('child')), 'it is asked');
    const child = Number(/^child (\d+)$/m.exec(handler.lines.join('\n'))?.[1]);
    host.onClear(() => process.kill(child, 'SIGKILL'));
    expect([placeOf(handler.pid), placeOf(child)]).toEqual([refugeOf(handler), refugeOf(handler)]);
    handler.child.kill('SIGKILL');
    await Promise.all([handler.gone, batch.gone]);
    await expectAllBack(host, handler, state);
    expect([web.alive(), placeOf(child)]).toEqual([true, host.path]);
    expect(await recordIn(host, state)).toMatch(/reason died/);
    // It takes what it used itself with it: the leak may go on until the memcg, with nobody's handler, is full again.
    expect((await recordIn(host, state)).includes('kills batch') || oom(host, 'batch', 'oom_kill') === 1).toBe(true);
  });

  test('and does not take what it starts from where that has gone by itself', async () => {
    const host = newHost();
    host.make('', 160 * MiB);
    for (const below of ['home', 'batch', 'jobs']) host.make(below);
    const join = `echo 0 >${host.file('jobs', 'cgroup.procs')} && exec sleep 60`;
    const body = `${lowest} const { spawn } = await import('node:child_process');
      handler.on('report', () => say('child', spawn('/bin/sh', ['-c', ${JSON.stringify(join)}], { stdio: 'ignore' }).pid));`;
    const handler = await startHandler(host, open(host), body, host.scope, 'home');
    for (let episode = 1; episode <= 5; episode++) {
      await leakIn(host, 'batch');
      await host.until(() => handler.lines.filter((line) => line.startsWith('child')).length === episode, 'it reports');
    }
    await sleep(3_000); // it fetches what it has started once a second
    const children = handler.lines.filter((line) => line.startsWith('child')).map((line) => Number(line.split(' ')[1]));
    expect(children.map(placeOf)).toEqual(Array(5).fill(`${host.path}/jobs`));
  });

  test('and stays outside when the memcg that it came from was removed', async () => {
    const host = newHost();
    room(host, 128);
    host.make('home');
    const body = `${lowest} options.respondWithin = 5_000;
      policy = async (snapshot) => { say('asked'); await new Promise((go) => process.once('SIGUSR2', go)); return lowestPriority(snapshot); };`;
    const handler = await startHandler(host, open(host), body, host.scope, 'home');
    expect(placeOf(handler.pid)).toBe(`${host.path}/home`);
    for (let episode = 1; episode <= 2; episode++) {
      const leaked = leakIn(host, 'batch');
      await host.until(() => handler.lines.filter((line) => line === 'asked').length === episode, 'it is asked');
      if (episode === 1) rmdirSync(host.file('home', ''));
      handler.child.kill('SIGUSR2');
      await leaked;
      await host.until(() => reportsOf(handler).length === episode, 'the report');
    }
    expect(handler.lines.filter((line) => line.startsWith('warning'))).toEqual([
      expect.stringMatching(/^warning The handler stays in \/reprieve-handler-\d+: it cannot go back .*ENODEV/),
    ]);
    expect(placeOf(handler.pid)).toBe(refugeOf(handler));
    handler.child.kill('SIGTERM');
    await handler.gone;
    await expectAllBack(host, handler, `${host.directory}/state`);
  });

  test('and is short of descriptors for a while says so, and goes on', async () => {
    const host = newHost();
    room(host, 128);
    const body = `${lowest} const { closeSync, openSync } = await import('node:fs');
      process.on('SIGUSR2', () => {
        const held = [];
        try { for (;;) held.push(openSync('/dev/null')); } catch {}
        setTimeout(() => { for (const fd of held) closeSync(fd); say('had', held.length); }, 2_500);
      });`;
    const handler = await startHandler(host, open(host), body, host.scope, '');
    handler.child.kill('SIGUSR2');
    await Promise.race([
      host.until(() => handler.lines.some((line) => line.startsWith('had')), 'it is over'),
      handler.gone,
    ]);
    expect(handler.lines).toContainEqual(
      expect.stringMatching(/^warning looking for programs that were started outside: .*EMFILE/),
    );
    await leakIn(host, 'batch');
    await host.until(() => reportsOf(handler).length === 1, 'the report');
    expect(reportsOf(handler)[0]?.victims.map(({ name }) => name)).toEqual(['batch']);
    handler.child.kill('SIGTERM');
    await handler.gone;
  });

  test('of two watches goes out for the one that holds it, with what it starts there, and not for the other', async () => {
    const host = newHost();
    host.make('', 192 * MiB);
    host.make('home', 128 * MiB);
    host.make('home/batch');
    host.make('other', 32 * MiB);
    host.make('other/batch');
    const body = `${lowest} const { readFileSync } = await import('node:fs');
      const { spawn } = await import('node:child_process');
      policy = (snapshot) => {
        const [, at] = readFileSync('/proc/self/cgroup', 'utf8').match(/memory:(.*)/);
        if (at.startsWith('/reprieve-handler')) say('child', spawn('sleep', ['60'], { stdio: 'ignore' }).pid);
        say('at', at);
        return lowestPriority(snapshot);
      };
      for (const below of ['home', 'other']) await handler.watch(${JSON.stringify(host.scope)} + '/' + below, { policy, ...options });`;
    const handler = await startHandler(host, open(host), body, host.scope, 'home');
    for (const [below, place] of [
      ['other', `${host.path}/home`],
      ['home', refugeOf(handler)],
      ['other', `${host.path}/home`],
    ] as const) {
      const before = handler.lines.length;
      await leakIn(host, `${below}/batch`);
      await host.until(() => handler.lines.slice(before).some((line) => line.startsWith('json')), 'the report');
      expect(handler.lines.slice(before).filter((line) => line.startsWith('at'))).toEqual([`at ${place}`]);
      await host.until(() => placeOf(handler.pid) === `${host.path}/home`, 'it is back');
    }
    const child = Number(/^child (\d+)$/m.exec(handler.lines.join('\n'))?.[1]);
    host.onClear(() => process.kill(child, 'SIGKILL'));
    await host.until(() => placeOf(child) === `${host.path}/home`, 'what it started there follows');
    expect(placeOf(handler.guardPid)).toBe(refugeOf(handler));
    handler.child.kill('SIGTERM');
    await handler.gone;
    expect(existsSync(`/sys/fs/cgroup/memory${refugeOf(handler)}`)).toBe(false);
  });

  test('has its guard outside, the one that replaces it as well', async () => {
    const host = newHost();
    room(host, 128);
    const handler = await startHandler(host, open(host), lowest, host.scope, '');
    process.kill(handler.guardPid, 'SIGKILL');
    await host.until(() => handler.lines.some((line) => line.startsWith('guard')), 'it is replaced');
    const second = Number(/^guard (\d+)$/m.exec(handler.lines.join('\n'))?.[1]);
    expect([placeOf(second), placeOf(handler.pid)]).toEqual([refugeOf(handler), host.path]);
    handler.child.kill('SIGTERM');
    await handler.gone;
    await host.until(() => !isRunning(second), 'the guard is gone');
    expect(existsSync(`/sys/fs/cgroup/memory${refugeOf(handler)}`)).toBe(false);
  });
});

describeHost('a handler that may not leave what it watches', () => {
  const newHost = useHost();

  test('says what it cannot do, and has the guard kill the right one', async () => {
    const host = newHost();
    const { web, batch, state } = await stage(host);
    host.write('', 'memory.limit_in_bytes', 128 * MiB);
    const handler = await startHandler(host, open(host, { ownMemcg: false }), lowest, host.scope, '');
    expect([placeOf(handler.pid), placeOf(handler.guardPid)]).toEqual([host.path, refugeOf(handler)]);
    batch.go();
    await batch.gone;
    // V8 may end it, when the kernel refuses it memory: the guard acts then as well.
    const isDead = () => handler.child.signalCode === 'SIGABRT';
    await host.until(() => isDead() || handler.lines.some((line) => line.startsWith('revoked')), 'it is told');
    const cannot = /neither open a file nor list processes \(ENOMEM\), and a page fault of its own parks it/;
    const told = handler.lines.filter((line) => /^(warning|revoked)/.test(line));
    expect(told[0]).toMatch(/^warning .* holds this handler .*: while that is full .* the guard acts for it/);
    // Where a page fault has parked it until the guard was done, there was nothing left to report on.
    for (const text of [...told, ...reportsOf(handler).map(textOf)]) {
      expect(text).toMatch(cannot);
      expect(text).not.toMatch(/failed|kills/);
    }
    expect(await recordIn(host, state)).toMatch(/kills batch/);
    expect([web.alive(), oom(host, 'batch', 'oom_kill')]).toEqual([true, 0]);
    if (!isDead()) expect(placeOf(handler.pid)).toBe(host.path);
    await expectAllBack(host, handler, state);
    handler.child.kill('SIGKILL');
  });
});

describeHost('a limit that is raised by the reserve', () => {
  const newHost = useHost();
  const both = 'memory.memsw.limit_in_bytes';
  /** In MiB, the one of memory and swap together last: without swap accounting it is not there. */
  const limits = (host: Host) =>
    ['memory.limit_in_bytes', both]
      .filter((name) => existsSync(host.file('', name)))
      .map((name) => Number(host.read('', name)) / MiB);
  const expectLimits = (host: Host, ...mib: number[]) =>
    expect(limits(host)).toEqual(mib.slice(0, limits(host).length));
  const setBoth = (host: Host, mib: number) => limits(host).length === 2 && host.write('', both, mib * MiB);
  const closing = `options.raiseLimit = true;
    process.on('SIGUSR2', () => handler.watches[0].close().then(() => say('closed')));`;

  for (const ownMemcg of ['step-out', false] as const) {
    test(`while a handler with ownMemcg ${ownMemcg} watches it, is put back exactly`, async () => {
      const host = newHost();
      room(host, 128);
      setBoth(host, 160);
      const handler = await startHandler(host, open(host, { ownMemcg, reserve: '16MiB' }), closing, host.scope, '');
      expectLimits(host, 144, 176);
      handler.child.kill('SIGUSR2');
      await host.until(() => handler.lines.includes('closed'), 'it is closed');
      expectLimits(host, 128, 160);
      handler.child.kill('SIGTERM');
      await handler.gone;
    });
  }

  test('is put back when the handler is killed', async () => {
    const host = newHost();
    room(host, 128);
    setBoth(host, 128);
    const handler = await startHandler(host, open(host, { reserve: '16MiB' }), closing, host.scope, '');
    handler.child.kill('SIGKILL');
    await handler.gone;
    await expectAllBack(host, handler, `${host.directory}/state`);
    expectLimits(host, 128, 128);
  });

  test('and cannot be put back as more is used, is said to be, and put back once less is', async () => {
    const host = newHost();
    room(host, 128);
    const handler = await startHandler(host, open(host, { reserve: '32MiB' }), closing, host.scope, '');
    const used = () => Number(host.read('', 'memory.usage_in_bytes'));
    const hog = await host.start('batch', `hold --bytes ${132 * MiB - used()}`);
    await host.until(() => used() > 129 * MiB, 'it holds it');
    handler.child.kill('SIGUSR2');
    await host.until(() => handler.lines.includes('closed'), 'it is closed');
    const warning = /^warning the limit of .* is put back once less is used/;
    await host.until(() => handler.lines.some((line) => warning.test(line)), 'it is said');
    expect([limits(host)[0], hog.alive()]).toEqual([160, true]);
    hog.child.kill('SIGKILL');
    await host.until(() => limits(host)[0] === 128, 'it is put back');
    handler.child.kill('SIGTERM');
    await handler.gone;
    await expectAllBack(host, handler, `${host.directory}/state`);
  });
});
