// From the account of a run to a verdict, and from many to tables in Markdown.
import { HANDLERS } from './handlers.mjs';
import { SHAPES } from './scenario.mjs';

/** What became of one run, in figures and a sentence. */
export function judge(result) {
  if (result.error !== undefined) return { failed: result.error, sentence: `failed: ${result.error}` };
  const dead = (job) => result.deaths.filter((death) => death.job === job).length;
  const lost = Object.keys(result.stalls).filter((job) => dead(job) > 0);
  const right = result.recovered && lost.length === 0;
  const gap = lost.includes('service') ? null : result.stalls.service.longest;
  const recovery = result.recovered && result.shortAt !== null ? Math.max(0, result.aboveAt - result.shortAt) : null;
  const verdict = {
    right,
    lost,
    gap,
    restGap: result.stalls.service.rest,
    recovery,
    leftAtKill: result.leftAtKill,
    least: result.least,
    criticalMs: result.criticalMs,
    kernelKills: result.kernelKills,
  };
  return { ...verdict, sentence: sentenceOf(result, verdict) };
}

function sentenceOf(result, { right, lost, gap, recovery, leftAtKill, criticalMs, kernelKills }) {
  const victims = right ? 'right' : lost.length > 0 ? `lost ${lost.join(', ')}` : 'the leak lives';
  const parts = [
    victims,
    result.recovered ? null : 'not recovered',
    gap === null ? null : `gap ${gap} ms`,
    recovery === null ? null : `recovery ${recovery.toFixed(0)} ms`,
    leftAtKill === null ? null : `${leftAtKill} % left at the kill`,
    `${criticalMs} ms critical`,
    `kernel kills ${kernelKills}`,
  ];
  return parts.filter((part) => part !== null).join(', ');
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length / 2;
  return sorted.length % 2 === 1 ? sorted[Math.floor(middle)] : (sorted[middle - 1] + sorted[middle]) / 2;
}

/** Median and, in brackets, the worst of what was measured; a dash where nothing was. */
function cell(values, digits, worst = Math.max) {
  const known = values.filter((value) => value !== null && value !== undefined);
  if (known.length === 0) return '–';
  const [middle, last] = [median(known), worst(...known)].map((value) => value.toFixed(digits));
  return middle === last ? middle : `${middle} (${last})`;
}

const COLUMNS = [
  ['handler', (name) => HANDLERS[name].title],
  ['right victim', (_, all) => `${all.filter(({ right }) => right).length} of ${all.length}`],
  [
    'longest gap, ms',
    (_, all) =>
      cell(
        all.map(({ gap }) => gap),
        0,
      ),
  ],
  [
    'shortage to recovery, ms',
    (_, all) =>
      cell(
        all.map(({ recovery }) => recovery),
        0,
      ),
  ],
  [
    'left at the kill, %',
    (_, all) =>
      cell(
        all.map(({ leftAtKill }) => leftAtKill),
        1,
        Math.min,
      ),
  ],
  [
    'below 2 %, ms',
    (_, all) =>
      cell(
        all.map(({ criticalMs }) => criticalMs),
        0,
      ),
  ],
  [
    'kernel kills',
    (_, all) =>
      cell(
        all.map(({ kernelKills }) => kernelKills),
        0,
      ),
  ],
];

function row(cells) {
  return `| ${cells.join(' | ')} |`;
}

function shapeTable(title, results) {
  const handlers = [...new Set(results.map(({ handler }) => handler))];
  const lines = [`### ${title}`, '', row(COLUMNS.map(([name]) => name)), row(COLUMNS.map(() => '---'))];
  for (const handler of handlers) {
    const all = results.filter((result) => result.handler === handler).map(({ verdict }) => verdict);
    lines.push(row(COLUMNS.map(([, text]) => text(handler, all))));
  }
  return lines.join('\n');
}

function idleTable(results) {
  const lines = ['### At rest', '', row(['handler', 'resident, MiB', 'processor, %']), row(['---', '---', '---'])];
  for (const handler of new Set(results.map((result) => result.handler))) {
    const idle = results.filter((result) => result.handler === handler && result.idle).map((result) => result.idle);
    if (idle.length === 0) continue;
    const figures = [
      cell(
        idle.map(({ rssKiB }) => rssKiB / 1024),
        1,
      ),
      cell(
        idle.map(({ cpuPercent }) => cpuPercent),
        2,
      ),
    ];
    lines.push(row([HANDLERS[handler].title, ...figures]));
  }
  return lines.join('\n');
}

function failureList(results) {
  const wrong = results.filter(({ verdict }) => !verdict.right);
  if (wrong.length === 0) return null;
  const line = ({ handler, shape, swap, run, verdict }) =>
    `- ${handler}, ${shape}, ${swap ? 'swap' : 'no swap'}, run ${run + 1}: ${verdict.sentence}`;
  return ['### Runs that went wrong', '', ...wrong.map(line)].join('\n');
}

/** @param results each with its verdict */
export function renderTables(results, { cpu, cores, load, minutes }) {
  const parts = [
    `${cores} × ${cpu}, load ${load.map((value) => value.toFixed(2)).join(' to ')}, ${minutes.toFixed(0)} minutes. Medians, the worst in brackets.`,
  ];
  for (const swap of [false, true]) {
    for (const shape of Object.keys(SHAPES)) {
      const these = results.filter((result) => result.swap === swap && result.shape === shape);
      if (these.length > 0) parts.push(shapeTable(`\`${shape}\`, ${swap ? 'with' : 'without'} swap`, these));
    }
  }
  const rest = results.flatMap(({ verdict }) => verdict.restGap ?? []);
  if (rest.length > 0) parts.push(`At rest the service's longest gap in a second was ${cell(rest, 0)} ms.`);
  parts.push(idleTable(results), failureList(results));
  return parts.filter((part) => part !== null).join('\n\n');
}
