import { type Findings, probeCapabilities } from '../capabilities.js';
import { DEFAULT_DEADLINES } from '../condition/options.js';
import { type Bound, boundOf } from '../guard/bound.js';
import { STATE_DIRECTORY } from '../guard/instance.js';
import { DEFAULT_GUARD } from '../guard/options.js';
import { type HandlerStatus, readStatuses } from '../guard/status.js';
import { offersOf, type ScopeOffer, type Scopes } from '../offers.js';
import type { ReserveCounters } from '../reserve/account.js';
import { formatBytes } from '../units.js';

/** One thing that a machine may offer. */
interface DoctorRow {
  name: string;
  /**
   * 'needed': without it no handler is opened, or nothing can be watched. 'memcg': without it no memcg can be watched.
   * 'better': without it something is slower or weaker.
   */
  weight: 'needed' | 'memcg' | 'better';
  ok: boolean;
  found: string;
  /** What its want costs, and how to get it; empty where it is there. */
  costs: string;
  fix: string;
}

export interface DoctorReport {
  version: 1;
  kernel: string;
  /** Everything that is needed is there, and at least one scope can be watched. */
  ready: boolean;
  /** What can be watched, by what, and what it lacks. */
  scopes: Scopes;
  /** The longest that a task waits with the default deadlines, in milliseconds. */
  longestWaitMs: Bound;
  rows: DoctorRow[];
  /** Handlers that run here, with their reserve, as far as they may be seen. */
  handlers: HandlerStatus[];
}

/** Prints what this machine offers. Exit code 0 when a memcg or the machine can be watched here, 1 when neither can. */
export function runDoctor(options: { json?: boolean }): void {
  const report = diagnose(probeCapabilities(), readStatuses(STATE_DIRECTORY));
  process.stdout.write(options.json ? `${JSON.stringify(report, null, 2)}\n` : `${renderDoctor(report)}\n`);
  process.exitCode = report.ready ? 0 : 1;
}

/** The rows of a machine's capabilities. */
export function diagnose(found: Findings, handlers: HandlerStatus[]): DoctorReport {
  const scopes = offersOf(found);
  const rows = [...rowsOfHandler(found), ...rowsOfMemcgs(found), ...rowsOfMachine(found), ...rowsOfCapabilities(found)];
  const canWatch = Object.values(scopes).some(({ by }: ScopeOffer) => by !== null);
  return {
    version: 1,
    kernel: found.kernel,
    ready: canWatch && rows.every(({ weight, ok }) => ok || weight !== 'needed'),
    scopes,
    longestWaitMs: boundOf(DEFAULT_DEADLINES, DEFAULT_GUARD),
    rows,
    handlers,
  };
}

function row(
  name: string,
  weight: DoctorRow['weight'],
  ok: boolean,
  found: string,
  costs: string,
  fix: string,
): DoctorRow {
  return { name, weight, ok, found, costs: ok ? '' : costs, fix: ok ? '' : fix };
}

function rowsOfHandler({ pidfd, guard, state }: Findings): DoctorRow[] {
  return [
    row(
      'pidfd_open',
      'needed',
      pidfd,
      pidfd ? 'there' : 'not there',
      'a victim cannot be named by identity',
      'Linux 5.3 or later',
    ),
    row(
      'guard',
      'needed',
      guard.path !== null,
      guard.path ?? (guard.whyNot.split('\n')[0] || 'not there'),
      'nobody acts when the handler is killed or hangs, so none is opened',
      'npm rebuild reprieve, or node scripts/install.mjs --from-source',
    ),
    row(
      'state directory',
      'needed',
      state.writable,
      `${state.directory}, ${state.writable ? 'can be written' : 'cannot be written'}`,
      'what is changed cannot be written down first, so nothing is changed',
      'run as root, or in a session that has XDG_RUNTIME_DIR, or name another one: the `stateDirectory` option',
    ),
  ];
}

const WRITABLE = 'run as root; in a container bind /sys/fs/cgroup writable';
const DELEGATE = `${WRITABLE}; as a user, in a unit with Delegate=yes`;

