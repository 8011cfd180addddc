#!/usr/bin/env node
// What a look at all jobs of a machine costs, on a machine without memory cgroups: the first one, which reads every
// process, and those that follow. Starts processes of its own to have enough; touches no other.
import { spawn } from 'node:child_process';
import { findMemoryV1, readCgroupMounts } from '../dist/cgroup/mounts.js';
import { HierarchyV1 } from '../dist/cgroup/v1.js';
import { MachineJobs } from '../dist/snapshot/machine.js';
import { JobRules } from '../dist/snapshot/settings.js';

const processes = Number(process.argv[2] ?? 300);
const LOOKS = 100;
if (!Number.isInteger(processes) || processes < 0) throw new Error('Usage: bench-jobs.mjs [processes]');
const mount = findMemoryV1(readCgroupMounts());
if (mount === undefined) throw new Error('there is no cgroup v1 memory hierarchy here');
const children = Array.from({ length: processes }, () => spawn('sleep', ['120'], { stdio: 'ignore' }));
try {
  const hierarchy = new HierarchyV1(mount.point);
  const rules = new JobRules([{ match: { comm: 'sleep' } }]);
  const none = new Set();
  const timed = (run) => {
    const from = performance.now();
    run();
    return performance.now() - from;
  };
  await new Promise((resolve) => setTimeout(resolve, 2500)); // read once more while they are young
  let jobs;
  const setup = {
    hierarchy,
    root: null,
    rules,
    spared: () => none,
    scoreBefore: (p) => p.scoreAdj(),
    warn: console.warn,
  };
  const first = timed(() => {
    jobs = new MachineJobs(setup);
  });
  const looks = Array.from({ length: LOOKS }, () => timed(() => jobs.live())).sort((a, b) => a - b);
  const samples = Array.from({ length: LOOKS }, () => timed(() => jobs.sample(none))).sort((a, b) => a - b);
  const count = jobs.live().length;
  jobs.close();
  hierarchy.close();
  const ms = (value) => `${value.toFixed(2)} ms`;
  console.log(`${processes} processes of its own, ${count} jobs. The first look: ${ms(first)}.`);
  console.log(`A look: ${ms(looks[LOOKS / 2])} in the middle, ${ms(looks[LOOKS - 1])} at most.`);
  console.log(`With everybody's memory: ${ms(samples[LOOKS / 2])}, ${ms(samples[LOOKS - 1])} at most.`);
} finally {
  for (const child of children) child.kill('SIGKILL');
}
