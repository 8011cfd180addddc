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
//   took had been given a higher `oom_score_adj` out of order. What the kernel chose beyond is counted, not judged: after
//   the first tier is gone the guard has nothing prepared, and after the end nobody has.
// - Every control file, score and attribute is as it was, and nothing is left.
import { BOUND_MS } from './bounds.mjs';
import { sanitizerFindings } from './sanitize.mjs';

/** Less than this is not worth a death (src/policy/lowest-priority.ts). */
const WORTH = 2 ** 20;
/** Two looks of the observer. */
const BLUR_US = 15_000;
/** How long the end of a process waits for the kernel, at most. */
const EXIT_US = 200_000;
/** A bit more than the handler's second (src/handler.ts). */
const TICK_US = 1_100_000;

export function judge(seen) {
  const { episode, account, kills, injections, next } = seen;
  const violations = [...seen.violations];
  const notes = [...seen.notes];
  const { stage, scenario, handler } = episode;
  const processes = account.processes.map((process) => ({ ...process, job: jobOf(process, stage) }));
  const held = judgeHolds(processes, seen.help);
  violations.push(...held.violations);
  const deaths = judgeDeaths(seen, processes, kills);
  violations.push(...deaths.violations);
  violations.push(...stage.changedFiles());
  violations.push(...stage.changedScores(processes.filter(({ goneUs, job }) => goneUs === 0 && job !== null)));
  violations.push(...stage.harmedInnocents());
  violations.push(...account.attributes.map((name) => `an attribute is left: ${name}`));
  for (const { message } of [...handler.all('failed'), ...(next?.all('failed') ?? [])]) violations.push(message);
  violations.push(...judgeEnd(seen), ...sanitizerFindings());
  if (next !== null && next.ended?.code !== 0)
    violations.push(`the next start failed: ${JSON.stringify(next.ended)} ${lastLine(next)}`);
  if (violations.length > 0 && lastLine(handler) !== '') notes.push(`handler: ${lastLine(handler)}`);
  return {
    episode: scenario.episode,
    seed: scenario.seed,
    faults: scenario.faults.map(({ name }) => name),
    injected: injections.map(({ name, atUs, failed }) => ({ name, atMs: (atUs - seen.startUs) / 1000, failed })),
    outcome: outcomeOf(seen, deaths),
    violations: [...new Set(violations)],
    longestMs: held.longestMs,
    nobodyThereMs: held.nobodyThereMs,
    afterHelpMs: held.afterHelpMs,
    kernelChose: deaths.kernelChose,
    blindMs: account.blindUs / 1000,
    notes,
    said: handler.said,
    nextSaid: next?.said ?? [],
    records: stage.records(),
    processes,
  };
}

const lastLine = (subject) => subject.complaints.trim().split('\n').slice(-6).join(' | ');

/** The job that a process belongs to: by its memcg, or in a flat scene by its name. */
function jobOf({ group, name, pid }, stage) {
  const job = group === '' ? name : group;
  return stage.jobs.has(`${job}#${pid}`) ? `${job}#${pid}` : stage.jobs.has(job) ? job : null;
}

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

function judgeHolds(processes, help) {
  const violations = new Map(); // one for each job: the longest
  let longestUs = 0;
  let afterHelpUs = 0;
  for (const { job, pid, heldUs, heldUntilUs, place } of [...processes].sort((a, b) => a.heldUs - b.heldUs)) {
    if (heldUs === 0) continue;
    longestUs = Math.max(longestUs, heldUs);
    const who = `${job ?? 'somebody'} (${pid}) was ${place} for ${Math.round(heldUs / 1000)} ms`;
    if (help === null) {
      if (heldUs > BOUND_MS * 1000) violations.set(job, `${who}, the bound is ${BOUND_MS} ms`);
      continue;
    }
    const sinceUs = heldUntilUs - Math.max(heldUntilUs - heldUs, help.atUs);
    afterHelpUs = Math.max(afterHelpUs, sinceUs);
    if (sinceUs > help.withinMs * 1000) {
      const since = `${Math.round(sinceUs / 1000)} ms of it after "${help.what}"`;
      violations.set(job, `${who}, ${since}, the bound is ${help.withinMs} ms`);
    }
  }
  return {
    violations: [...violations.values()],
    longestMs: help === null ? longestUs / 1000 : null,
    nobodyThereMs: help === null ? null : longestUs / 1000,
    afterHelpMs: help === null ? null : afterHelpUs / 1000,
  };
}

function judgeDeaths(seen, processes, kills) {
  const { stage, handler } = seen.episode;
  const readyUs = handler.all('ready')[0]?.atUs ?? Number.POSITIVE_INFINITY;
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
        if (goneUs < readyUs || goneUs > endUs || lower.length === 0) continue;
        if (kills.get(pid) > job.scoreAdj || lower.includes(firstTier)) {
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
