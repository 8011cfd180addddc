#!/usr/bin/env node
// What becomes of a whole machine that a job leaks full, under each handler in turn, in a virtual machine of 1 GiB. See
// docs/comparison.md.
import { spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { writeFileSync } from 'node:fs';
import { cpus, loadavg } from 'node:os';
import { createInterface } from 'node:readline';
import { parseArgs } from 'node:util';
import { workloadPath } from '../dist/native.js';
import { HANDLERS } from './bench-system/handlers.mjs';
import { MEMORY, SHAPES, SWAP } from './bench-system/scenario.mjs';
import { judge, renderTables } from './bench-system/summary.mjs';
import { compile, root } from './cache.mjs';

const USAGE = `Usage: npm run bench:system -- [options]

  --runs N             of each shape, swap and handler (3)
  --shapes LIST        of ${Object.keys(SHAPES).join(', ')} (all)
  --swap on|off|both   (both)
  --handlers LIST      of ${Object.keys(HANDLERS).join(', ')} (all that are installed)
  --quick              one run of each shape without swap, for none, prepared, oomd-set and reprieve
  --json FILE          every run and the summary as JSON
  --help               print this`;
const QUICK = ['none', 'prepared', 'oomd-set', 'reprieve'];
const SWAPS = { on: [true], off: [false], both: [false, true] };
/** A boot, and a run that never ends; most take 15 s. */
const BOOT_SECONDS = 60;
const RUN_SECONDS = 300;

function listOf(text, known, option) {
  const names = text.split(',');
  const stranger = names.find((name) => !Object.hasOwn(known, name));
  if (stranger !== undefined)
    throw new Error(`Expected ${option} to be of ${Object.keys(known).join(', ')}, got ${stranger}`);
  return names;
}

function parse() {
  const { values } = parseArgs({
    options: {
      runs: { type: 'string' },
      shapes: { type: 'string', default: Object.keys(SHAPES).join(',') },
      swap: { type: 'string' },
      handlers: { type: 'string' },
      quick: { type: 'boolean', default: false },
      json: { type: 'string' },
      help: { type: 'boolean', default: false },
    },
  });
  const runs = Number(values.runs ?? (values.quick ? 1 : 3));
  if (!Number.isInteger(runs) || runs < 1)
    throw new Error(`Expected --runs to be a whole number from 1 on, got ${values.runs}`);
  const swap = values.swap ?? (values.quick ? 'off' : 'both');
  if (!Object.hasOwn(SWAPS, swap)) throw new Error(`Expected --swap to be on, off or both, got ${swap}`);
  const known = values.quick ? QUICK.filter((name) => name in HANDLERS) : Object.keys(HANDLERS);
  const handlers =
    values.handlers === undefined ? known.filter(isInstalled) : listOf(values.handlers, HANDLERS, '--handlers');
  return { ...values, runs, swaps: SWAPS[swap], handlers, shapes: listOf(values.shapes, SHAPES, '--shapes') };
}

function isInstalled(name) {
  const { needs } = HANDLERS[name];
  if (needs === undefined || spawnSync('which', [needs]).status === 0) return true;
  console.error(`${name} is left out: ${needs} is not installed (Debian: apt-get install ${needs})`);
  return false;
}

/** One boot: all runs of one handler with or without swap. Its runs come as they are over. */
async function* boot({ handler, swap, shapes, runs, programs }, signal) {
  const played = shapes.flatMap((shape) => Array.from({ length: runs }, (_, run) => ({ shape, run })));
  const plan = JSON.stringify({ handler, programs, runs: played });
  const timeout = BOOT_SECONDS + played.length * RUN_SECONDS;
  const machine = [
    '--memory',
    MEMORY,
    '--cgroup',
    'v2',
    '--timeout',
    String(timeout),
    ...(swap ? ['--swap', SWAP] : []),
  ];
  const environment = ['PATH', 'HOME'].flatMap((name) => ['--env', `${name}=${process.env[name] ?? ''}`]);
  const command = [process.execPath, 'scripts/bench-system/guest.mjs', plan];
  const vm = spawn(process.execPath, ['scripts/vm.mjs', ...machine, ...environment, '--', ...command], {
    cwd: root,
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  const kill = () => vm.kill('SIGTERM');
  signal.addEventListener('abort', kill, { once: true });
  const ended = once(vm, 'close');
  let told = 0;
  for await (const line of createInterface({ input: vm.stdout })) {
    if (line.startsWith('{')) yield { handler, swap, ...JSON.parse(line), number: ++told };
    else console.error(line);
  }
  const [code] = await ended;
  signal.removeEventListener('abort', kill);
  if (signal.aborted) return;
  for (const { shape, run } of played.slice(told)) {
    yield { handler, swap, shape, run, error: `the machine ended before (${code})` };
  }
}

function progress(result, verdict, done, total, startedAt) {
  const minutes = ((performance.now() - startedAt) / 60_000).toFixed(1);
  const where = `${result.handler}, ${result.shape}, ${result.swap ? 'swap' : 'no swap'}, run ${result.run + 1}`;
  console.error(`[${minutes} min, ${done} of ${total}] ${where}: ${verdict.sentence}`);
}

async function main() {
  const options = parse();
  if (options.help) return console.log(USAGE);
  const programs = {
    workload: workloadPath(),
    sampler: compile('reprieve-sampler', [`${root}/native/bench/sampler.cc`], {
      headers: [`${root}/native/workload/workload.h`],
    }),
  };
  const stop = new AbortController();
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) process.once(signal, () => stop.abort(new Error(signal)));

  const startedAt = performance.now();
  const load = [loadavg()[0]];
  const results = [];
  const total = options.swaps.length * options.handlers.length * options.shapes.length * options.runs;
  for (const swap of options.swaps) {
    for (const handler of options.handlers) {
      if (stop.signal.aborted) break;
      for await (const result of boot({ ...options, handler, swap, programs }, stop.signal)) {
        const verdict = judge(result);
        results.push({ ...result, verdict });
        progress(result, verdict, results.length, total, startedAt);
      }
    }
  }
  load.push(loadavg()[0]);
  const machine = {
    cpu: cpus()[0].model,
    cores: cpus().length,
    load,
    minutes: (performance.now() - startedAt) / 60_000,
  };
  console.log(renderTables(results, machine));
  if (stop.signal.aborted) {
    console.log(`\nStopped early: ${stop.signal.reason.message}.`);
    process.exitCode = 1;
  }
  if (options.json !== undefined) writeFileSync(options.json, JSON.stringify({ machine, results }, null, 1));
}

main().catch((error) => {
  console.error(`bench: ${error.message}`);
  process.exitCode = 1;
});
