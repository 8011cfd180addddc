// What of an episode is a violation, and how it ended.
//
// - Nobody is held (parked at the limit, or frozen) for longer than the bound. Where handler and guard were both out of
//   action nobody can act: there it counts from when somebody came, which is the next start, or one of the two going on.
// - Who dies, and is not the job of somebody else's (who ended it, or removed the memcg), dies in order: not one that is
//   protected, and nobody before all jobs of lower priority that may die and hold memory worth it. So it is for
//   everything that is done by signal, whoever did it: only the handler and its guard do.
// - The kernel's own killer is the last rung, and chooses by size. What is promised of it: while the memcg is watched, the
//   jobs of lowest priority go before all others. So a kill by the kernel is a violation if such a job lived, with memory,
//   between the handler's being ready and the end of whoever was in charge; and it is always one if the process that it
//   took first had been given a higher `oom_score_adj` out of order: those that wait grow with what that brings back, and
//   may then outrank others. What the kernel chose beyond is not judged: after the first tier is gone the guard has nothing
//   prepared, and after the end nobody has. But neither may leave it to the
//   kernel as long as there is somebody whom they may kill, and time.
// - Nobody dies for nothing: after one that was killed by signal has gone, another dies only if memory is still needed
//   then, and not while the first is still dying.
// - A handler that works is left alone.
// - Every control file, score and attribute is as it was, every process is in its freezer cgroup, and nothing is left.
// - An overcharge window is nobody's but its own: the jobs take nothing of it while it is there, and nothing outlives it.
import { cpus } from 'node:os';
import { BOUND_MS, DEAD_MS, DEADLINES, SILENT_MS, WORKING_MS } from './bounds.mjs';
import { sanitizerFindings } from './sanitize.mjs';

/** Less than this is not worth a death (src/policy/lowest-priority.ts). */
const WORTH = 2 ** 20;
/** Two looks of the observer. */
const BLUR_US = 15_000;
const LOOK_US = 4_000;
/** Faults that leave handler and guard to themselves, and somebody to be killed. */
const HARMLESS = [
  'none',
  'jobs-added',
  'policy-throw',
  'policy-reject',
  'policy-never',
  'pids-reused',
  'clock-namespace',
];
/**
 * The kernel charges ahead for each processor, and as much may be missing in the numbers that it tells
 * (MEMCG_CHARGE_BATCH pages each, mm/memcontrol.c).
 */
const BLUR_BYTES = 2 * 64 * 4096 * cpus().length;
/** Somebody else comes into a job from outside, where nobody can stop him before he has begun. */
const NEWCOMERS = ['jobs-added', 'jobs-exit'];
/** How long the end of a process waits for the kernel, at most. */
const EXIT_US = 200_000;
/** A bit more than the handler's second (src/handler.ts). */
const TICK_US = 1_100_000;

