import { constants as os } from 'node:os';
import { setTimeout as sleep } from 'node:timers/promises';
import { openRealStage } from '../demo/real.js';
import { openSimulatedStage } from '../demo/simulated.js';
import { DEMO_JOBS, type DemoJob, demoSettings, type JobAccount, type Stage } from '../demo/stage.js';
import type { Policy } from '../policy/decision.js';
import { lowestPriority } from '../policy/lowest-priority.js';
import type { Report } from '../report/report.js';
import { renderReport } from '../report/text.js';
import { formatMicros } from '../units.js';

const INTERRUPTS = ['SIGINT', 'SIGTERM', 'SIGHUP'] as const;
/** How long the services are watched after the episode, to see that they go on. */
const AFTER_MS = 400;
/** A demo in which nothing happens has failed. */
const GIVE_UP_MS = 30_000;

interface DemoOptions {
  json?: boolean;
  fallback?: boolean;
  simulate?: boolean;
}

type Accounts = Record<DemoJob, JobAccount & { roundsAfter: number }>;

/** Shows one episode. Exit code 0 when the leak died and the services went on, 1 when not. */
export async function runDemo(options: DemoOptions): Promise<void> {
  const opened = options.simulate ? 'as you asked (--simulate)' : await openRealStage();
  const stage = typeof opened === 'string' ? openSimulatedStage(opened) : opened;
  const say = (text: string) => {
    if (!options.json) process.stdout.write(`${text}\n`);
  };
  let cleared: Promise<void> | undefined;
  const clear = () => {
    cleared ??= stage.handler.close().then(() => stage.clear());
    return cleared;
  };
  const interrupted = (signal: NodeJS.Signals) => {
    void clear().finally(() => process.exit(128 + os.signals[signal]));
  };
  // Whoever reads us may leave before the end; the demo plays on, and clears up.
  process.stdout.on('error', () => {});
  for (const signal of INTERRUPTS) process.on(signal, interrupted);
  try {
    const { report, accounts } = await play(stage, options, say);
    const wentOn = verdict(report, accounts);
    if (options.json) process.stdout.write(`${JSON.stringify(asData(stage, report, accounts), null, 2)}\n`);
    else say(renderOutcome(report, accounts, wentOn));
    process.exitCode = wentOn ? 0 : 1;
  } finally {
    await clear();
    for (const signal of INTERRUPTS) process.off(signal, interrupted);
  }
}

async function play(stage: Stage, options: DemoOptions, say: (text: string) => void) {
  say(stage.title);
  say('');
  for (const [name, { priority }] of Object.entries(DEMO_JOBS)) {
    say(`  ${name.padEnd(9)} priority ${String(priority).padStart(2)}  ${name === 'batch' ? 'leaks' : 'must go on'}`);
  }
  say('');
  await stage.startServices();
  const never: Policy = () => new Promise(() => {});
  await stage.handler.watch(stage.scope, {
    policy: options.fallback ? never : lowestPriority,
    fallback: [lowestPriority, 'kernel'],
    jobs: demoSettings(),
  });
  if (options.fallback) say('The policy never answers: after 500 ms the ladder goes on without it.\n');
  const reported = new Promise<Report>((resolve) => stage.handler.once('report', resolve));
  await stage.startLeak();
  const report = await Promise.race([reported, sleep(GIVE_UP_MS, undefined, { ref: false })]);
  if (report === undefined) throw new Error(`nothing ran out of memory within ${GIVE_UP_MS / 1000} s`);
  const before = { database: stage.account('database').rounds, web: stage.account('web').rounds, batch: 0 };
  await sleep(AFTER_MS);
  const accounts = Object.fromEntries(
    (['database', 'web', 'batch'] as const).map((job) => {
      const account = stage.account(job);
      return [job, { ...account, roundsAfter: job === 'batch' ? 0 : account.rounds - before[job] }];
    }),
  ) as Accounts;
  return { report, accounts };
}

function verdict(report: Report, { database, web, batch }: Accounts): boolean {
  const goesOn = (account: Accounts[DemoJob]) => account.alive && account.roundsAfter > 0 && account.errors === 0;
  return report.outcome === 'cleared' && !batch.alive && goesOn(database) && goesOn(web);
}

function renderOutcome(report: Report, accounts: Accounts, wentOn: boolean): string {
  const lines = [renderReport(report), '', 'The others:'];
  for (const job of ['database', 'web'] as const) {
    const { alive, longestStallUs, rounds, roundsAfter, errors } = accounts[job];
    lines.push(
      `  ${job}: ${alive ? 'alive' : 'DEAD'}, stood still for ${formatMicros(longestStallUs)} at most; ` +
        `${rounds} rounds of work, ${roundsAfter} of them since, ${errors} wrong results`,
    );
  }
  const { reserve } = report;
  lines.push(
    `Reserve: ${reserve.maxCharged} of ${reserve.bytes} bytes used.`,
    '',
    wentOn ? 'The leak is gone, and the others went on.' : 'This is not how it should have ended.',
  );
  return lines.join('\n');
}

/** The fields that docs/report.md describes. */
function asData(stage: Stage, report: Report, accounts: Accounts) {
  const { id, owner, scopes, openedAt, outcome, steps, waiters, pokes } = report;
  return {
    version: 1,
    simulated: stage.simulated,
    condition: { id, owner, scopes, openedAt, outcome, steps, waiters, pokes },
    snapshot: report.snapshot,
    decision: report.decisions[0] ?? null,
    action: { victims: report.victims, kernelVictims: report.kernelVictims },
    explanation: report.explanation,
    timings: report.timings,
    faults: report.faults,
    contextSwitches: report.contextSwitches,
    collections: report.collections,
    jobs: accounts,
    reserve: report.reserve,
  };
}
