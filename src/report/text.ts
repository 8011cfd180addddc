import { formatBytes, formatMicros } from '../units.js';
import type { Outcome, Report } from './report.js';

const OUTCOMES: Record<Outcome, string> = {
  cleared: 'cleared',
  kernel: "the kernel's own killer chose",
  vanished: 'the memcg was removed',
  released: 'released: the watch was closed',
  revoked: 'the guard took over',
  left: 'left to the owner of the memcg above',
};

/** The episode as a timeline that a person reads. */
export function renderReport(report: Report): string {
  const { snapshot } = report;
  const full = snapshot
    ? ` (${formatBytes(snapshot.usage)} of ${formatBytes(snapshot.limit ?? Number.POSITIVE_INFINITY)})`
    : '';
  const who = report.owner === 'system' ? 'The machine' : report.owner;
  const lines = [`${who} ran out of memory${full} at ${report.openedAt}: ${OUTCOMES[report.outcome]}.`, ''];
  for (const { atUs, rung, text } of report.steps) {
    lines.push(`  ${`+${formatMicros(atUs)}`.padStart(10)}  ${rung.padEnd(10)}  ${text}`);
  }
  if (report.explanation.length > 0) {
    lines.push('', 'Why:', ...report.explanation.map((sentence) => `  ${sentence}`));
  }
  const waiting = new Map<string, number>();
  for (const { job } of report.waiters) waiting.set(job, (waiting.get(job) ?? 0) + 1);
  if (waiting.size > 0) {
    const seen = [...waiting].map(([job, count]) => `${job} (${count})`).join(', ');
    lines.push('', `Threads seen waiting: ${seen}`);
  }
  const met = renderMet(report);
  if (met !== null) lines.push('', met);
  return lines.join('\n');
}

/** What the way to the kill met; null if nobody was killed. */
function renderMet({ faults, contextSwitches, collections }: Report): string | null {
  if (faults === null || contextSwitches === null) return null;
  const { voluntary, involuntary } = contextSwitches;
  const parts = [
    counted(faults.minor + faults.major, 'page fault'),
    `${counted(voluntary + involuntary, 'context switch', 'es')} (${involuntary} involuntary)`,
    collections?.count
      ? `${counted(collections.count, 'pause')} of the garbage collector (${formatMicros(collections.us)})`
      : 'no pause of the garbage collector',
  ];
  return `The handler from event to kill: ${parts.join(', ')}.`;
}

function counted(count: number, what: string, plural = 's'): string {
  return `${count} ${what}${count === 1 ? '' : plural}`;
}
