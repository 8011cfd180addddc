#!/usr/bin/env node
// Injects faults at random moments of out-of-memory episodes on real memcgs, and looks whether anybody waits for too
// long, the wrong one dies, or something is left. See docs/reliability.md.
import { existsSync, mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { release, tmpdir } from 'node:os';
import { parseArgs } from 'node:util';
import { findMemoryV1, readCgroupMounts } from '../dist/cgroup/mounts.js';
import { workloadPath } from '../dist/native.js';
import { BOUND_MS, NEXT_START_MS } from './chaos/bounds.mjs';
import { buildGuard, buildObserver } from './chaos/build.mjs';
import { playEpisode } from './chaos/episode.mjs';
import { FAULTS } from './chaos/faults.mjs';
import { KernelLog } from './chaos/kernel-log.mjs';
import { sanitized } from './chaos/sanitize.mjs';
import { describe, drawScenario } from './chaos/scenario.mjs';
import { PREFIX, sweep } from './chaos/stage.mjs';
import { renderTable, summarise } from './chaos/table.mjs';

/** What can be switched off: the guard as a whole, or a part of what it does, by the name of the mutant. */
const MUTATIONS = {
  guard: null,
  restoration: 'restore',
  thaw: 'thaw',
  scores: 'scores',
  kills: 'kills',
  restraint: 'restraint',
  windows: 'windows',
};
const USAGE = `Usage: npm run chaos -- [options]

  --seed N          the same seed plays the same scenarios (from the clock)
  --episodes N      how many (40)
  --replay SEED:N   plays one of them again, and tells all of it
  --faults A,B      only these (all): ${Object.keys(FAULTS).join(', ')}
  --without WHAT    ${Object.keys(MUTATIONS).join(', ')}: switched off, to see that it is missed
  --sanitize        addon and guard under AddressSanitizer and UBSan
  --wall-clock      also set the machine's clock, for the length of an episode
  --stop            after the first violation
  --json            print every episode as JSON
  --help            print this`;

function parse() {
  const { values } = parseArgs({
    options: {
      seed: { type: 'string', default: String(Date.now() % 1_000_000) },
      episodes: { type: 'string', default: '40' },
      replay: { type: 'string' },
      faults: { type: 'string', default: Object.keys(FAULTS).join(',') },
      without: { type: 'string' },
      sanitize: { type: 'boolean', default: false },
      'wall-clock': { type: 'boolean', default: false },
      stop: { type: 'boolean', default: false },
      json: { type: 'boolean', default: false },
      help: { type: 'boolean', default: false },
    },
  });
  const [seed, only] = values.replay?.split(':') ?? [values.seed, null];
  const episodes = Number(values.episodes);
  if (!Number.isInteger(episodes) || episodes < 1) throw new Error('--episodes must be a whole number from 1 on');
  if (only !== null && !/^\d+$/.test(only ?? '')) throw new Error('--replay must be SEED:N');
  const faults = values.faults.split(',');
  const unknown = faults.find((name) => !(name in FAULTS));
  if (unknown !== undefined) throw new Error(`there is no fault '${unknown}', see --help`);
  if (values.without !== undefined && !Object.hasOwn(MUTATIONS, values.without)) {
    throw new Error(`--without must be one of ${Object.keys(MUTATIONS).join(', ')}`);
  }
  const numbers = only === null ? Array.from({ length: episodes }, (_, index) => index) : [Number(only)];
  return { ...values, seed, numbers, faults, without: values.without ?? null, wallClock: values['wall-clock'] };
}

/** Mount points of the v1 hierarchies that are needed. */
function findPoints() {
  const mounts = readCgroupMounts();
  const memory = findMemoryV1(mounts);
  if (memory === undefined) throw new Error('there is no cgroup v1 memory hierarchy here');
  if (process.geteuid() !== 0) throw new Error('only root makes memcgs and real-time processes');
  const points = { memory: memory.point };
  for (const controller of ['freezer', 'pids']) {
    const found = mounts.find((mount) => mount.version === 1 && mount.controllers.includes(controller));
    if (found === undefined) throw new Error(`there is no cgroup v1 ${controller} hierarchy here`);
    points[controller] = found.point;
  }
  return points;
}

/** Removes what runs that were killed left. */
async function sweepStale(points) {
  for (const point of Object.values(points)) {
    const stale = readdirSync(point).filter(
      (name) => name.startsWith(PREFIX) && !isAlive(Number(name.slice(PREFIX.length).split('-')[0])),
    );
    await sweep(stale.map((name) => `${point}/${name}`));
  }
}

function isAlive(pid) {
  return pid === process.pid || existsSync(`/proc/${pid}`);
}

async function run(options, signal, each) {
  const points = findPoints();
  await sweepStale(points);
  const { without, sanitize } = options;
  const mutant = without === null ? null : MUTATIONS[without];
  const tools = {
    points,
    workload: workloadPath(),
    observer: buildObserver(),
    guarded: without !== 'guard',
    guardPath: mutant !== null || sanitize ? buildGuard(mutant, { sanitize }) : null,
    environment: sanitize ? sanitized() : {},
    folder: mkdtempSync(`${existsSync('/dev/shm') ? '/dev/shm' : tmpdir()}/reprieve-chaos-`),
    log: new KernelLog(),
  };
  try {
    for (const number of options.numbers) {
      signal.throwIfAborted();
      const scenario = drawScenario(options.seed, number, options);
      let result;
      try {
        result = await playEpisode(scenario, tools, signal);
      } catch (error) {
        if (signal.aborted) throw error;
        result = broken(scenario, error);
      }
      if (each(scenario, result) && options.stop) break;
    }
  } finally {
    tools.log.close();
    rmSync(tools.folder, { recursive: true, force: true });
  }
}

/** The runner itself failed: that is said like a violation, and the others are played all the same. */
function broken({ seed, episode, faults }, error) {
  const nothing = { injected: [], notes: [], said: [], nextSaid: [], records: [], processes: [], kernelChose: [] };
  const windows = { asked: false, opened: 0, refused: 0, hit: 0, takenBytes: 0 };
  const times = { longestMs: null, nobodyThereMs: null, afterHelpMs: null, replacedMs: null, guardSignal: null };
  const violations = [`the runner failed: ${error.stack}`];
  return {
    seed,
    episode,
    faults: faults.map(({ name }) => name),
    outcome: 'unknown',
    violations,
    ...nothing,
    ...times,
    windows,
  };
}

function tell(scenario, result) {
  const { seed, episode, violations, notes } = result;
  console.log(`\nepisode ${seed}:${episode} (${result.outcome})\n${describe(scenario)}`);
  for (const line of violations) console.log(`  ! ${line}`);
  for (const line of notes) console.log(`  ${line}`);
  console.log(`  again: npm run chaos -- --replay ${seed}:${episode}`);
}

function tellAll(result) {
  const { injected, said, nextSaid, records, processes } = result;
  const first = Math.min(...said.map(({ atUs }) => atUs));
  const at = (us) => (us === 0 ? '' : ((us - first) / 1000).toFixed(1));
  console.log(`  injected: ${JSON.stringify(injected)}`);
  for (const { atUs, event, ...more } of said)
    console.log(`  ${at(atUs).padStart(8)} ${event} ${JSON.stringify(more)}`);
  for (const { atUs, event, ...more } of nextSaid)
    console.log(`  ${at(atUs).padStart(8)} next: ${event} ${JSON.stringify(more)}`);
  for (const { job, group, name, pid, firstUs, goneUs, heldUs, heldUntilUs, place, anonymous } of processes) {
    console.log(
      `  ${job ?? `${group}/${name}`} ${pid}: from ${at(firstUs)} to ${at(goneUs)}, ${(anonymous / 2 ** 20).toFixed(1)} MiB` +
        (heldUs > 0 ? `, ${place} for ${heldUs / 1000} ms until ${at(heldUntilUs)}` : ''),
    );
  }
  for (const text of records) console.log(text.replaceAll(/^/gm, '    '));
  console.log(`  the observer was blind for ${result.blindMs} ms at most; longest wait ${result.longestMs} ms`);
}

async function main() {
  const options = parse();
  if (options.help) return console.log(USAGE);
  const stop = new AbortController();
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) process.on(signal, () => stop.abort(new Error(signal)));
  const results = [];
  let stopped = null;
  const beganAt = performance.now();
  try {
    await run(options, stop.signal, (scenario, result) => {
      results.push(result);
      const failed = result.violations.length > 0;
      if (!options.json && (failed || options.replay)) tell(scenario, result);
      if (!options.json && options.replay) tellAll(result);
      if (process.stderr.isTTY) process.stderr.write(`\r${results.length} of ${options.numbers.length}\x1b[K\r`);
      return failed;
    });
  } catch (error) {
    if (!stop.signal.aborted) throw error;
    stopped = stop.signal.reason.message;
  }
  const summary = summarise(results, options.faults);
  const seconds = (performance.now() - beganAt) / 1000;
  if (options.json) {
    console.log(
      JSON.stringify({ seed: options.seed, without: options.without, stopped, seconds, summary, episodes: results }),
    );
  } else {
    console.log(
      `\nSeed ${options.seed}, Linux ${release()}, Node ${process.version}${options.without ? `, without ${options.without}` : ''}: ` +
        `${summary.episodes} episodes in ${seconds.toFixed(0)} s, ${summary.violations} with violations\n`,
    );
    console.log(renderTable(summary, { boundMs: BOUND_MS, nextStartMs: NEXT_START_MS }));
    if (stopped !== null) console.log(`\nStopped early: ${stopped}.`);
  }
  if (summary.violations > 0 || stopped !== null) process.exitCode = 1;
}

main().catch((error) => {
  console.error(`chaos: ${error.message}`);
  process.exitCode = 1;
});
