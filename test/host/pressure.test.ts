import { execFile, spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, mkdirSync, rmdirSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { promisify } from 'node:util';
import { expect, test } from 'vitest';
import { readCgroupMounts } from '../../src/cgroup/mounts.js';
import { native } from '../../src/native.js';
import { describeHost, type Host, MiB, useHost } from '../support/memcg.js';

const run = promisify(execFile);
/** A window of 2 s is allowed without CAP_SYS_RESOURCE as well. */
const TRIGGER = 'some 100000 2000000';
const unified = readCgroupMounts().find(({ version }) => version === 2)?.point;

describeHost('pressure stall information', () => {
  const newHost = useHost();

  /** Stalls on the reclaim of pages that have to be written first: a file that does not fit, over and over. */
  function thrash(host: Host): void {
    host.make('', 16 * MiB);
    const write = `dd if=/dev/zero of=${host.directory}/file bs=1M count=64 2> /dev/null`;
    const script = `echo 0 > ${host.file('', 'cgroup.procs')}; while :; do ${write}; done`;
    const child = spawn('timeout', ['40', 'sh', '-c', script], { stdio: 'ignore' });
    host.onClear(async () => {
      child.kill();
      await once(child, 'exit');
    });
  }

  function trigger(host: Host, directory: string, name: string, onEvent: (atUs: number) => void) {
    const opened = new (native().Directory)(directory);
    host.onClear(() => opened.close());
    const made = new (native().PressureTrigger)(opened, name, TRIGGER, onEvent);
    host.onClear(() => made.close());
    return made;
  }

  /** A v2 cgroup of the test's own. */
  function makeGroup(host: Host): string {
    const group = `${unified}/${host.name}`;
    mkdirSync(group);
    host.onClear(() => existsSync(group) && rmdirSync(group));
    return group;
  }

  test.skipIf(!existsSync('/proc/pressure/memory'))(
    'an event is told at most once a window, with its time',
    async () => {
      const host = newHost();
      const events: number[] = [];
      trigger(host, '/proc/pressure', 'memory', (atUs) => events.push(atUs));
      thrash(host);
      await host.until(() => events.length >= 2, 'two windows with stalls');
      const [first = 0, second = 0] = events;
      expect(second - first).toBeGreaterThan(1_000_000);
      expect(native().nowUs() - second).toBeLessThan(20_000_000);
    },
  );

  test.skipIf(unified === undefined)('one whose cgroup is removed stops, and keeps nothing busy', async () => {
    const host = newHost();
    const group = makeGroup(host);
    const events: number[] = [];
    const made = trigger(host, group, 'memory.pressure', (atUs) => events.push(atUs));
    rmdirSync(group);
    const before = process.cpuUsage();
    await sleep(500);
    const used = process.cpuUsage(before);
    expect(used.user + used.system).toBeLessThan(250_000);
    expect(events).toEqual([]);
    made.unref();
    made.close();
    made.close();
    expect(() => made.ref()).toThrow(expect.objectContaining({ code: 'ERR_REPRIEVE_CLOSED' }));
  });

  test.skipIf(unified === undefined)('bad input is refused as everywhere', () => {
    const host = newHost();
    const directory = new (native().Directory)(makeGroup(host));
    host.onClear(() => directory.close());
    const make = (name: unknown, text: unknown, onEvent: unknown = () => {}) =>
      new (native().PressureTrigger)(directory, name as string, text as string, onEvent as () => void);
    expect(() => make('memory.pressure', 'some 1 60000000')).toThrow(
      expect.objectContaining({ code: 'EINVAL', syscall: 'write' }),
    );
    expect(() => make('memory.pressures', TRIGGER)).toThrow(expect.objectContaining({ code: 'ENOENT' }));
    expect(() => make('memory.pressure', 5)).toThrow(expect.objectContaining({ code: 'ERR_INVALID_ARG_TYPE' }));
    expect(() => make('memory.pressure', TRIGGER, null)).toThrow('Expected `onEvent` to be a function');
  });

  test.skipIf(!existsSync('/proc/pressure/memory'))('an exception is an uncaught one, and a worker ends', async () => {
    const host = newHost();
    thrash(host);
    const dist = JSON.stringify(new URL('../../dist/native.js', import.meta.url).href);
    const make = (then: string) =>
      `const { native } = await import(${dist});
       const n = native();
       new n.PressureTrigger(new n.Directory('/proc/pressure'), 'memory', '${TRIGGER}', () => { ${then} });`;
    const uncaught = `process.on('uncaughtException', ({ message }) => { console.log(message); process.exit(7); });`;
    const inNode = (text: string) => run(process.execPath, ['--input-type=module', '-e', text], { timeout: 20_000 });
    await expect(inNode(`${uncaught} ${make("throw new Error('told')")}`)).rejects.toMatchObject({
      code: 7,
      stdout: 'told\n',
    });
    const inWorker = `import { Worker } from 'node:worker_threads';
      const text = ${JSON.stringify(`${make('')} (await import('node:worker_threads')).parentPort.postMessage(1);`)};
      const worker = new Worker(new URL('data:text/javascript,' + encodeURIComponent(text)));
      worker.once('message', async () => console.log('ended', await worker.terminate()));`;
    expect((await inNode(inWorker)).stdout).toBe('ended 1\n');
  });
});
