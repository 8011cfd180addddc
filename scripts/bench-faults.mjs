#!/usr/bin/env node
// What the way from event to kill meets in reprieve's own thread: page faults, context switches, pauses of the collector;
// with the drill and without, in turns within one run. See docs/benchmark.md.
import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import { cpus, loadavg, release, tmpdir } from 'node:os';
import { parseArgs } from 'node:util';
import { findMemoryV1, readCgroupMounts } from '../dist/cgroup/mounts.js';
import { workloadPath } from '../dist/native.js';
import { bytesOf, formatBytes } from '../dist/units.js';
import { Contender, reprieve } from './bench/contenders.mjs';
import { playEpisode } from './bench/episode.mjs';
import { measureRounds } from './bench/kept.mjs';
import { Stage } from './bench/stage.mjs';
import { histogram, percentile } from './bench/summary.mjs';
import { compile, root } from './cache.mjs';

const USAGE = `Usage: npm run bench:faults -- [options]

  --conditions N   for each shape, with the drill, with a fixed heap too, and without (200)
  --limit SIZE     of the memcg (128MiB)
  --json           print every condition as JSON
  --help           print this`;
const SHAPES = { 'one leaking process': 1, 'eight leaking processes': 8 };
/** Processes of a victim whose killing is measured by itself. */
const VICTIMS = [1, 8, 64];
const SIDES = { drill: [], 'fixed heap': ['--fixed-heap'], 'no drill': ['--no-drill'] };
/** A run that takes longer than this for each condition is stopped, and shows what it has. */
const MEAN_CONDITION_MS = 2_000;

function parse() {
  const { values } = parseArgs({
    options: {
      conditions: { type: 'string', default: '200' },
      limit: { type: 'string', default: '128MiB' },
      json: { type: 'boolean', default: false },
      help: { type: 'boolean', default: false },
    },
  });
  const conditions = Number(values.conditions);
  if (!Number.isInteger(conditions) || conditions < 1) throw new Error('--conditions must be a whole number from 1 on');
  return { ...values, conditions, limit: bytesOf(values.limit, '--limit') };
}

async function run({ conditions, limit }, mount, signal) {
  const observer = compile('reprieve-observer', [`${root}/native/bench/observer.cc`]);
  const folder = mkdtempSync(`${existsSync('/dev/shm') ? '/dev/shm' : tmpdir()}/reprieve-bench-`);
  const sides = Object.entries(SIDES).map(([name, args], index) => {
    const path = `/reprieve-test-faults-${process.pid}-${index}`;
    const stage = new Stage({ point: mount.point, path, files: `${folder}/${index}`, workload: workloadPath() });
    return new Contender(name, stage, reprieve(args));
  });
  const shapes = Object.keys(SHAPES).map((shape) => ({ shape, played: sides.map(() => []) }));
  try {
    for (const side of sides) {
      await side.stage.open(limit, observer);
      await side.start({});
    }
    for (const { shape, played } of shapes) {
      for (let round = 0; round < conditions; round++) {
        for (const [index, contender] of sides.entries()) {
          const setup = { stage: contender.stage, contender, processes: SHAPES[shape], signal };
          played[index].push(await playEpisode(setup));
        }
        if (process.stderr.isTTY) process.stderr.write(`\r${shape}: ${round + 1} of ${conditions}\x1b[K\r`);
      }
    }
  } finally {
    await Promise.allSettled(sides.map((side) => side.close()));
    rmSync(folder, { recursive: true, force: true });
  }
  return shapes.map(({ shape, played }) => ({
    shape,
    sides: Object.fromEntries(sides.map(({ name }, index) => [name, played[index]])),
  }));
}

/** Of those that went well: what was met, and how long it took. */
function figures(played) {
  const good = played.filter(({ failures }) => failures.length === 0);
  const sum = (of) => good.reduce((total, episode) => total + of(episode), 0);
  const times = good.map(({ wakeToKill }) => wakeToKill).sort((a, b) => a - b);
  return {
    played: played.length,
    good: good.length,
    faultless: good.filter(({ faults }) => faults === 0).length,
    faults: histogram(good.map(({ faults }) => faults)),
    voluntary: sum(({ contextSwitches }) => contextSwitches.voluntary),
    involuntary: sum(({ contextSwitches }) => contextSwitches.involuntary),
    collections: sum(({ collections }) => collections.count),
    collectionsUs: Math.round(sum(({ collections }) => collections.us)),
    p50: percentile(times, 50),
    p99: percentile(times, 99),
  };
}

function printRounds(rounds) {
  console.log('\none round of the killer, without the deed, median:');
  for (const { processes, opened, kept } of rounds) {
    const ratio = (opened / kept).toFixed(2);
    console.log(
      `  ${String(processes).padStart(2)} processes: ${opened.toFixed(1)} µs; with their descriptors held ` +
        `${kept.toFixed(1)} µs (ratio ${ratio})`,
    );
  }
}

function print(shapes) {
  for (const { shape, sides } of shapes) {
    console.log(`\n${shape}, from event to kill:`);
    const all = Object.entries(sides).map(([name, played]) => [name, figures(played)]);
    for (const [name, of] of all) {
      const part = ((100 * of.faultless) / of.good).toFixed(1);
      const seen = [...of.faults].map(([faults, count]) => `${faults}: ${count}`).join(', ');
      console.log(`  ${name}: ${of.good} of ${of.played} conditions went well`);
      console.log(`    without a page fault  ${of.faultless} (${part} %); conditions by faults: ${seen}`);
      console.log(`    context switches      ${of.voluntary} voluntary, ${of.involuntary} involuntary, in all`);
      console.log(`    collector             ${of.collections} pauses, ${of.collectionsUs} µs, in all`);
      console.log(`    wake-up to SIGKILL    p50 ${of.p50} µs, p99 ${of.p99} µs`);
    }
    const [[first, best], ...others] = all;
    for (const [name, of] of others) {
      const ratio = (column) => (of[column] / best[column]).toFixed(2);
      console.log(`  ${name}/${first}: p50 ${ratio('p50')}, p99 ${ratio('p99')}`);
    }
  }
}

async function main() {
  const options = parse();
  if (options.help) return console.log(USAGE);
  const mount = findMemoryV1(readCgroupMounts());
  if (mount === undefined) throw new Error('there is no cgroup v1 memory hierarchy here');
  if (process.geteuid() !== 0) throw new Error('only root makes memcgs and real-time processes');
  const stop = new AbortController();
  const total = options.conditions * Object.keys(SHAPES).length * Object.keys(SIDES).length;
  const seconds = 30 + (total * MEAN_CONDITION_MS) / 1000;
  const tooLong = setTimeout(() => stop.abort(new Error(`it took longer than ${seconds} s`)), seconds * 1000);
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) process.on(signal, () => stop.abort(new Error(signal)));
  const loadBefore = loadavg()[0].toFixed(2);
  try {
    const shapes = await run(options, mount, stop.signal);
    const rounds = [];
    for (const processes of VICTIMS) rounds.push({ processes, ...(await measureRounds(mount.point, processes)) });
    if (options.json) return console.log(JSON.stringify({ shapes, rounds }));
    console.log(
      `Linux ${release()}, ${cpus().length} × ${cpus()[0].model}, Node ${process.version}, limit ` +
        `${formatBytes(options.limit)}, load ${loadBefore} to ${loadavg()[0].toFixed(2)}`,
    );
    print(shapes);
    printRounds(rounds);
  } finally {
    clearTimeout(tooLong);
  }
}

main().catch((error) => {
  console.error(`bench: ${error.message}`);
  process.exitCode = 1;
});