function rowsOfMemcgs(found: Findings): DoctorRow[] {
  const { memcgs, memoryV1, cgroupV2, refuge } = found;
  const at = { v1: memoryV1, v2: cgroupV2 }[memcgs ?? 'v2'];
  const rows = [
    row(
      'memory cgroups',
      'memcg',
      memcgs !== null,
      memcgs === null
        ? cgroupV2 === null
          ? 'not mounted'
          : `cgroup v2 at ${cgroupV2.point}, without the memory controller`
        : `cgroup ${memcgs} at ${at?.point}${at?.writable ? '' : ', read-only'}`,
      "only the scope 'system' can be watched, and its jobs are what processes have in common",
      'boot without cgroup_disable=memory; mount -t cgroup2 none /sys/fs/cgroup',
    ),
  ];
  if (memcgs === 'v1') rows.push(...rowsOfV1(found));
  if (memcgs === 'v2') rows.push(...rowsOfV2(found));
  if (memcgs === null) return rows;
  rows.push(
    row(
      'memcg of its own',
      'better',
      refuge !== null,
      refuge === null
        ? 'cannot be made above the one that the handler lives in'
        : `can be made ${refuge === '/' ? 'below the root' : `in ${refuge}`}: the handler moves to it, or steps out to it`,
      'the memcg that holds the handler cannot be watched',
      DELEGATE,
    ),
  );
  return rows;
}

function rowsOfV1({ memoryV1, oomControl, eventControl, kernelReserve }: Findings): DoctorRow[] {
  return [
    row(
      'memory.oom_control',
      'memcg',
      oomControl && memoryV1?.writable === true,
      oomControl ? (memoryV1?.writable ? 'can be written' : 'read-only mount') : 'cannot be written',
      'the kernel goes on killing at once, by size',
      WRITABLE,
    ),
    row(
      'cgroup.event_control',
      'memcg',
      eventControl,
      eventControl ? 'can be written' : 'cannot be written',
      'no signal when a memcg runs out of memory',
      'run as root: since Linux 6.1 the file is 0200',
    ),
    row(
      'kernel reserve',
      'better',
      kernelReserve,
      kernelReserve ? 'memory.oom_reserve_in_bytes is there' : 'no memory.oom_reserve_in_bytes',
      'what must be charged to a full memcg takes an overcharge window, for which its jobs are frozen',
      'a kernel with the userspace OOM patchset',
    ),
    row(
      'memory.min',
      'better',
      false,
      'not in cgroup v1',
      'what the handler has in its heap can be swapped out, or reclaimed, when the machine is short of memory',
      'boot with systemd.unified_cgroup_hierarchy=1, which makes nobody wait; or do without swap',
    ),
  ];
}

function rowsOfV2({ v2, refuge }: Findings): DoctorRow[] {
  const { ground = null, limits, kill, oomGroup } = v2 ?? {};
  const where = ground === null ? '' : ground === '/' ? '' : ` below ${ground}`;
  /** Of a file that may not be seen anywhere yet, as there is no memcg. */
  const file = (name: string, there: boolean | undefined, costs: string, fix: string) =>
    row(
      name,
      'better',
      there ?? ground !== null,
      there === undefined ? 'not seen: there is no memcg yet' : there ? `can be written${where}` : 'cannot be written',
      costs,
      fix,
    );
  return [
    file(
      'memory.high and .max',
      limits,
      'jobs cannot be held while a policy thinks: `hold: true` is refused, and the kernel may be quicker',
      DELEGATE,
    ),
    file(
      'cgroup.kill',
      kill,
      'a job that forks is killed in rounds over its processes',
      `Linux 5.14 or later; ${DELEGATE}`,
    ),
    file('memory.oom.group', oomGroup, "the kernel's killer takes one process of a job, and not all of it", DELEGATE),
    row(
      'memory.min',
      'better',
      refuge !== null,
      refuge === null ? 'not without a memcg of its own' : 'can protect the memory of the handler',
      'what the handler has in its heap can be swapped out, or reclaimed, when the machine is short of memory',
      DELEGATE,
    ),
  ];
}

