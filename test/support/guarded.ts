// What the tests of the guard share: a scene, quick deadlines, and how everything looks when it is back.
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { expect } from 'vitest';
import { type HandlerProcess, isRunning } from './handler-process.js';
import { type Host, type Job, MiB } from './memcg.js';

/** The guard's deadlines, which are tried, are quick; the handler's leave a slow machine the time to do what is to be tried first. */
export const guard = { within: 2_000, silence: 300 };
export const deadlines =
  '{ respondWithin: 2_000, clearWithin: 2_000, handleWithin: 10_000, jobs: { "web*": { priority: 90 }, "batch*": { priority: 10 } } }';
export const bound = 10_000 + 2_000 + 300 + 2_000;

/** A scope with a service of 20 MiB and a job that is about to leak. */
export async function stage(host: Host): Promise<{ web: Job; batch: Job; state: string }> {
  host.make('', 64 * MiB);
  for (const name of ['web', 'batch']) host.make(name);
  const web = await host.start('web', 'work --set 20MiB');
  const batch = await host.start('batch', 'leak --every 0', { gate: true });
  return { web, batch, state: `${host.directory}/state` };
}

export const oom = (host: Host, below: string, key: string) => host.field(below, 'memory.oom_control', key);

/** Everything is as it was before the handler came, and nobody of it is there. */
export async function expectAllBack(host: Host, handler: HandlerProcess, state: string) {
  await host.until(() => !isRunning(handler.guardPid), 'the guard is gone');
  for (const below of ['', 'web', 'batch']) expect(oom(host, below, 'oom_kill_disable')).toBe(0);
  expect(readdirSync(state)).toEqual(['records']);
  expect(existsSync(`/sys/fs/cgroup/memory/reprieve-handler-${handler.pid}`)).toBe(false);
}

export async function recordIn(host: Host, state: string): Promise<string> {
  await host.until(() => readdirSync(`${state}/records`).length > 0, 'there is a record');
  const [name] = readdirSync(`${state}/records`);
  return readFileSync(`${state}/records/${name}`, 'utf8').replaceAll('\0', '');
}
