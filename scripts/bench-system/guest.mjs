// Runs inside the guest: plays the runs of one handler, and prints each as a line of JSON. See bench-system.mjs.
import { once } from 'node:events';
import { writeFileSync } from 'node:fs';
import { createInterface } from 'node:readline';
import { setTimeout as sleep } from 'node:timers/promises';
import { HANDLERS } from './handlers.mjs';
import { CRITICAL_PERMILLE, jobsOn, leakOf, MARK_PERMILLE, SHAPES, SHORT_LIMIT_MS } from './scenario.mjs';
import { meminfo, numberIn, Stage } from './stage.mjs';

const IDLE_MS = 10_000;
/** A program that is compiled while it runs uses more of the processor at first. */
const WARM_MS = 5_000;
const SETTLE_MS = 1_000;
const RUN_LIMIT_MS = 60_000;

async function measureIdle(stage) {
  await sleep(WARM_MS);
  const before = stage.handlerUse();
  await sleep(IDLE_MS);
  const after = stage.handlerUse();
  return { rssKiB: after.rssKiB, cpuPercent: ((after.cpuUs - before.cpuUs) / (IDLE_MS * 1000)) * 100 };
}

/** From "go" to the account of the sampler, with the leak let go in between. */
async function sample(stage, shape, names) {
  const watched = names.flatMap((name) => ['--job', name, stage.cgroup(name), stage.statsFile(name)]);
  const leak = ['--leak', stage.cgroup('leak'), String(SHAPES[shape].processes)];
  const marks = ['--mark', MARK_PERMILLE, '--critical', CRITICAL_PERMILLE].map(String);
  const limits = ['--short-limit', SHORT_LIMIT_MS, '--limit', RUN_LIMIT_MS].map(String);
  const sampler = stage.startSampler([...marks, ...limits, ...watched, ...leak]);
  const ended = once(sampler, 'close');
  let account;
  for await (const line of createInterface({ input: sampler.stdout })) {
    if (line === 'go') stage.openGate('leak');
    else if (line !== 'ready') account = JSON.parse(line);
  }
  const [code, signal] = await ended;
  if (account === undefined) throw new Error(`the sampler ended without an account (${signal ?? code})`);
  return account;
}

async function play(stage, handler, shape, idle) {
  await stage.clean();
  const jobs = jobsOn(meminfo('MemTotal') * 1024);
  const names = jobs.map(({ name }) => name);
  stage.makeCgroups([...names, 'leak']);
  handler.prepare?.(stage);
  await Promise.all(jobs.map((job) => stage.startJob(job)));
  for (const name of names) stage.openGate(name);
  if (handler.words !== undefined) await stage.startHandler({ words: handler.words(), ready: handler.ready });
  await stage.startJob(leakOf(shape));
  await sleep(SETTLE_MS);
  const atRest = handler.words === undefined ? null : (idle ?? (await measureIdle(stage)));

  const available = meminfo('MemAvailable');
  const kills = numberIn('/proc/vmstat', 'oom_kill');
  const account = await sample(stage, shape, names);
  return {
    ...account,
    availableBefore: (available / account.memTotalKiB) * 100,
    idle: atRest,
    kernelKills: numberIn('/proc/vmstat', 'oom_kill') - kills,
    ends: stage.ends(),
    log: stage.handlerLog().slice(-4000),
  };
}

async function main() {
  const plan = JSON.parse(process.argv[2]);
  // The kernel and the handlers are to choose among the jobs; what is started from here is given its own value.
  writeFileSync('/proc/self/oom_score_adj', '-1000');
  const stage = new Stage({ programs: plan.programs, files: '/dev/shm/bench-system' });
  let idle = null;
  for (const { shape, run } of plan.runs) {
    let result;
    try {
      result = await play(stage, HANDLERS[plan.handler], shape, idle);
      idle = result.idle;
    } catch (error) {
      result = { error: error.message, log: stage.handlerLog().slice(-4000) };
    }
    console.log(JSON.stringify({ shape, run, ...result }));
  }
  stage.close();
}

await main();
