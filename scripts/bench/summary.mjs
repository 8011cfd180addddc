// From episodes to figures, and figures as a table for people.

const MEASURES = [
  ['oomToWake', 'OOM to wake-up'],
  ['wakeToKill', 'wake-up to SIGKILL'],
  ['faultToKill', 'fatal fault to SIGKILL'],
  ['oomToKill', 'OOM to SIGKILL'],
  ['oomToBack', 'OOM to memory back'],
  ['oomToGone', 'OOM to leak gone'],
  ['stall', "service's longest stall"],
  ['faults', 'page faults, wake-up to SIGKILL'],
];

/** Nearest rank: a value that was measured; with fewer than 100 of them p99 is the largest. */
export function percentile(sorted, percent) {
  return sorted[Math.max(0, Math.ceil((sorted.length * percent) / 100) - 1)];
}

/** How often each value is there, by value. */
export function histogram(values) {
  const counts = new Map();
  for (const value of [...values].sort((a, b) => a - b)) counts.set(value, (counts.get(value) ?? 0) + 1);
  return counts;
}

/** Figures of the episodes that did not fail, and how many failed of what. */
export function summarise(episodes) {
  const good = episodes.filter(({ failures }) => failures.length === 0);
  const failures = {};
  for (const failure of episodes.flatMap((episode) => episode.failures)) {
    failures[failure] = (failures[failure] ?? 0) + 1;
  }
  const figures = {};
  for (const [measure] of MEASURES) {
    const sorted = good.map((episode) => episode[measure]).filter((value) => value !== null);
    sorted.sort((a, b) => a - b);
    if (sorted.length === 0) continue;
    figures[measure] = {
      runs: sorted.length,
      p50: percentile(sorted, 50),
      p99: percentile(sorted, 99),
      max: sorted.at(-1),
    };
  }
  return { played: episodes.length, succeeded: good.length, failures, figures };
}

const LABEL = 32;
const CELL = 7;
const COLUMNS = ['p50', 'p99', 'max', 'runs'];

/** @param summaries by contender */
export function renderTable(title, summaries) {
  const names = Object.keys(summaries);
  const cells = (values) => values.map((value) => String(value ?? '–').padStart(CELL)).join('');
  const group = (text) => text.padStart(CELL * COLUMNS.length);
  const lines = [
    title,
    '',
    ' '.repeat(LABEL) + names.map(group).join('') + 'reprieve/listener'.padStart(CELL * 2 + 5),
    `${'µs'.padEnd(LABEL) + names.map(() => cells(COLUMNS)).join('')}     ${cells(['p50', 'p99'])}`,
  ];
  for (const [measure, label] of MEASURES) {
    const figures = names.map((name) => summaries[name].figures[measure]);
    const ratio = (column) => {
      const [ours, theirs] = ['reprieve', 'listener'].map((name) => summaries[name]?.figures[measure]?.[column]);
      return ours > 0 && theirs > 0 ? (ours / theirs).toFixed(2) : undefined;
    };
    lines.push(
      label.padEnd(LABEL) +
        figures.map((figure) => cells(COLUMNS.map((column) => figure?.[column]))).join('') +
        '     ' +
        cells([ratio('p50'), ratio('p99')]),
    );
  }
  lines.push('');
  for (const name of names) {
    const { played, succeeded, failures } = summaries[name];
    const why = Object.entries(failures).map(([failure, count]) => `${failure} ${count}`);
    lines.push(`${name}: ${succeeded} of ${played} episodes succeeded${why.length > 0 ? ` (${why.join(', ')})` : ''}`);
  }
  return lines.join('\n');
}
