// Runs inside the guest: how often the kernel kills instead of us in a memcg of v2, by whether its jobs are held and by the
// shape of the leak. `npm run bench:v2 -- RUNS`, see docs/cgroup-v2.md.
import { once } from 'node:events';
import { setTimeout as sleep } from 'node:timers/promises';
import { lowestPriority, OomHandler } from '../../dist/index.js';
import { workloadPath } from '../../dist/native.js';
import { jobsOn, leakOf, SCOPE, SHAPES } from './scenario.mjs';
import { Stage } from './stage.mjs';

const LIMIT = 256 << 20;
/** After the report a kernel that was asked meanwhile may still kill. */
const SETTLE_MS = 500;
const WITHIN_MS = 30_000;

async function play(stage, handler, hold, shape) {
  await stage.clean();
  const jobs = jobsOn(LIMIT);
  const names = jobs.map(({ name }) => name);
  stage.makeCgroups([...names, 'leak']);
  stage.write('', 'memory.max', String(LIMIT));
  await Promise.all(jobs.map((job) => stage.startJob(job)));
  for (const name of names) stage.openGate(name);
  const priorities = { service: { priority: 90 }, 'innocent-*': { priority: 50 }, leak: { priority: 10 } };
  const watch = await handler.watch(`memcg:${SCOPE}`, { policy: lowestPriority, hold, jobs: priorities });
  await stage.startJob(leakOf(shape));
  const reported = once(handler, 'report', { signal: AbortSignal.timeout(WITHIN_MS) });
  stage.openGate('leak');
  await reported;
  await sleep(SETTLE_MS);
  const ends = Object.entries(stage.ends());
  await watch.close();
  const lost = ends.filter(([name, { ended }]) => (name === 'leak') !== (ended !== null)).map(([name]) => name);
  const killed = ends.filter(([, { kernelKills }]) => kernelKills > 0).map(([name]) => name);
  return { lost, byKernel: killed.length > 0 };
}

const runs = Number(process.argv[2] ?? 5);
if (!Number.isInteger(runs) || runs < 1)
  throw new Error(`Expected a whole number of runs from 1 on, got ${process.argv[2]}`);
const stage = new Stage({ programs: { workload: workloadPath() }, files: '/dev/shm/bench-system' });
const handler = await OomHandler.open({ ownMemcg: false }); // the stage clears those of handlers away
console.log('| `hold` | leak | the leak died, and nobody else | the kernel killed |\n| --- | --- | --- | --- |');
for (const hold of [false, true]) {
  for (const shape of Object.keys(SHAPES)) {
    const results = [];
    for (let run = 0; run < runs; run++) results.push(await play(stage, handler, hold, shape));
    const right = results.filter(({ lost }) => lost.length === 0).length;
    const kernel = results.filter(({ byKernel }) => byKernel).length;
    const wrong = [...new Set(results.flatMap(({ lost }) => lost))].join(', ');
    console.log(`| ${hold} | ${shape} | ${right} of ${runs}${wrong && ` (${wrong})`} | ${kernel} of ${runs} |`);
  }
}
await handler.close();
stage.close();
