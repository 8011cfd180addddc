import { type Capabilities, probeCapabilities } from '../capabilities.js';
import { DEFAULT_DEADLINES } from '../condition/options.js';
import { type Bound, boundOf } from '../guard/bound.js';
import { STATE_DIRECTORY } from '../guard/instance.js';
import { DEFAULT_GUARD } from '../guard/options.js';
import { type HandlerStatus, readStatuses } from '../guard/status.js';
import type { ReserveCounters } from '../reserve/account.js';
import { formatBytes } from '../units.js';

/** One thing that a machine may offer. */
interface DoctorRow {
  name: string;
  /** 'needed': without it nothing can be watched. 'better': without it something is slower or weaker. */
  weight: 'needed' | 'better';
  ok: boolean;
  found: string;
  /** What its want costs, and how to get it; empty where it is there. */
  costs: string;
  fix: string;
}

export interface DoctorReport {
  version: 1;
  kernel: string;
  /** Everything that is needed is there. */
  ready: boolean;
  /** The longest that a task waits with the default deadlines, in milliseconds. */
  longestWaitMs: Bound;
  rows: DoctorRow[];
  /** Handlers that run here, with their reserve, as far as they may be seen. */
  handlers: HandlerStatus[];
}

/** Prints what this machine offers. Exit code 0 when a memcg can be watched here, 1 when not. */
export function runDoctor(options: { json?: boolean }): void {
  const report = diagnose(probeCapabilities(), readStatuses(STATE_DIRECTORY));
  process.stdout.write(options.json ? `${JSON.stringify(report, null, 2)}\n` : `${renderDoctor(report)}\n`);
  process.exitCode = report.ready ? 0 : 1;
}

/** The rows of a machine's capabilities. */
export function diagnose(found: Capabilities, handlers: HandlerStatus[]): DoctorReport {
  const rows: DoctorRow[] = [];
  const row = (name: string, weight: DoctorRow['weight'], ok: boolean, what: string, costs: string, fix: string) =>
    rows.push({ name, weight, ok, found: what, costs: ok ? '' : costs, fix: ok ? '' : fix });
  const held = (name: string) => found.held.includes(name);
  const { memoryV1, cgroupV2 } = found;

  row(
    'cgroup v1 memory',
    'needed',
    memoryV1 !== null,
    memoryV1 ? memoryV1.point : 'not mounted',
    'tasks cannot be made to wait; no memcg can be watched',
    'boot with systemd.unified_cgroup_hierarchy=0 (a kernel with CONFIG_MEMCG_V1)',
  );
  row(
    'memory.oom_control',
    'needed',
    found.oomControl && memoryV1?.writable === true,
    found.oomControl ? (memoryV1?.writable ? 'can be written' : 'read-only mount') : 'cannot be written',
    'the kernel goes on killing at once, by size',
    'run as root; in a container bind /sys/fs/cgroup writable',
  );
  row(
    'cgroup.event_control',
    'needed',
    found.eventControl,
    found.eventControl ? 'can be written' : 'cannot be written',
    'no signal when a memcg runs out of memory',
    'run as root: since Linux 6.1 the file is 0200',
  );
  row(
    'pidfd_open',
    'needed',
    found.pidfd,
    found.pidfd ? 'there' : 'not there',
    'a victim cannot be named by identity',
    'Linux 5.3 or later',
  );
  row(
    'guard',
    'needed',
    found.guard.path !== null,
    found.guard.path ?? (found.guard.whyNot.split('\n')[0] || 'not there'),
    'nobody acts when the handler is killed or hangs, so none is opened',
    'npm rebuild reprieve, or node scripts/install.mjs --from-source',
  );
  row(
    'state directory',
    'needed',
    found.state.writable,
    `${found.state.directory}, ${found.state.writable ? 'can be written' : 'cannot be written'}`,
    'what is changed cannot be written down first, so nothing is changed',
    'run as root, or name another one: the `stateDirectory` option',
  );
  row(
    'memcg of its own',
    'better',
    found.refuge,
    found.refuge ? 'can be made: the handler moves to it, or steps out to it' : 'cannot be made below the root',
    'the memcg that holds the handler cannot be watched',
    'run as root; in a container bind /sys/fs/cgroup writable',
  );
  row(
    'cgroup v2',
    'better',
    cgroupV2 !== null,
    cgroupV2 ? `${cgroupV2.point}${cgroupV2.memory ? ', with' : ', without'} the memory controller` : 'not mounted',
    'nothing yet: v2 memcgs are not watched by this version',
    'mount -t cgroup2 none /sys/fs/cgroup/unified',
  );
  row(
    'kernel reserve',
    'better',
    found.kernelReserve,
    found.kernelReserve ? 'memory.oom_reserve_in_bytes is there' : 'no memory.oom_reserve_in_bytes',
    'what must be charged to a full memcg takes an overcharge window, for which its jobs are frozen',
    'a kernel with the userspace OOM patchset',
  );
  row(
    'v1 freezer',
    'better',
    found.freezer,
    found.freezer ? 'mounted' : 'not mounted',
    'no overcharge window: nothing can be charged to a full memcg',
    'mount -t cgroup -o freezer freezer /sys/fs/cgroup/freezer',
  );
  row(
    'PSI triggers',
    'better',
    found.psi === 'any window',
    found.psi,
    'pressure is seen up to 2 s late',
    found.psi === 'none' ? 'boot with psi=1' : 'CAP_SYS_RESOURCE for shorter windows',
  );
  const lockable = found.lockableBytes;
  row(
    'memory lock',
    'better',
    lockable === Number.POSITIVE_INFINITY,
    lockable === Number.POSITIVE_INFINITY ? 'no limit' : `up to ${formatBytes(lockable)}`,
    `a reserve above ${formatBytes(lockable)} is refused at open()`,
    'CAP_IPC_LOCK, or ulimit -l / LimitMEMLOCK=',
  );
  row(
    'process_mrelease',
    'better',
    found.mrelease,
    found.mrelease ? 'there' : 'not there',
    'the memory of a victim that dies slowly comes back only as it dies',
    'Linux 5.15 or later',
  );
  row(
    'MADV_POPULATE_WRITE',
    'better',
    found.populate,
    found.populate ? 'there' : 'not there',
    'the handler meets page faults on its way to a kill',
    'Linux 5.14 or later',
  );
  row(
    'CAP_KILL',
    'needed',
    held('CAP_KILL'),
    held('CAP_KILL') ? 'held' : 'missing',
    "processes of other users cannot be killed; the ladder ends with the kernel's killer",
    'run as root, or AmbientCapabilities=CAP_KILL',
  );
  row(
    'CAP_SYS_NICE',
    'better',
    held('CAP_SYS_NICE'),
    held('CAP_SYS_NICE') ? 'held' : 'missing',
    'on busy CPUs a kill comes milliseconds later: the handler waits in the run queue',
    'run as root, or AmbientCapabilities=CAP_SYS_NICE',
  );
  row(
    'CAP_SYS_RESOURCE',
    'better',
    held('CAP_SYS_RESOURCE'),
    held('CAP_SYS_RESOURCE') ? 'held' : 'missing',
    "the handler's own oom_score_adj cannot be lowered; PSI windows are multiples of 2 s",
    'run as root outside of a container, or docker --cap-add SYS_RESOURCE',
  );
  return {
    version: 1,
    kernel: found.kernel,
    ready: rows.every(({ weight, ok }) => ok || weight === 'better'),
    longestWaitMs: boundOf(DEFAULT_DEADLINES, DEFAULT_GUARD),
    rows,
    handlers,
  };
}

