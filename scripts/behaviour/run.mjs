// Runs the behaviour tests where they are to be run: on this machine, or in a virtual one.
import { spawn } from 'node:child_process';
import { relative } from 'node:path';
import { text } from 'node:stream/consumers';
import { root } from '../cache.mjs';
import { bundleSuite, suite } from './bundle.mjs';

/** Where: the environment that the tests are told, and the options of scripts/vm.mjs, or null on this machine. */
export const PLACES = {
  v1: { environment: 'v1', vm: null },
  'v1-vm': { environment: 'v1', vm: ['--cgroup', 'v1'] },
  v2: { environment: 'v2', vm: ['--cgroup', 'v2'] },
  'v2-hold': { environment: 'v2-hold', vm: ['--cgroup', 'v2'] },
  'system-v1': { environment: 'system-v1', vm: ['--cgroup', 'v1'] },
  'system-v2': { environment: 'system-v2', vm: ['--cgroup', 'v2'] },
  'system-plain': { environment: 'system-plain', vm: ['--cgroup', 'none'] },
};

const SIGNALS = ['SIGINT', 'SIGTERM', 'SIGHUP'];

/** An emulated machine is twenty times slower than this one: what the drill costs is time, and it changes no behaviour. */
const IN_VM = ['--memory', '1GiB', '--timeout', '600', '--env', 'REPRIEVE_EMULATED=1'];

/**
 * @param {keyof typeof PLACES} place
 * @param {{ only?: string, list?: boolean }} options `only`: a pattern for the ids; `list`: say what there is, run nothing
 * @returns {Promise<{ code: number, results: { id: string, sentence: string, differences: Record<string, { verdict: string,
 *   why: string }>, status?: string, ms?: number, failure?: string }[] }>}
 */
export async function runSuite(place, { only = '', list = false } = {}) {
  await bundleSuite();
  const { environment, vm } = PLACES[place];
  const words = [relative(root, suite), only, ...(list ? ['--list'] : [])];
  const command =
    vm === null
      ? words
      : [
          'scripts/vm.mjs',
          ...IN_VM,
          ...vm,
          '--env',
          `REPRIEVE_ENVIRONMENT=${environment}`,
          '--',
          process.execPath,
          ...words,
        ];
  const child = spawn(process.execPath, command, {
    cwd: root,
    stdio: ['ignore', 'pipe', 'inherit'],
    env: { ...process.env, REPRIEVE_ENVIRONMENT: environment },
  });
  const end = (signal) => child.kill(signal); // a machine that nobody waits for is not to run on
  for (const signal of SIGNALS) process.once(signal, end);
  const code = new Promise((resolve, reject) => {
    child.on('error', reject);
    child.on('close', resolve);
  });
  const [told, status] = await Promise.all([text(child.stdout), code]);
  for (const signal of SIGNALS) process.removeListener(signal, end);
  if (told === '') throw new Error(`${place}: the tests came to no end (exit code ${status})`);
  return { code: status, results: JSON.parse(told) };
}