export function judge(seen) {
  const { episode, account, kills, injections, next } = seen;
  const violations = [...seen.violations];
  const notes = [...seen.notes];
  const { stage, scenario, handler } = episode;
  const processes = jobProcesses(account, stage);
  const held = judgeHolds(processes, seen);
  violations.push(...held.violations);
  violations.push(...judgeRestraint(processes, seen), ...judgeTakeover(processes, seen));
  const deaths = judgeDeaths(seen, processes, kills);
  violations.push(...deaths.violations);
  violations.push(...stage.changedFiles());
  const living = processes.filter(({ goneUs, job }) => goneUs === 0 && job !== null);
  violations.push(...stage.changedScores(living), ...stage.strayed(living), ...judgeWindows(processes, seen));
  violations.push(...stage.harmedInnocents());
  violations.push(...account.attributes.map((name) => `an attribute is left: ${name}`));
  for (const { message } of handler.all('alarm')) violations.push(`alarm: ${message}`);
  for (const { left } of handler.all('closed'))
    for (const file of left) violations.push(`a descriptor is left: ${file}`);
  for (const text of stage.records()) violations.push(...(text.match(/FAILED.*|ALARM.*/g) ?? []));
  for (const { message } of [...handler.all('failed'), ...(next?.all('failed') ?? [])]) violations.push(message);
  violations.push(...judgeEnd(seen), ...sanitizerFindings());
  if (next !== null && next.ended?.code !== 0)
    violations.push(`the next start failed: ${JSON.stringify(next.ended)} ${lastLine(next)}`);
  if (violations.length > 0 && lastLine(handler) !== '') notes.push(`handler: ${lastLine(handler)}`);
  return {
    episode: scenario.episode,
    seed: scenario.seed,
    faults: scenario.faults.map(({ name }) => name),
    injected: injections.map(({ name, atUs, failed, held }) => ({
      name,
      atMs: (atUs - seen.startUs) / 1000,
      failed,
      held,
    })),
    outcome: outcomeOf(seen, deaths),
    violations: [...new Set(violations)],
    longestMs: held.longestMs,
    nobodyThereMs: held.nobodyThereMs,
    afterHelpMs: held.afterHelpMs,
    kernelChose: deaths.kernelChose,
    replacedMs: seen.guardOut?.replacedUs ? (seen.guardOut.replacedUs - seen.guardOut.fromUs) / 1000 : null,
    guardSignal: seen.guardOut?.signal ?? null,
    blindMs: account.blindUs / 1000,
    notes,
    said: handler.said,
    nextSaid: next?.said ?? [],
    records: stage.records(),
    processes,
    windows: {
      asked: scenario.policy.window !== null,
      opened: handler.all('window').length,
      refused: handler.all('window refused').length,
      hit: injections.filter(({ atUs }) =>
        account.windows.some(({ fromUs, untilUs }) => fromUs <= atUs && atUs <= untilUs),
      ).length,
      takenBytes: Math.max(0, ...takenFrom(account, scenario).map(({ bytes }) => bytes)),
    },
  };
}

const lastLine = (subject) => subject.complaints.trim().split('\n').slice(-6).join(' | ');

/** The job that a process belongs to: by its memcg, or in a flat scene by its name. */
function jobOf({ group, name, pid }, stage) {
  const job = group === '' ? name : group;
  return stage.jobs.has(`${job}#${pid}`) ? `${job}#${pid}` : stage.jobs.has(job) ? job : null;
}

/** After these it is dead at once. */
const DIES = ['handler-kill', 'handler-abort'];
/** These end the handler, or keep it from starting. */
const FATAL = /^(handler-(?!stop|spin)|both-kill|state-|memcg-removed)/;

/** A handler that ends without being made to is a fault of its own, though the guard makes up for it. */
function judgeEnd({ episode, injections }) {
  const { handler, handlerWasEnded, scenario } = episode;
  const found = /AddressSanitizer|runtime error:/.test(handler.complaints)
    ? [`under sanitizers: ${handler.complaints}`]
    : [];
  const { code, signal } = handler.ended;
  const killed = handlerWasEnded || (scenario.killHandler && episode.stage.records().length > 0);
  if (code === 0 || killed || injections.some(({ name }) => FATAL.test(name))) return found;
  return [...found, `the handler ended by itself: ${signal ?? `code ${code}`}: ${lastLine(handler)}`];
}

/** Processes of the memcg with the job that they belong to. */
export function jobProcesses(account, stage) {
  return account.processes.map((process) => ({ ...process, job: jobOf(process, stage) }));
}

/** How long it may take, and from when that counts: for whoever was put out of action. */
function boundsOf({ help, handlerOutUs, guardOut, injections, episode: { scenario } }) {
  if (help !== null) return [{ fromUs: help.atUs, ms: help.withinMs, what: `after "${help.what}"` }];
  const all = [{ fromUs: 0, ms: BOUND_MS, what: 'in all' }];
  if (handlerOutUs !== null) {
    const dies = injections.some(({ name, failed }) => failed === null && DIES.includes(name));
    const alone = injections.length === 1 && scenario.policy.hazard === null;
    const ms = dies && alone ? DEAD_MS : SILENT_MS + (scenario.policy.hazard === 'stuck' ? DEADLINES.handleWithin : 0);
    return [...all, { fromUs: handlerOutUs, ms, what: 'after the handler was out of action' }];
  }
  if (guardOut !== null || scenario.policy.hazard === 'slow') return all;
  return [{ fromUs: 0, ms: WORKING_MS, what: 'though the handler works' }];
}

