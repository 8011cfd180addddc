// Results as a table: fault × outcome × longest wait.

const OUTCOMES = [
  'handler',
  'guard',
  'kernel',
  'released',
  'vanished',
  'kernel alone',
  'not armed',
  'refused',
  'calm',
  'unknown',
];

/** Rows by fault; an episode with two faults counts for each. Nobody in charge is a column of its own. */
export function summarise(results, faults) {
  const rows = faults.map((name) =>
    row(
      name,
      results.filter((result) => result.faults.includes(name)),
    ),
  );
  const windows = results.map((result) => result.windows);
  const sum = (key) => windows.reduce((total, window) => total + window[key], 0);
  const nobody = results.filter(({ nobodyThereMs }) => nobodyThereMs !== null);
  const replaced = (signal) =>
    longest(
      results.filter(({ guardSignal }) => guardSignal === signal),
      'replacedMs',
    );
  return {
    episodes: results.length,
    violations: results.filter(({ violations }) => violations.length > 0).length,
    longestMs: longest(results, 'longestMs'),
    rows: rows.filter(({ episodes }) => episodes > 0),
    replacedMs: { SIGKILL: replaced('SIGKILL'), SIGSTOP: replaced('SIGSTOP') },
    windows: {
      episodes: windows.filter(({ asked }) => asked).length,
      opened: sum('opened'),
      refused: sum('refused'),
      hit: sum('hit'),
      takenBytes: Math.max(0, ...windows.map(({ takenBytes }) => takenBytes)),
    },
    nobody: {
      episodes: nobody.length,
      violations: nobody.filter(({ violations }) => violations.length > 0).length,
      longestMs: longest(nobody, 'nobodyThereMs'),
      afterHelpMs: longest(nobody, 'afterHelpMs'),
    },
  };
}

function row(fault, results) {
  const outcomes = {};
  for (const { outcome, nobodyThereMs } of results) {
    const name = nobodyThereMs === null ? outcome : 'both out';
    outcomes[name] = (outcomes[name] ?? 0) + 1;
  }
  const injections = results.map(({ injected }) => injected.find(({ name }) => name === fault));
  return {
    fault,
    episodes: results.length,
    // What the policy does, and what is there from the start, is in the scenario, and not in this list.
    whileHeld: injections.filter((injection) => injection?.failed === null && injection.held).length,
    outcomes,
    violations: results.filter(({ violations }) => violations.length > 0).length,
    longestMs: longest(results, 'longestMs'),
  };
}

function longest(results, key) {
  const values = results.map((result) => result[key]).filter((value) => value !== null);
  return values.length === 0 ? null : Math.round(Math.max(...values));
}

export function renderTable({ rows, nobody, windows, replacedMs }, bounds) {
  const used = [...OUTCOMES, 'both out'].filter((outcome) => rows.some(({ outcomes }) => outcomes[outcome]));
  const head = ['fault', 'episodes', 'held', ...used, 'longest wait, ms', 'violations'];
  const lines = rows.map(({ fault, episodes, whileHeld, outcomes, longestMs, violations }) => [
    fault,
    episodes,
    whileHeld || '',
    ...used.map((outcome) => outcomes[outcome] ?? ''),
    longestMs ?? '',
    violations,
  ]);
  const table = [head, ...lines].map((cells) => cells.map(String));
  const widths = head.map((_, column) => Math.max(...table.map((cells) => cells[column].length)));
  const render = (cells) =>
    `| ${cells.map((cell, column) => (column === 0 ? cell.padEnd(widths[0]) : cell.padStart(widths[column]))).join(' | ')} |`;
  const rule = `|${widths.map((width, column) => (column === 0 ? '-'.repeat(width + 2) : `${'-'.repeat(width + 1)}:`)).join('|')}|`;
  const text = [render(table[0]), rule, ...table.slice(1).map(render), ''];
  text.push(`Longest wait allowed: ${bounds.boundMs} ms, and less where the handler works or is dead.`);
  for (const [signal, ms] of Object.entries(replacedMs)) {
    if (ms !== null) text.push(`A guard that got ${signal} was replaced within ${ms} ms.`);
  }
  if (windows.episodes > 0) {
    text.push(
      `Overcharge windows were asked for in ${windows.episodes} episodes: ${windows.opened} opened, ${windows.refused} refused; ` +
        `${windows.hit} faults came while one was there; the jobs took ${Math.round(windows.takenBytes / 1024)} KiB of one at most.`,
    );
  }
  if (nobody.episodes > 0) {
    text.push(
      `Handler and guard both out of action: ${nobody.episodes} episodes, ${nobody.violations} with violations; longest wait in all ` +
        `${nobody.longestMs} ms, and ${nobody.afterHelpMs} ms after the next start or after one of them went on (${bounds.nextStartMs} ms ` +
        `allowed after a start).`,
    );
  }
  return text.join('\n');
}
