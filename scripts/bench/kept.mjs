// What it is worth to hold the victims' descriptors: the killer's round over a real memcg, with signal 0, in turns.
import { spawn } from 'node:child_process';
import { mkdirSync, rmdirSync, writeFileSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { native } from '../../dist/native.js';
import { percentile } from './summary.mjs';

const ROUNDS = 500;

/** @returns `{ kept, opened }`: the median of a round over so many processes, in µs */
export async function measureRounds(point, processes) {
  const path = `${point}/reprieve-test-kept-${process.pid}`;
  const { Directory, EventSet, Killer, KeptPidfds, nowUs } = native();
  const events = new EventSet(new Int32Array(64), () => {});
  events.unref();
  const kept = new KeptPidfds();
  const sleepers = [];
  mkdirSync(path);
  const directory = new Directory(path);
  try {
    for (let index = 0; index < processes; index++) {
      const child = spawn('sleep', ['60'], { stdio: 'ignore' });
      sleepers.push(child);
      writeFileSync(`${path}/cgroup.procs`, String(child.pid));
    }
    if (kept.keep(Int32Array.from(sleepers, ({ pid }) => pid)) !== processes) throw new Error('a sleeper is gone');
    const took = { kept: [], opened: [] };
    for (let round = 0; round < ROUNDS; round++) {
      for (const [side, held] of Object.entries({ kept, opened: new KeptPidfds() })) {
        const killer = new Killer(events, true, undefined, held);
        const begin = nowUs();
        const reached = killer.round([directory], 'cgroup.procs');
        took[side].push(nowUs() - begin);
        killer.close();
        if (reached !== processes) throw new Error(`${reached} of ${processes} processes were reached`);
      }
    }
    const median = (values) =>
      percentile(
        values.sort((a, b) => a - b),
        50,
      );
    return { kept: median(took.kept), opened: median(took.opened) };
  } finally {
    const gone = sleepers.map((child) => new Promise((resolve) => child.once('exit', resolve)));
    for (const child of sleepers) child.kill('SIGKILL');
    await Promise.all(gone);
    kept.close();
    directory.close();
    events.close();
    for (let tries = 0; tries < 100 && !removed(path); tries++) await sleep(20);
  }
}

function removed(path) {
  try {
    rmdirSync(path);
    return true;
  } catch {
    return false; // busy until the last process is reaped
  }
}