function rowsOfMachine(found: Findings): DoctorRow[] {
  const { freezer, memcgs, psi, lockableBytes, mrelease, populate } = found;
  return [
    row(
      'freezer',
      'better',
      freezer !== null,
      freezer === null ? 'none that can be written' : freezer === 'v1' ? 'that of cgroup v1' : 'cgroup.freeze',
      memcgs === 'v1'
        ? "no overcharge window: nothing can be charged to a full memcg; in 'system' jobs go on while a policy thinks"
        : 'jobs go on while a policy thinks',
      memcgs === 'v1' ? `mount -t cgroup -o freezer freezer /sys/fs/cgroup/freezer; ${WRITABLE}` : DELEGATE,
    ),
    row(
      'PSI triggers',
      'better',
      psi === 'any window',
      psi,
      psi === 'none'
        ? 'a machine, or a memcg of v2, that stalls before it is full is not seen'
        : 'pressure is seen up to 2 s late',
      psi === 'none' ? 'boot with psi=1' : 'CAP_SYS_RESOURCE for shorter windows',
    ),
    row('swap', 'better', true, saySwap(found.swap), '', ''),
    row(
      'memory lock',
      'better',
      lockableBytes === Number.POSITIVE_INFINITY,
      lockableBytes === Number.POSITIVE_INFINITY ? 'no limit' : `up to ${formatBytes(lockableBytes)}`,
      `a reserve above ${formatBytes(lockableBytes)} is refused at open()`,
      'CAP_IPC_LOCK, or ulimit -l / LimitMEMLOCK=',
    ),
    row(
      'process_mrelease',
      'better',
      mrelease,
      mrelease ? 'there' : 'not there',
      'the memory of a victim that dies slowly comes back only as it dies',
      'Linux 5.15 or later',
    ),
    row(
      'MADV_POPULATE_WRITE',
      'better',
      populate,
      populate ? 'there' : 'not there',
      'the handler meets page faults on its way to a kill',
      'Linux 5.14 or later',
    ),
  ];
}

/** What it does to the scope 'system': nothing is wrong with either. */
function saySwap({ total, zram }: Findings['swap']): string {
  if (total === 0) return "none: 'system' is out of memory by MemAvailable alone";
  const part = zram === 0 ? '' : `, ${formatBytes(zram)} of it zram, of which half counts`;
  return `${formatBytes(total)}${part}: 'system' is out of memory once that is used up too, or all stand still`;
}

function rowsOfCapabilities({ held, lowersScore }: Findings): DoctorRow[] {
  const capability = (name: string, costs: string, fix: string) =>
    row(name, 'better', held.includes(name), held.includes(name) ? 'held' : 'missing', costs, fix);
  return [
    capability('CAP_KILL', 'only processes of this user can be killed', 'run as root, or AmbientCapabilities=CAP_KILL'),
    capability(
      'CAP_SYS_NICE',
      'on busy CPUs a kill comes milliseconds later: the handler waits in the run queue',
      'run as root, or AmbientCapabilities=CAP_SYS_NICE',
    ),
    row(
      'oom_score_adj',
      'better',
      lowersScore,
      lowersScore ? 'can be lowered' : 'can be raised only (no CAP_SYS_RESOURCE)',
      "the kernel's killer may take the handler or its guard, which is largest perhaps; PSI windows are multiples of 2 s",
      'run as root outside of a container, or docker --cap-add SYS_RESOURCE, or OOMScoreAdjust=-999 of its unit',
    ),
  ];
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

const WHILE_THINKING = {
  waits: 'who wants memory waits in the kernel while the policy thinks',
  throttled: 'with `hold: true` jobs are throttled at the limit and frozen while the policy thinks',
  frozen: 'jobs that grow are frozen while the policy thinks',
  'goes on': 'jobs go on while the policy thinks',
};
const BY = { v1: 'cgroup v1', v2: 'cgroup v2', processes: 'its processes' };

function sayScope(scope: string, { by, whileThinking, lacks }: ScopeOffer): string[] {
  if (by === null) return [`'${scope}' cannot be watched: ${lacks.join('; ')}.`];
  return [
    `'${scope}' can be watched, by ${BY[by]}: ${WHILE_THINKING[whileThinking]}.`,
    ...lacks.map((lack) => `  ${lack}`),
  ];
}

function renderDoctor(report: DoctorReport): string {
  const { longestWaitMs } = report;
  const width = Math.max(...report.rows.map(({ name }) => name.length));
  const lines = [`Linux ${report.kernel}`, ''];
  for (const { name, weight, ok, found, costs, fix } of report.rows) {
    const mark = ok ? 'ok ' : weight === 'better' ? '-  ' : 'NO ';
    lines.push(`${mark} ${name.padEnd(width)}  ${found}`);
    if (!ok) lines.push(`${' '.repeat(width + 4)}  costs: ${costs}`, `${' '.repeat(width + 4)}  fix:   ${fix}`);
  }
  lines.push(
    '',
    ...sayScope('memcg:/path', report.scopes.memcg),
    ...sayScope('system', report.scopes.system),
    ...(report.ready ? [] : ['No handler can be opened here; see the rows marked NO.']),
    '',
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
