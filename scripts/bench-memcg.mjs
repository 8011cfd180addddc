#!/usr/bin/env node
// How long an out-of-memory condition of a real memcg lasts: with reprieve, with a bare listener, and with the kernel's
// own killer, in turns within one run. See docs/benchmark.md.
import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import { cpus, loadavg, release, tmpdir } from 'node:os';
import { parseArgs } from 'node:util';
import { findMemoryV1, readCgroupMounts } from '../dist/cgroup/mounts.js';
import { workloadPath } from '../dist/native.js';
import { bytesOf, formatBytes } from '../dist/units.js';
import { CONTENDERS, Contender } from './bench/contenders.mjs';
import { playEpisode } from './bench/episode.mjs';
import { Stage } from './bench/stage.mjs';
import { renderTable, summarise } from './bench/summary.mjs';
import { compile, root } from './cache.mjs';

const USAGE = `Usage: npm run bench:memcg -- [options]

  --episodes N     for each contender and shape (40)
  --shape SHAPE    one or eight leaking processes, or both (both)
  --limit SIZE     of the memcg (128MiB)
  --json           print every episode and the summary as JSON
  --help           print this`;
const SHAPES = { one: 1, eight: 8 };
/** A run that takes longer than this for each episode is stopped, and shows what it has. */
const MEAN_EPISODE_MS = 2_000;

function parse() {
  const { values } = parseArgs({
    options: {
      episodes: { type: 'string', default: '40' },
      shape: { type: 'string', default: 'both' },
      limit: { type: 'string', default: '128MiB' },
      json: { type: 'boolean', default: false },
      help: { type: 'boolean', default: false },
    },
  });
  const episodes = Number(values.episodes);
  if (!Number.isInteger(episodes) || episodes < 1) throw new Error('--episodes must be a whole number from 1 on');
  if (values.shape !== 'both' && !(values.shape in SHAPES)) throw new Error('--shape must be one, eight or both');
  const shapes = values.shape === 'both' ? Object.keys(SHAPES) : [values.shape];
  return { ...values, episodes, shapes, limit: bytesOf(values.limit, '--limit') };
}

async function run({ episodes, shapes, limit }, signal) {
  const mount = findMemoryV1(readCgroupMounts());
  if (mount === undefined) throw new Error('there is no cgroup v1 memory hierarchy here');
  if (process.geteuid() !== 0) throw new Error('only root makes memcgs and real-time processes');
  const source = (name) => compile(`reprieve-${name}`, [`${root}/native/bench/${name}.cc`]);
  const tools = { listener: source('listener'), observer: source('observer'), workload: workloadPath() };

  const folder = mkdtempSync(`${existsSync('/dev/shm') ? '/dev/shm' : tmpdir()}/reprieve-bench-`);
  const contenders = Object.keys(CONTENDERS).map((name) => {
    const path = `/reprieve-test-bench-${process.pid}-${name}`;
    const stage = new Stage({ point: mount.point, path, files: `${folder}/${name}`, workload: tools.workload });
    return new Contender(name, stage);
  });
  const results = shapes.map((shape) => ({ shape, episodes: contenders.map(() => []) }));
  let stopped = null;
  try {
    for (const contender of contenders) {
      await contender.stage.open(limit, tools.observer); // before the contender: the kernel signals the latest first
      await contender.start(tools);
    }
    for (const { shape, episodes: played } of results) {
      for (let round = 0; round < episodes; round++) {
        for (const offset of contenders.keys()) {
          const turn = (round + offset) % contenders.length;
          const contender = contenders[turn];
          const setup = { stage: contender.stage, contender, processes: SHAPES[shape], signal };
          played[turn].push(await playEpisode(setup));
        }
        if (process.stderr.isTTY) process.stderr.write(`\r${shape}: ${round + 1} of ${episodes}\x1b[K\r`);
      }
    }
  } catch (error) {
    if (!signal.aborted) throw error;
    stopped = signal.reason.message;
  } finally {
    await Promise.allSettled(contenders.map((contender) => contender.close()));
    rmSync(folder, { recursive: true, force: true });
  }
  const byName = (values) => Object.fromEntries(contenders.map(({ name }, index) => [name, values[index]]));
  return {
    stopped,
    shapes: results.map(({ shape, episodes: played }) => ({
      shape,
      summaries: byName(played.map(summarise)),
      episodes: byName(played),
    })),
  };
}

function print({ stopped, shapes }, { limit, json }, machine) {
  if (json) {
    console.log(JSON.stringify({ limit, machine, stopped, shapes }));
    return;
  }
  const { kernel, cores, cpu, node, load } = machine;
  console.log(
    `Linux ${kernel}, ${cores} × ${cpu}, Node ${node}, limit ${formatBytes(limit)}, load ${load.join(' to ')}`,
  );
  for (const { shape, summaries } of shapes) {
    const title = `Shape ${shape}: ${SHAPES[shape]} leaking process${SHAPES[shape] === 1 ? '' : 'es'}`;
    console.log(`\n${renderTable(title, summaries)}`);
  }
  if (stopped !== null) console.log(`\nStopped early: ${stopped}.`);
}

/** The kernel's failures are a finding; the two handlers have to succeed. */
function failed({ stopped, shapes }) {
  return (
    stopped !== null ||
    shapes.some(({ summaries }) => ['reprieve', 'listener'].some((name) => summaries[name].succeeded === 0))
  );
}

async function main() {
  const options = parse();
  if (options.help) return console.log(USAGE);
  const stop = new AbortController();
  const total = options.episodes * options.shapes.length * Object.keys(CONTENDERS).length;
  const seconds = 30 + (total * MEAN_EPISODE_MS) / 1000;
  const tooLong = setTimeout(() => stop.abort(new Error(`it took longer than ${seconds} s`)), seconds * 1000);
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) process.on(signal, () => stop.abort(new Error(signal)));

  const load = () => loadavg()[0].toFixed(2);
  const loadBefore = load();
  try {
    const result = await run(options, stop.signal);
    const machine = { kernel: release(), cores: cpus().length, cpu: cpus()[0].model, node: process.version };
    print(result, options, { ...machine, load: [loadBefore, load()] });
    if (failed(result)) process.exitCode = 1;
  } finally {
    clearTimeout(tooLong);
  }
}

main().catch((error) => {
  console.error(`bench: ${error.message}`);
  process.exitCode = 1;
});
