#!/usr/bin/env node
// Draws docs/overcharge-window.svg: what is charged to a full memcg while an overcharge window is open in it, from a real
// run on this machine. Needs root and cgroup v1, and a build (npm ci). --json prints the samples instead.
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdirSync, rmdirSync, writeFileSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { Worker } from 'node:worker_threads';
import { findMemoryV1, readCgroupMounts } from '../dist/cgroup/mounts.js';
import { lowestPriority, OomHandler } from '../dist/index.js';
import { native, workloadPath } from '../dist/native.js';

const MIB = 2 ** 20;
const LIMIT = 64 * MIB;
const WINDOW = 16 * MIB;
/** What the program in the window touches. */
const TOUCHED = 13 * MIB;
const JOBS = {
  service: ['work', '--set', '20MiB', '--scratch', '256KiB'],
  batch: ['leak', '--chunk', '512KiB', '--every', '2ms'],
};

const mount = findMemoryV1(readCgroupMounts());
if (mount === undefined || process.geteuid() !== 0) {
  process.stderr.write('draw-window needs root and a cgroup v1 memory hierarchy\n');
  process.exit(1);
}
const path = `/reprieve-draw-${process.pid}`;
const memcg = `${mount.point}${path}`;

/** Reads the files every millisecond, by a thread of its own, until it is told to stop. */
const SAMPLER = `
  const { readFileSync } = require('node:fs');
  const { workerData, parentPort } = require('node:worker_threads');
  const pause = new Int32Array(new SharedArrayBuffer(4));
  const stop = new Int32Array(workerData.stop);
  const read = (file) => { try { return Number(readFileSync(workerData.memcg + '/' + file, 'utf8')); } catch { return 0; } };
  const samples = [];
  while (Atomics.load(stop, 0) === 0) {
    const atUs = Number(process.hrtime.bigint() / 1000n);
    const [limit, used] = [read('memory.limit_in_bytes'), read('memory.usage_in_bytes')];
    const jobs = workerData.jobs.map((job) => read(job + '/memory.usage_in_bytes'));
    samples.push({ atUs, limit, used, jobs });
    Atomics.wait(pause, 0, 0, 1);
  }
  parentPort.postMessage(samples);`;

async function record() {
  mkdirSync(memcg);
  writeFileSync(`${memcg}/memory.limit_in_bytes`, String(LIMIT));
  const running = [];
  const start = async (job) => {
    mkdirSync(`${memcg}/${job}`);
    const child = spawn(workloadPath(), [...JOBS[job], '--join', `${memcg}/${job}`, '--gate', '--timeout', '30'], {
      stdio: ['pipe', 'pipe', 'inherit'],
    });
    running.push(child);
    await once(child.stdout, 'data');
    child.stdin.end();
  };
  const stop = new SharedArrayBuffer(4);
  const handler = await OomHandler.open({ reserve: WINDOW });
  try {
    await start('service');
    const marks = [];
    const mark = (text) => marks.push({ atUs: native().nowUs(), text });
    const policy = async (snapshot, { reserve }) => {
      mark('full: the jobs wait');
      await sleep(60);
      const window = await reserve.overcharge(WINDOW);
      mark('the window opens');
      await sleep(30);
      const cap = ['--chunk', '256KiB', '--every', '2ms', '--cap', String(TOUCHED)];
      window.spawn(workloadPath(), ['leak', ...cap], { stdio: 'ignore' });
      while (window.charged < TOUCHED) await sleep(2);
      await sleep(50);
      await window.close();
      mark('it is closed');
      await sleep(60);
      return lowestPriority(snapshot);
    };
    await handler.watch(`memcg:${path}`, {
      policy,
      respondWithin: 10_000,
      jobs: { service: { priority: 90 }, batch: { priority: 10 } },
    });
    const worker = new Worker(SAMPLER, { eval: true, workerData: { memcg, jobs: Object.keys(JOBS), stop } });
    const sampled = once(worker, 'message');
    const reported = once(handler, 'report');
    await start('batch');
    const [report] = await reported;
    await sleep(80);
    Atomics.store(new Int32Array(stop), 0, 1);
    const [samples] = await sampled;
    if (report.outcome !== 'cleared' || report.windows[0]?.refused !== null) {
      throw new Error(`not what is to be shown: ${JSON.stringify(report.windows)}, ${report.outcome}`);
    }
    const killed = marks[0].atUs - (report.timings.snapshotUs ?? 0) + (report.timings.killedUs ?? 0);
    marks.push({ atUs: killed, text: `${report.victims[0]?.name} dies` });
    const [{ askedUs, openedUs }] = report.windows;
    process.stderr.write(`the window took ${((openedUs - askedUs) / 1000).toFixed(1)} ms to open\n`);
    return { samples, marks };
  } finally {
    Atomics.store(new Int32Array(stop), 0, 1);
    await handler.close();
    for (const child of running) {
      if (child.exitCode === null && child.signalCode === null) {
        child.kill('SIGKILL');
        await once(child, 'exit');
      }
    }
    for (const below of [...Object.keys(JOBS).map((job) => `/${job}`), '']) {
      for (let tries = 0; tries < 100; tries++) {
        try {
          rmdirSync(`${memcg}${below}`);
          break;
        } catch (error) {
          if (error.code === 'ENOENT') break;
          await sleep(20); // busy until the last process is reaped
        }
      }
    }
  }
}