function judgeHolds(processes, seen) {
  const { help } = seen;
  const violations = new Map(); // one for each job: the longest
  const bounds = boundsOf(seen);
  let longestUs = 0;
  let afterHelpUs = 0;
  for (const { job, pid, heldUs, place, holds } of [...processes].sort((a, b) => a.heldUs - b.heldUs)) {
    longestUs = Math.max(longestUs, heldUs);
    for (const [fromUs, untilUs] of holds) {
      for (const bound of bounds) {
        const tookUs = untilUs - Math.max(fromUs, bound.fromUs);
        if (help !== null) afterHelpUs = Math.max(afterHelpUs, tookUs);
        if (tookUs <= bound.ms * 1000) continue;
        const who = `${job ?? 'somebody'} (${pid}) was ${place} for ${Math.round((untilUs - fromUs) / 1000)} ms`;
        violations.set(job, `${who}, ${Math.round(tookUs / 1000)} ms ${bound.what}: the bound is ${bound.ms} ms`);
      }
    }
  }
  return {
    violations: [...violations.values()],
    longestMs: help === null ? longestUs / 1000 : null,
    nobodyThereMs: help === null ? null : longestUs / 1000,
    afterHelpMs: help === null ? null : afterHelpUs / 1000,
  };
}

/** What the jobs took of it, who survived it, and what a handler that nothing happened to could not undo. */
function judgeWindows(processes, { account, episode: { handler, scenario, stage } }) {
  const numbers = new Set(stage.innocents.map(({ child }) => child.pid)); // one may have been given to another
  const violations = processes
    .filter(({ pid, group, goneUs }) => isWindow(group) && goneUs === 0 && !numbers.has(pid))
    .map(({ pid, name }) => `${name} (${pid}) outlived its window`);
  for (const { name, bytes } of takenFrom(account, scenario).filter(({ bytes }) => bytes > BLUR_BYTES))
    violations.push(`the jobs took ${(bytes / 2 ** 20).toFixed(1)} MiB while ${name} was there`);
  if (!scenario.faults.every(({ name }) => HARMLESS.includes(name))) return violations;
  const failed = handler.all('report').flatMap(({ windows }) => windows.filter((window) => window.failed !== null));
  return [...violations, ...failed.map((window) => `a window was not undone: ${window.failed}`)];
}

/** What the jobs that were there took of each window. */
function takenFrom({ windows }, { faults }) {
  if (faults.some(({ name }) => NEWCOMERS.includes(name))) return [];
  return windows.map(({ name, grewBytes }) => ({ name, bytes: grewBytes }));
}

const isWindow = (group) => /(^|\/)reprieve-window-/.test(group);

/** Jobs that were killed by signal, in the order of their deaths: `{ name, fromUs, untilUs }`. */
function signalVictims(processes, { episode: { stage, scenario }, kills }) {
  const victims = [];
  for (const [name, job] of stage.jobs) {
    const own = processes.filter((process) => process.job === name);
    if (own.some(({ pid }) => kills.has(pid))) continue; // it may have gone with what the kernel took
    const killed = own.filter((process) => {
      const ended = process.goneUs !== 0 && (job.exemptUs === null || process.goneUs < job.exemptUs);
      return ended && !wentByItself(job, process);
    });
    const dead = killed.filter(({ firstUs, goneUs, anonymous }) => goneUs - firstUs > BLUR_US || anonymous >= WORTH);
    const parts = scenario.flat ? dead.map((process) => [process]) : [dead];
    for (const part of parts.filter(({ length }) => length > 0)) {
      const gone = part.map(({ goneUs }) => goneUs);
      victims.push({ name, fromUs: Math.min(...gone), untilUs: Math.max(...gone) });
    }
  }
  return victims.sort((a, b) => a.fromUs - b.fromUs);
}