function seconds(ms: number | null): string {
  return ms === null ? 'for ever' : `${ms / 1000} s`;
}

function sayReserve({ bytes, charged, available, maxCharged, failures }: ReserveCounters): string {
  return (
    `${formatBytes(bytes)}, ${formatBytes(charged)} charged, ${formatBytes(available)} available, ` +
    `at most ${formatBytes(maxCharged)} so far, ${failures} refused`
  );
}

function renderDoctor(report: DoctorReport): string {
  const { longestWaitMs } = report;
  const width = Math.max(...report.rows.map(({ name }) => name.length));
  const lines = [`Linux ${report.kernel}`, ''];
  for (const { name, weight, ok, found, costs, fix } of report.rows) {
    const mark = ok ? 'ok ' : weight === 'needed' ? 'NO ' : '-  ';
    lines.push(`${mark} ${name.padEnd(width)}  ${found}`);
    if (!ok) lines.push(`${' '.repeat(width + 4)}  costs: ${costs}`, `${' '.repeat(width + 4)}  fix:   ${fix}`);
  }
  lines.push(
    '',
    report.ready
      ? 'Memory cgroups can be watched here.'
      : 'Memory cgroups cannot be watched here; see the rows marked NO.',
    'The longest that a task waits, with the default deadlines:',
    `  ${seconds(longestWaitMs.handler)} while the handler works (handleWithin);`,
    `  ${seconds(longestWaitMs.guard)} if it is killed, stopped or hangs (respondWithin, guard.silence and guard.within more).`,
  );
  for (const { pid, watches, reserve, windows } of report.handlers) {
    lines.push('', `Handler ${pid}: reserve ${sayReserve(reserve)};`);
    lines.push(
      `  overcharge windows: ${windows.opened} opened, ${windows.refused} refused, ${windows.exhausted} used up`,
      ...watches.map(({ scope, reserve }) => `  ${scope}: ${sayReserve(reserve)}`),
    );
  }
  return lines.join('\n');
}
