// In a guest: a user whose cgroup is delegated to him as by systemd's Delegate=yes. Root makes it, and becomes that user in a
// process of its own, which prints what was seen as JSON.
import { spawn, spawnSync } from 'node:child_process';
import { chownSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { lowestPriority, OomHandler } from '../../../dist/index.js';
import { workloadPath } from '../../../dist/native.js';

const UID = 1000;
const MiB = 2 ** 20;
const POINT = '/sys/fs/cgroup';
const GROUND = `/user.slice/user-${UID}.slice/user@${UID}.service`;
const RUNTIME = `/run/user/${UID}`;
const state = `${RUNTIME}/reprieve`;

const file = (path, name = '') => `${POINT}${path}/${name}`;
const read = (path, name) => readFileSync(file(path, name), 'utf8').trim();
const limits = (path) => ['memory.high', 'memory.max'].map((name) => read(path, name));
const doctor = () => {
  const { stdout, status } = spawnSync(process.execPath, ['dist/cli/main.js', 'doctor', '--json'], {
    encoding: 'utf8',
  });
  const { ready, scopes, rows } = JSON.parse(stdout);
  return { status, ready, scopes, rows: Object.fromEntries(rows.map(({ name, ok, found }) => [name, { ok, found }])) };
};

/** A job, which joins its cgroup by itself. */
function start(path, words) {
  mkdirSync(file(path), { recursive: true });
  const child = spawn(workloadPath(), [...words.split(' '), '--timeout', '300s', '--join', file(path)], {
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  return child;
}

async function asRoot() {
  mkdirSync(file(GROUND), { recursive: true });
  for (const path of ['/user.slice', `/user.slice/user-${UID}.slice`])
    writeFileSync(file(path, 'cgroup.subtree_control'), '+memory +pids');
  // What systemd gives away with Delegate=yes, and no more: the limits of the cgroup itself are not the user's.
  for (const name of [
    '',
    'cgroup.procs',
    'cgroup.subtree_control',
    'cgroup.threads',
    'memory.oom.group',
    'memory.reclaim',
  ])
    chownSync(file(GROUND, name), UID, UID);
  mkdirSync('/run/user');
  mkdirSync(RUNTIME, { mode: 0o700 });
  chownSync(RUNTIME, UID, UID);
  const seen = { root: doctor() };
  writeFileSync(file(GROUND, 'cgroup.subtree_control'), '+memory');
  mkdirSync(file(`${GROUND}/app`));
  for (const name of ['', ...readdirSync(file(`${GROUND}/app`))]) chownSync(file(`${GROUND}/app`, name), UID, UID);
  mkdirSync(file('/of-root'));
  writeFileSync(file('/of-root', 'memory.max'), String(256 * MiB));
  const others = start('/of-root', 'hold --bytes 24MiB'); // the largest, and by its priority the first to die
  writeFileSync(file(`${GROUND}/app`, 'cgroup.procs'), '0');
  const env = { ...process.env, HOME: '/tmp', XDG_RUNTIME_DIR: RUNTIME };
  const user = spawnSync(process.execPath, [process.argv[1], 'user'], { uid: UID, gid: UID, env, encoding: 'utf8' });
  process.stderr.write(user.stderr);
  seen.user = { status: user.status, ...JSON.parse(user.stdout) };
  seen.readOnly = await inContainer();
  seen.othersLive = others.exitCode === null && others.signalCode === null;
  console.log(JSON.stringify(seen));
  process.exit(0);
}

/** Where cgroups may only be read: the job is started out here, and leaks once it is watched. */
async function inContainer() {
  mkdirSync(file('/read-only'));
  writeFileSync(file('/read-only', 'memory.max'), String(64 * MiB));
  const words = [
    'leak',
    '--chunk',
    '1MiB',
    '--every',
    '20ms',
    '--timeout',
    '300s',
    '--gate',
    '--join',
    file('/read-only'),
  ];
  const job = spawn(workloadPath(), words, { stdio: ['pipe', 'ignore', 'inherit'] });
  const shut = 'mount -o remount,bind,ro /sys/fs/cgroup; exec "$@"';
  const reader = spawn('unshare', ['--mount', 'sh', '-ec', shut, 'sh', process.execPath, process.argv[1], 'readOnly'], {
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  let text = '';
  reader.stdout.on('data', (data) => {
    if (text === '') job.stdin.end('.');
    text += data;
  });
  const status = await new Promise((resolve) => reader.once('close', resolve));
  return { status, ...JSON.parse(text) };
}

async function asReader() {
  const seen = { doctor: doctor(), warnings: [] };
  const handler = await OomHandler.open({ lockText: false, drill: false });
  handler.on('warning', (message) => seen.warnings.push(message));
  const report = new Promise((resolve) => handler.once('report', resolve));
  await handler.watch('memcg:/read-only', { policy: lowestPriority, hold: false });
  console.log(' '); // it is watched
  const { outcome, victims, kernelVictims } = await within(report, 'read-only');
  seen.episode = { outcome, died: namesOf(victims, kernelVictims).length };
  await handler.close();
  console.log(JSON.stringify(seen));
  process.exit(0);
}

/** Each once: the kernel may have taken what was being killed. */
function namesOf(victims, kernelVictims) {
  return [...new Set([...victims.map(({ name }) => name), ...kernelVictims.map(({ job }) => job)])];
}

function within(report, what) {
  const late = sleep(60_000).then(() => {
    throw new Error(`${what}: no report`);
  });
  return Promise.race([report, late]);
}

async function asUser() {
  const seen = { doctor: doctor(), warnings: [], errors: {} };
  const handler = await OomHandler.open({ lockText: false, drill: false });
  handler.on('warning', (message) => seen.warnings.push(message));
  handler.on('alarm', (message) => seen.warnings.push(`alarm: ${message}`));
  const { ownMemcg, scheduling } = handler.capabilities;
  seen.own = { ...ownMemcg, scheduling: scheduling.got, protected: Number(read(ownMemcg.path, 'memory.min')) > 0 };
  const refused = async (name, scope, options) => {
    try {
      await (await handler.watch(scope, { policy: lowestPriority, ...options })).close();
      seen.errors[name] = null;
    } catch ({ code, message }) {
      seen.errors[name] = { code, message };
    }
  };
  await refused('holdsOthers', `memcg:/of-root`, { hold: true });
  await refused('watchesOthers', `memcg:/of-root`, { hold: false });
  await refused('holdsMe', `memcg:${GROUND}`, { hold: false });

  /** One episode of a scope whose jobs are in `path`. */
  const episode = async (path, scope, options, limit) => {
    for (const name of ['', '/good', '/bad']) mkdirSync(file(`${path}${name}`));
    writeFileSync(file(path, 'cgroup.subtree_control'), '+memory');
    if (limit !== null) writeFileSync(file(path, 'memory.max'), String(limit));
    const name = (job) => (scope === 'system' ? `${path.slice(1)}/${job}` : job);
    const jobs = { [name('good')]: { priority: 90 }, [name('bad')]: { priority: 10 }, 'of-root': { priority: 0 } };
    const good = start(`${path}/good`, 'hold --bytes 24MiB');
    await new Promise((resolve) => good.stdout.once('data', resolve));
    const watch = await handler.watch(scope, { policy: lowestPriority, jobs, ...options });
    const armed = limits(path);
    const report = new Promise((resolve) => handler.once('report', resolve));
    const bad = start(`${path}/bad`, 'leak --chunk 1MiB --every 20ms');
    const { outcome, victims, kernelVictims, snapshot } = await within(report, scope);
    // The kernel may have been quicker than the first look.
    const of = snapshot?.jobs.find((job) => job.name === 'of-root');
    await watch.close();
    const result = {
      armed,
      outcome,
      died: namesOf(victims, kernelVictims),
      after: limits(path),
      score: readFileSync(`/proc/${good.pid}/oom_score_adj`, 'utf8').trim(),
      goodLives: good.exitCode === null && good.signalCode === null,
      othersAre: of === undefined ? null : { protected: of.protected, from: of.settings },
    };
    good.kill('SIGKILL');
    bad.kill('SIGKILL');
    return result;
  };
  const memcg = (name) => `${GROUND}/${name}`;
  seen.left = await episode(memcg('left'), `memcg:${memcg('left')}`, { hold: false }, 64 * MiB);
  seen.held = await episode(memcg('held'), `memcg:${memcg('held')}`, { hold: true }, 64 * MiB);
  seen.system = await episode(memcg('machine'), 'system', { shortage: { available: '40%' } }, null);
  await handler.close();
  seen.state = readdirSync(state);
  seen.refuges = readdirSync(file(GROUND)).filter((name) => name.startsWith('reprieve-'));
  seen.back = readFileSync('/proc/self/cgroup', 'utf8').trim();
  console.log(JSON.stringify(seen));
  process.exit(0);
}

await { user: asUser, readOnly: asReader, root: asRoot }[process.argv[2] ?? 'root']();