/** Nobody dies for nothing. */
function judgeRestraint(processes, seen) {
  const { account } = seen;
  const isNeeded = (fromUs, untilUs) => {
    const before = account.needs.findLast(({ atUs }) => atUs <= fromUs);
    return (
      before?.is !== false || account.needs.some(({ atUs, is }) => is && atUs > fromUs && atUs <= untilUs + 2 * LOOK_US)
    );
  };
  const violations = [];
  const victims = signalVictims(processes, seen);
  for (const [index, { name, fromUs }] of victims.entries()) {
    const previous = victims[index - 1];
    if (previous === undefined) continue;
    const waited = fromUs - previous.fromUs;
    // A job that dies slowly is not waited for any longer; of eight processes in one memcg the last goes a bit later.
    if (fromUs < previous.untilUs - BLUR_US && waited < DEADLINES.clearWithin * 1000) {
      violations.push(`${name} was killed while ${previous.name} was dying`);
    }
    const [from, until] = [previous.untilUs, fromUs];
    if (until > from + LOOK_US && !isNeeded(from, until)) {
      violations.push(`${name} was killed though memory was back ${Math.round((until - from) / 1000)} ms before`);
    }
  }
  return violations;
}

/** A handler that works is left alone, and so is the kernel as long as there is somebody who may be killed. */
function judgeTakeover(processes, { episode, handlerOutUs, guardOut, account, kills, closedUs }) {
  const { stage, handler, scenario } = episode;
  const records = stage.records();
  const violations = [];
  const taken = handler.all('revoked').length > 0 || records.some((text) => /^reason (?!left)/m.test(text));
  if (taken && handlerOutUs === null && scenario.policy.hazard !== 'slow') {
    violations.push(`the guard took over from a handler that worked: ${records.join(' ').match(/reason \w+/)?.[0]}`);
  }
  for (const text of records) {
    if (/the kernel's turn/.test(text) && !/nobody is left to be killed|no time is left/.test(text)) {
      violations.push('the guard gave it to the kernel while somebody waited and could have been killed');
    }
  }
  const harmless = scenario.faults.every(({ name }) => HARMLESS.includes(name));
  const early = account.flips.find(
    ({ atUs, disabled }) => disabled === 0 && atUs < closedUs && atUs > readyUs(handler),
  );
  const kernelKilled = processes.some(
    ({ pid, goneUs }) => kills.has(pid) && goneUs > readyUs(handler) && goneUs < closedUs,
  );
  if (harmless && guardOut === null && (kernelKilled || early !== undefined)) {
    const handed = handler.all('report').filter(({ outcome }) => outcome === 'kernel');
    const mayDie = [...stage.jobs.values()].filter(
      ({ protected: isProtected, kind }) => !isProtected && kind !== 'idle',
    );
    const allDead = mayDie.every(({ child }) => child.ended !== null);
    // Its time may have been over, or so many dead as may be.
    if (handed.length === 0 || !(allDead || handed.some(({ why }) => why !== undefined)))
      violations.push('it came to the kernel though the handler worked');
  }
  return violations;
}

const readyUs = (handler) => handler.all('ready')[0]?.atUs ?? Number.POSITIVE_INFINITY;

function judgeDeaths(seen, processes, kills) {
  const { stage, handler } = seen.episode;
  const watchedUs = readyUs(handler);
  const endUs = endOfCharge(seen);
  const jobs = [...stage.jobs].map(([name, job]) => ({
    ...job,
    name,
    processes: processes.filter((process) => process.job === name),
  }));
  const mayDie = jobs.filter(({ protected: isProtected, born }) => !isProtected && born === 0);
  const firstTier = mayDie.reduce(
    (least, job) => (least === null || job.priority < least.priority ? job : least),
    null,
  );
  /** Those that should have gone before it, at a time. */
  const before = (job, atUs) =>
    mayDie.filter(
      (other) =>
        other.priority < job.priority &&
        (other.exemptUs === null || other.exemptUs > atUs) &&
        memoryAt({ processes: other.processes.filter(isKnown(seen)) }, atUs + BLUR_US) >= WORTH,
    );
  const taken = processes.filter(({ pid, goneUs, job }) => job !== null && kills.has(pid) && goneUs > watchedUs);
  const firstKernelUs = Math.min(...taken.map(({ goneUs }) => goneUs));
  const violations = [];
  const kernelChose = new Set();
  for (const job of jobs) {
    const takenUs = Math.min(
      ...job.processes.filter(({ pid }) => kills.has(pid)).map(({ goneUs }) => goneUs || Infinity),
    );
    for (const process of job.processes) {
      const { pid, goneUs } = process;
      if (goneUs === 0 || (job.exemptUs !== null && goneUs > job.exemptUs) || wentByItself(job, process)) continue;
      const lower = before(job, goneUs);
      const names = lower.map(({ name }) => name).join(', ');
      if (kills.has(pid)) {
        kernelChose.add(job.name);
        if (goneUs < watchedUs || goneUs > endUs || lower.length === 0) continue;
        const outOfOrder = goneUs === firstKernelUs && kills.get(pid) > job.scoreAdj;
        if (outOfOrder || lower.includes(firstTier)) {
          violations.push(`the kernel took ${job.name} (oom_score_adj ${kills.get(pid)}) before ${names}`);
        }
      } else if (goneUs < takenUs - BLUR_US) {
        // Later, it may have gone with its parent, which the kernel took.
        if (job.protected) violations.push(`${job.name} is protected and was killed`);
        else if (lower.length > 0) violations.push(`${job.name} was killed before ${names}`);
      }
    }
  }
  return { violations, kernelChose: [...kernelChose] };
}

