#!/usr/bin/env node
// Makes the addon, the guard and the workload program usable: a prebuilt binary of the package if it loads, else a build from source.
import { spawnSync } from 'node:child_process';
import { existsSync, readdirSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = dirname(dirname(fileURLToPath(import.meta.url)));
const require = createRequire(import.meta.url);
const fromSource = process.argv.includes('--from-source');

function fail(sentence, details = '') {
  if (details) process.stderr.write(`${details}\n`);
  process.stderr.write(`reprieve: ${sentence}\n`);
  process.exit(1);
}

function prebuiltLoads() {
  const { header } = process.report.getReport();
  const libc = header.glibcVersionRuntime === undefined ? 'musl' : 'glibc';
  const folder = join(root, 'prebuilds', `${process.platform}-${process.arch}-${libc}`);
  if (!['reprieve.node', 'reprieve-guard'].every((name) => existsSync(join(folder, name)))) return false;
  try {
    require(join(folder, 'reprieve.node'));
    return true;
  } catch {
    return false; // another libc, or older than it needs: built from source instead
  }
}

function runs(command) {
  return spawnSync(command, ['--version'], { stdio: 'ignore' }).status === 0;
}

/** npm brings its own node-gyp; outside of npm there is the development dependency. */
function findNodeGyp() {
  if (process.env.npm_config_node_gyp && existsSync(process.env.npm_config_node_gyp)) {
    return process.env.npm_config_node_gyp;
  }
  try {
    return require.resolve('node-gyp/bin/node-gyp.js');
  } catch {
    fail('node-gyp was not found; run this through npm, or install node-gyp.');
  }
}

/** Headers beside the running Node, so that nothing is downloaded. */
function findNodeDir() {
  const prefix = dirname(dirname(process.execPath));
  return existsSync(join(prefix, 'include/node/node_api.h')) ? prefix : undefined;
}

function build() {
  const compiler = process.env.CXX?.split(' ')[0] ?? 'g++';
  for (const [command, debian] of [
    [compiler, 'g++'],
    ['make', 'make'],
    ['python3', 'python3'],
  ]) {
    if (!runs(command))
      fail(`${command} was not found, and the native addon is built from source: apt-get install ${debian}`);
  }
  const nodeDir = findNodeDir();
  const result = spawnSync(
    process.execPath,
    [findNodeGyp(), 'rebuild', '--silent', ...(nodeDir ? ['--nodedir', nodeDir] : [])],
    { cwd: root, encoding: 'utf8', maxBuffer: 2 ** 26 },
  );
  if (result.status !== 0)
    fail('the native addon could not be built; the compiler said the above.', result.stdout + result.stderr);
  const made = readdirSync(join(root, 'build/Release'));
  for (const name of ['reprieve.node', 'reprieve-guard', 'reprieve-workload']) {
    if (!made.includes(name)) fail(`the build gave no ${name}.`);
  }
}

if (process.platform !== 'linux') fail('memory cgroups are a matter of Linux; there is nothing to build here.');
if (fromSource || !prebuiltLoads()) build();
