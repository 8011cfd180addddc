// In a guest with systemd: units with limits are watched while systemd writes its own values anew. Prints what was seen as JSON.
import { execFileSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { lowestPriority, OomHandler } from '../../../dist/index.js';
import { workloadPath } from '../../../dist/native.js';

const MiB = 2 ** 20;
const SERVICE = 'reprieve-test.service';
const SLICE = 'reprievetest.slice';
const cgroups = { service: `/system.slice/${SERVICE}`, slice: `/${SLICE}` };

const systemctl = (...words) => execFileSync('systemctl', words, { stdio: ['ignore', 'inherit', 'inherit'] });
const read = (path, name) => readFileSync(`/sys/fs/cgroup${path}/${name}`, 'utf8').trim();
const limits = (path) =>
  ['memory.high', 'memory.max']
    .map((name) => read(path, name))
    .map((text) => (text === 'max' ? text : Number(text) / MiB));
const groups = () => ['good', 'bad'].map((job) => read(`${cgroups.slice}/${job}.service`, 'memory.oom.group'));

/** A unit of systemd-run, of which one is in the slice. */
function start(unit, properties, command) {
  const settings = Object.entries(properties).flatMap(([name, value]) => ['--property', `${name}=${value}`]);
  execFileSync('systemd-run', ['--quiet', '--unit', unit, ...settings, 'bash', '-c', command], { stdio: 'inherit' });
}

async function until(check, what) {
  const end = Date.now() + 60_000;
  while (!check()) {
    if (Date.now() > end) throw new Error(`never seen: ${what}`);
    await sleep(50);
  }
}

const workload = workloadPath();
const leak = `until test -e /run/leak-$UNIT; do sleep 0.2; done; exec ${workload} leak --chunk 1MiB --every 20ms --timeout 300s`;
const hold = `${workload} hold --bytes 24MiB --timeout 300s`;
systemctl('start', SLICE);
systemctl('set-property', '--runtime', SLICE, 'MemoryMax=96M');
start(
  SERVICE,
  { MemoryMax: '96M', Environment: 'UNIT=service', OOMPolicy: 'continue' },
  `${hold} & ( ${leak} ) & wait -n; wait`,
);
start('good.service', { Slice: SLICE }, `exec ${hold}`);
start('bad.service', { Slice: SLICE, Environment: 'UNIT=slice' }, leak);
await until(() => Number(read(cgroups.service, 'memory.current')) > 24 * MiB, 'the service holds memory');

const handler = await OomHandler.open({ reserve: '16MiB', lockText: false, drill: false });
handler.on('warning', (message) => console.error(`warning: ${message}`));
handler.on('alarm', (message) => console.error(`alarm: ${message}`));
const reports = [];
handler.on('report', (report) => reports.push(report));
const options = { policy: lowestPriority, hold: true };
await handler.watch(`memcg:${cgroups.service}`, options);
await handler.watch(`memcg:${cgroups.slice}`, {
  ...options,
  jobs: { 'good.service': { priority: 90 }, 'bad.service': { priority: 10 } },
});

const seen = {};
/** What is there right after systemd has written, and when the handler has had its tick. */
async function look(name) {
  const now = () => ({ service: limits(cgroups.service), slice: limits(cgroups.slice), groups: groups() });
  const before = now();
  await sleep(3_000);
  seen[name] = { before, after: now() };
}
await look('watched');
systemctl('daemon-reload');
await look('reloaded');
systemctl('set-property', '--runtime', SERVICE, 'MemoryMax=128M');
systemctl('set-property', '--runtime', SLICE, 'MemoryMax=128M');
await look('set');

for (const unit of ['service', 'slice']) {
  execFileSync('touch', [`/run/leak-${unit}`]);
  await until(() => reports.some(({ owner }) => owner === cgroups[unit]), `a report of the ${unit}`);
}
await sleep(2_500); // armed again once nobody waits
const both = () => ({ service: limits(cgroups.service), slice: limits(cgroups.slice) });
seen.handled = both();
seen.left = read(cgroups.service, 'cgroup.procs')
  .split('\n')
  .map((pid) => readFileSync(`/proc/${pid}/comm`, 'utf8').trim());
await handler.close();
seen.closed = { ...both(), group: read(`${cgroups.slice}/good.service`, 'memory.oom.group') };
seen.reports = reports.map(({ owner, outcome, victims, kernelVictims, snapshot }) => ({
  owner,
  limit: snapshot.limit,
  outcome,
  victims: victims.map(({ name }) => name),
  kernelVictims,
}));
console.log(JSON.stringify(seen));
