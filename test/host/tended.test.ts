import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, mkdirSync, readdirSync, readFileSync, rmdirSync, writeFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { expect, test } from 'vitest';
import { readCgroupMounts } from '../../src/cgroup/mounts.js';
import { recordIn } from '../support/guarded.js';
import { isRunning } from '../support/handler-process.js';
import { describeHost, type Host, useHost } from '../support/memcg.js';

const unified = readCgroupMounts().find(({ version }) => version === 2)?.point;
const dist = (module: string) => JSON.stringify(fileURLToPath(new URL(`../../dist/${module}.js`, import.meta.url)));

describeHost('a guard of a scope where nobody parks', () => {
  const newHost = useHost();

  /** A process that has a job of cgroup v2 frozen, as a handler has, and then does as `then` says. */
  async function begin(host: Host, then: string, handleWithin = 30_000) {
    const group = `${unified}/${host.name}`;
    mkdirSync(group);
    const job = spawn('sleep', ['60']);
    host.onClear(async () => {
      writeFileSync(`${group}/cgroup.freeze`, '0');
      job.kill('SIGKILL');
      await once(job, 'exit');
      await host.until(() => /populated 0/.test(readFileSync(`${group}/cgroup.events`, 'utf8')), 'the job is gone');
      rmdirSync(group);
    });
    writeFileSync(`${group}/cgroup.procs`, String(job.pid));
    const state = `${host.directory}/state`;
    const text = `
      import { native } from ${dist('native')};
      import { ControlFiles } from ${dist('guard/control-files')};
      import { SharedEpoch } from ${dist('guard/epoch')};
      import { openInstance } from ${dist('guard/instance')};
      import { GuardProcess } from ${dist('guard/process')};
      const epoch = new SharedEpoch();
      const mounts = { memory: '${unified}', unified: '${unified}' };
      const instance = openInstance('${state}', mounts, epoch);
      let hear = () => {};
      const events = new (native().EventSet)(new Int32Array(16), () => hear());
      const hierarchy = { openChannel: (heard) => { hear = heard; return new (native().Channel)(events); } };
      const guard = new GuardProcess(hierarchy, instance, epoch, { within: 500, silence: 300 }, (start) => start());
      await guard.start();
      const scope = { inode: 7, path: '/${host.name}' };
      const files = new ControlFiles(instance.ledger, epoch, mounts);
      guard.tend(scope, { respondWithin: 300, handleWithin: ${handleWithin} });
      guard.opened(scope);
      files.change('unified', '/${host.name}', 'cgroup.freeze', '1');
      await guard.settled();
      setInterval(() => { epoch.beat(); guard.heartbeat(); }, 100);
      console.log(guard.pid);
      epoch.onRevoked = () => console.log('revoked');
      ${then}`;
    const child = spawn(process.execPath, ['--input-type=module', '-e', text], {
      stdio: ['ignore', 'pipe', 'inherit'],
    });
    const gone = once(child, 'exit');
    host.onClear(async () => {
      child.kill('SIGKILL');
      await gone;
    });
    let said = '';
    child.stdout.setEncoding('utf8').on('data', (chunk: string) => {
      said += chunk;
    });
    await host.until(() => said.includes('\n') || child.exitCode !== null, 'it has frozen the job');
    const guardPid = Number.parseInt(said, 10);
    const frozen = () => readFileSync(`${group}/cgroup.freeze`, 'utf8') === '1\n';
    return { child, guardPid, frozen, state, said: () => said };
  }

  const isMounted = unified !== undefined;

  test.skipIf(!isMounted)('thaws when the handler is killed, and leaves nothing', async () => {
    const host = newHost();
    const { child, guardPid, frozen, state } = await begin(host, '');
    expect(frozen()).toBe(true);
    child.kill('SIGKILL');
    await host.until(() => !frozen(), 'the job is thawed');
    await host.until(() => !isRunning(guardPid), 'the guard is gone');
    expect(readdirSync(state)).toEqual(['records']);
    expect(await recordIn(host, state)).toMatch(/reason died[\s\S]*put back: cgroup\.freeze of/);
  });

  test.skipIf(!isMounted).each([
    { when: 'in a condition', next: '' },
    { when: 'with nobody left to kill', next: 'guard.parked(scope); await guard.settled();' },
  ])('thaws when the handler is stopped $when', async ({ next }) => {
    const host = newHost();
    // Within respondWithin and silence, 600 ms together, and not only once the condition is open for too long.
    const { child, frozen, state } = await begin(host, next, 1_500);
    child.kill('SIGSTOP');
    await host.until(() => !frozen(), 'the job is thawed', 10_000);
    expect(await recordIn(host, state)).toContain('reason silent');
    child.kill('SIGCONT');
  });

  test.skipIf(!isMounted)('thaws when a condition is open for too long, and revokes the handler', async () => {
    const host = newHost();
    const { frozen, state, said } = await begin(host, '', 1_000);
    await host.until(() => !frozen(), 'the job is thawed', 10_000);
    expect(await recordIn(host, state)).toContain('reason overdue');
    await host.until(() => said().includes('revoked'), 'the handler is told');
  });

  test.skipIf(!isMounted)(
    'does nothing where the condition has ended, and nothing after the scope was given up',
    async () => {
      const host = newHost();
      const done = `guard.resolved(scope); files.putBackAll(true); guard.disarm(scope); await guard.settled();
      await new Promise((resolve) => setTimeout(resolve, 2_500));
      console.log('revoked?', epoch.revoked, 'needed?', guard.isNeeded);
      guard.dismiss(true); await guard.gone(); instance.remove(); process.exit(0);`;
      const { child, frozen, state, said } = await begin(host, done, 1_500);
      await host.until(() => child.exitCode !== null, 'it has closed');
      expect(said()).toContain('revoked? false needed? false');
      expect(frozen()).toBe(false);
      expect(existsSync(`${state}/records`) && readdirSync(`${state}/records`)).toEqual([]);
    },
  );
});