const [WIDTH, HEIGHT] = [920, 440];
const [LEFT, RIGHT, TOP, BOTTOM] = [64, 16, 76, 44];
const COLOURS = { service: '#4c78a8', batch: '#f58518', window: '#54a24b' };

function draw({ samples, marks }) {
  const firstUs = Math.max(samples[0].atUs, marks[0].atUs - 120_000);
  const lastUs = samples.at(-1).atUs;
  const shown = samples.filter(({ atUs }) => atUs >= firstUs);
  const most = LIMIT + WINDOW + 8 * MIB;
  const x = (atUs) => (LEFT + ((atUs - firstUs) / (lastUs - firstUs)) * (WIDTH - LEFT - RIGHT)).toFixed(1);
  const y = (bytes) => (HEIGHT - BOTTOM - (bytes / most) * (HEIGHT - TOP - BOTTOM)).toFixed(1);
  // From below: the service, the leak, and what is charged besides, which is the window's.
  const layers = Object.keys(COLOURS).map((name, index) => ({
    name,
    top: ({ jobs, used }) => (name === 'window' ? used : jobs.slice(0, index + 1).reduce((sum, job) => sum + job, 0)),
    floor: ({ jobs }) => jobs.slice(0, index).reduce((sum, job) => sum + job, 0),
  }));
  const areas = layers.map(({ name, top, floor }) => {
    const up = shown.map((sample) => `${x(sample.atUs)},${y(Math.max(top(sample), floor(sample)))}`);
    const down = shown.toReversed().map((sample) => `${x(sample.atUs)},${y(floor(sample))}`);
    return `<polygon fill="${COLOURS[name]}" fill-opacity="0.8" points="${[...up, ...down].join(' ')}"/>`;
  });
  const limit = shown
    .flatMap((sample, index) => [
      `${x(sample.atUs)},${y(shown[Math.max(0, index - 1)].limit)}`,
      `${x(sample.atUs)},${y(sample.limit)}`,
    ])
    .join(' ');
  const text = (atX, atY, words, more = '') => `<text x="${atX}" y="${atY}" ${more}>${words}</text>`;
  const rows = [0, 16, 32, 48, 64, 80].map(
    (mib) =>
      `<line x1="${LEFT}" x2="${WIDTH - RIGHT}" y1="${y(mib * MIB)}" y2="${y(mib * MIB)}" stroke="#ddd"/>` +
      text(LEFT - 6, Number(y(mib * MIB)) + 4, `${mib} MiB`, 'text-anchor="end"'),
  );
  const columns = [];
  for (let ms = 0; ms * 1000 < lastUs - marks[0].atUs; ms += 100) {
    columns.push(text(x(marks[0].atUs + ms * 1000), HEIGHT - BOTTOM + 18, `${ms} ms`, 'text-anchor="middle"'));
  }
  const flags = marks.map(
    ({ atUs, text: words }, index) =>
      `<line x1="${x(atUs)}" x2="${x(atUs)}" y1="${TOP - 6 - (index % 2) * 16}" y2="${HEIGHT - BOTTOM}" stroke="#444" stroke-dasharray="3 3"/>` +
      text(x(atUs), TOP - 10 - (index % 2) * 16, words, 'text-anchor="middle"'),
  );
  const legend = [...Object.entries(COLOURS), ['limit', '#d62728']].map(
    ([name, colour], index) =>
      `<rect x="${LEFT + index * 120}" y="14" width="12" height="12" fill="${colour}"/>` +
      text(LEFT + 18 + index * 120, 24, name === 'window' ? 'the window' : name),
  );
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${WIDTH} ${HEIGHT}" font-family="sans-serif" font-size="12">
<title>What is charged to a full memcg while an overcharge window is open in it</title>
<rect width="${WIDTH}" height="${HEIGHT}" fill="#fff"/>
${[...rows, ...areas, `<polyline fill="none" stroke="#d62728" stroke-width="2" points="${limit}"/>`, ...flags, ...columns, ...legend].join('\n')}
${text(LEFT, HEIGHT - 6, 'Charged to the memcg, sampled every millisecond on a real run: node scripts/draw-window.mjs', 'fill="#666"')}
</svg>
`;
}

const recorded = await record();
if (process.argv.includes('--json')) process.stdout.write(`${JSON.stringify(recorded)}\n`);
else writeFileSync(fileURLToPath(new URL('../docs/overcharge-window.svg', import.meta.url)), draw(recorded));