/**
 * Where each process is a job, one that is younger than the handler's last look may be unknown to the guard: it looks once
 * a second, and at the start of each condition.
 */
function isKnown({ episode: { scenario, handler }, handlerOutUs }) {
  if (!scenario.flat || handlerOutUs === null) return () => true;
  const looks = [...handler.all('policy').map(({ atUs }) => atUs), handlerOutUs - TICK_US].filter(
    (atUs) => atUs <= handlerOutUs,
  );
  const lastLookUs = Math.max(...looks);
  return ({ firstUs }) => firstUs < lastLookUs;
}

/** A parent whose children were killed, and a child that could not be set up in a full memcg. */
function wentByItself({ kind, child }, { pid, firstUs, goneUs }) {
  if (pid === child.pid) return child.ended !== null && child.ended.signal === null;
  return kind === 'bomb' && goneUs - firstUs < BLUR_US;
}

/**
 * From when on the kernel's choice is its own: the memcg was given back to it (by somebody else, or in the end), and those
 * who waited then, if any, are free; a process that exits does not wait for them for longer than it says (src/watch.ts).
 */
function endOfCharge({ episode, closedUs, account, holds }) {
  const givenUs = account.flips.findLast(({ disabled }) => disabled === 0)?.atUs ?? Infinity;
  const endUs = Math.min(givenUs, closedUs, episode.stage.killerWrittenUs ?? Infinity);
  const held = holds.find(({ fromUs, toUs }) => fromUs <= endUs + BLUR_US && toUs >= endUs);
  return held === undefined ? endUs : Math.min(held.toUs, endUs + EXIT_US);
}

/** Anonymous memory of those of a job that lived then. */
function memoryAt({ processes }, atUs) {
  return processes
    .filter(({ firstUs, goneUs }) => firstUs < atUs && (goneUs === 0 || goneUs > atUs))
    .reduce((sum, { anonymous }) => sum + anonymous, 0);
}

function outcomeOf({ episode, help, next, account }, { kernelChose }) {
  const { handler, stage } = episode;
  if (help !== null) return help.what;
  if (handler.all('opened').length === 0) return handler.ended?.code === 1 ? 'refused' : 'not armed';
  if (stage.records().length > 0 || handler.all('revoked').length > 0) return 'guard';
  if (handler.all('vanished').length > 0) return 'vanished';
  const reports = handler
    .all('report')
    .filter(({ victims: dead, outcome }) => dead.length > 0 || outcome !== 'cleared');
  if (reports.some(({ outcome }) => outcome === 'kernel')) return 'kernel';
  if (reports.some(({ outcome }) => outcome === 'released')) return 'released';
  if (reports.length > 0) return 'handler';
  if (handler.all('ready').length === 0) return handler.ended?.code === 1 ? 'refused' : 'not armed';
  if (kernelChose.length > 0) return 'kernel alone';
  return next !== null || account.processes.some(({ heldUs }) => heldUs > 0) ? 'unknown' : 'calm';
}
