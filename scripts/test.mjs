#!/usr/bin/env node
// Runs every tier of tests that this machine allows, lists what it skips and why, and looks for what the tests left
// behind. REPRIEVE_REQUIRE=host,native makes a skipped tier a failure. Tiers by name: node scripts/test.mjs unit host
import { spawnSync } from 'node:child_process';
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { whatIsMissing } from './vm/boot.mjs';

const root = dirname(dirname(fileURLToPath(import.meta.url)));
const scratch = mkdtempSync(join(tmpdir(), 'reprieve-run-'));
const required = (process.env.REPRIEVE_REQUIRE ?? '').split(',').filter(Boolean);

function run(command, args, options = {}) {
  return spawnSync(command, args, { cwd: root, stdio: 'inherit', encoding: 'utf8', ...options });
}

function runs(command) {
  return spawnSync(command, ['--version'], { stdio: 'ignore' }).status === 0;
}

/** A tier of vitest: its counts from the report, so that a run that broke down cannot pass for a short one. */
function vitest(...projects) {
  const output = join(scratch, `${projects[0]}.json`);
  const { status } = run(process.execPath, [
    'node_modules/vitest/vitest.mjs',
    'run',
    ...projects.flatMap((project) => ['--project', project]),
    '--reporter=default',
    '--reporter=json',
    `--outputFile.json=${output}`,
  ]);
  if (!existsSync(output)) return { passed: 0, failed: 1, skipped: 0 };
  const { numPassedTests: passed, numFailedTests, numPendingTests, numTodoTests } = JSON.parse(readFileSync(output));
  const failed = numFailedTests === 0 && status !== 0 ? 1 : numFailedTests;
  return { passed, failed, skipped: numPendingTests + numTodoTests };
}

function native() {
  const { status, stdout } = run(process.execPath, ['scripts/native-test.mjs'], {
    stdio: ['inherit', 'pipe', 'inherit'],
  });
  process.stdout.write(stdout);
  const counts = /test cases:\s*\d+\s*\|\s*(\d+) passed\s*\|\s*(\d+) failed/.exec(stdout);
  const [passed = 0, failed = 0] = counts?.slice(1).map(Number) ?? [];
  // doctest cannot skip a test that has begun: one that finds no ground says so, and counts as passed there.
  const skips = [...stdout.matchAll(/MESSAGE: skipped: (.*)/g)].map(([, why]) => why);
  return {
    passed: passed - skips.length,
    failed: failed === 0 && status !== 0 ? 1 : failed,
    skipped: skips.length,
    why: [...new Set(skips)].join('; '),
  };
}

/** What tests and handlers make that must be gone when they are over: cgroups, processes, mounts, files. */
function traces() {
  const found = [];
  for (const controller of ['memory', 'freezer', 'pids']) {
    const point = `/sys/fs/cgroup/${controller}`;
    if (!existsSync(point)) continue;
    for (const name of readdirSync(point)) if (/^reprieve-/.test(name)) found.push(`cgroup ${point}/${name}`);
  }
  for (const pid of readdirSync('/proc').filter((name) => /^\d+$/.test(name))) {
    try {
      const [program] = readFileSync(`/proc/${pid}/cmdline`, 'utf8').split('\0');
      if (/reprieve-(workload|guard|listener|(chaos-)?observer|native-test)$/.test(program))
        found.push(`process ${pid} ${program}`);
    } catch {
      // gone meanwhile
    }
  }
  for (const line of readFileSync('/proc/mounts', 'utf8').split('\n')) {
    if (line.includes('reprieve-test')) found.push(`mount ${line}`);
  }
  // Records of what guards did are left on purpose.
  for (const name of existsSync('/run/reprieve') ? readdirSync('/run/reprieve') : []) {
    if (name !== 'records') found.push(`file /run/reprieve/${name}`);
  }
  for (const name of readdirSync(tmpdir()))
    if (/^reprieve-(test|demo|vm)-/.test(name)) found.push(`file ${join(tmpdir(), name)}`);
  return found;
}

/** @param before what a run that was killed, or one that goes on beside this one, had left when this one began */
function leftovers(before) {
  const left = traces().filter((what) => !before.includes(what));
  for (const what of left) process.stdout.write(`left behind: ${what}\n`);
  return { passed: left.length === 0 ? 1 : 0, failed: left.length === 0 ? 0 : 1, skipped: 0 };
}

const noHost = !/^\S+ \S+ cgroup \S*\bmemory\b/m.test(readFileSync('/proc/mounts', 'utf8'))
  ? 'no cgroup v1 memory hierarchy is mounted'
  : process.geteuid() !== 0
    ? 'not root'
    : null;
const noCompiler = runs('g++') ? null : 'g++ was not found (Debian: g++)';
const noNative = !runs('cmake')
  ? 'cmake was not found (Debian: cmake)'
  : !existsSync('/usr/include/doctest/doctest.h')
    ? 'doctest was not found (Debian: doctest-dev)'
    : null;

const tiers = {
  unit: { skip: null, run: () => vitest('unit') },
  native: { skip: noNative, run: native },
  host: { skip: noHost, run: () => vitest('host', 'behaviour') },
  vm: { skip: whatIsMissing({ systemd: true }), run: () => vitest('vm') },
  chaos: { skip: noHost ?? noCompiler, run: () => vitest('chaos') },
};

const chosen = process.argv.length > 2 ? process.argv.slice(2) : Object.keys(tiers);
for (const name of [...required, ...chosen]) {
  if (!(name in tiers)) {
    process.stderr.write(`There is no tier '${name}'; expected ${Object.keys(tiers).join(', ')}\n`);
    process.exit(2);
  }
}

const total = { passed: 0, failed: 0, skipped: 0 };
const lines = [];
const add = (name, counts) => {
  for (const key of Object.keys(total)) total[key] += counts[key];
  lines.push(
    `${name}: ${counts.passed} passed, ${counts.failed} failed, ${counts.skipped} skipped${counts.why ? ` (${counts.why})` : ''}`,
  );
};

// Some tests run the library in processes of their own.
if (run(process.execPath, ['node_modules/typescript/bin/tsc', '-p', 'tsconfig.build.json']).status !== 0)
  process.exit(1);
const before = traces();
for (const what of before) process.stdout.write(`here before the tests: ${what}\n`);
for (const name of chosen) {
  const { skip, run: runTier } = tiers[name];
  if (skip === null) add(name, runTier());
  else if (required.includes(name))
    add(name, { passed: 0, failed: 1, skipped: 0, why: `REPRIEVE_REQUIRE asks for it: ${skip}` });
  else add(name, { passed: 0, failed: 0, skipped: 1, why: skip });
}
add('nothing left behind', leftovers(before));
rmSync(scratch, { recursive: true, force: true });

process.stdout.write(
  `\n${lines.join('\n')}\n\n${total.passed} passed, ${total.failed} failed, ${total.skipped} skipped\n`,
);
process.exitCode = total.failed === 0 ? 0 : 1;
