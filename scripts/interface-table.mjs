#!/usr/bin/env node
// Writes docs/interface.md, the behaviours by environment.
//   node scripts/interface-table.mjs              runs them in all places, and names what does not hold
//   node scripts/interface-table.mjs --write      runs nothing: writes what the tests declare
//   node scripts/interface-table.mjs --check      runs nothing: does the page fit what the tests declare?
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { PLACES, runSuite } from './behaviour/run.mjs';
import { root } from './cache.mjs';

const page = join(root, 'docs/interface.md');
const NAMES = {
  v1: '`memcg:`, v1',
  v2: '`memcg:`, v2',
  'v2-hold': '`memcg:`, v2, `hold`',
  'system-v1': '`system`, v1',
  'system-v2': '`system`, v2',
  'system-plain': '`system`, no memcg',
};
const WORDS = { same: 'same', different: 'differs', impossible: '—' };

const HEAD = `# One interface

What the same calls do in each environment. Each line is a test in \`test/behaviour/\`, written once against the public API; this table
is made from what they declare: \`node scripts/interface-table.mjs --write\`. CI runs all of them on v1, and a choice in the others
(\`test/vm/behaviour.test.ts\`); \`node scripts/interface-table.mjs\` runs all of them everywhere, which takes half an hour, and names
what does not hold.

**What has been seen** (2026-11-28, Linux 6.1.0-56 in emulated machines, each place once through; three to ten are impossible there): v1
38 held; \`system\` on v2 all 35. \`system\` on v1 31 of 35: two of the four failures were the suite's own, were mended, and held when
run again; open are \`handler-stopped\` (no job was held within 20 s) and \`hand-over\` (the kernel had killed nobody). Before the latest
changes, and not run through again since: \`system\` without memcgs 30; v2 with \`hold\` 30, and seven failures of it mended or
declared. On v2 without \`hold\` an emulated handler is not always quicker than the kernel.
`;

function render(behaviours) {
  const notes = [];
  const noteOf = (why) => {
    if (!notes.includes(why)) notes.push(why);
    return notes.indexOf(why) + 1;
  };
  const cell = ({ differences }, environment) => {
    const found = differences[environment];
    return found === undefined ? WORDS.same : `${WORDS[found.verdict]} (${noteOf(found.why)})`;
  };
  const environments = Object.keys(NAMES);
  const row = (cells) => `| ${cells.join(' | ')} |`;
  const lines = behaviours.map((behaviour) => [
    `\`${behaviour.id}\``,
    behaviour.sentence,
    ...environments.map((environment) => cell(behaviour, environment)),
  ]);
  const head = ['test', 'what', ...environments.map((environment) => NAMES[environment])];
  const table = [head, head.map(() => '---'), ...lines].map(row).join('\n');
  const why = notes.map((note, index) => `${index + 1}. ${note}`).join('\n');
  return `${HEAD}\n${table}\n${why === '' ? '' : `\n${why}\n`}`;
}

/** What does not hold, of the results of one place. */
function failuresOf(place, results) {
  const { environment } = PLACES[place];
  return results.flatMap(({ id, status, differences }) => {
    const allowed = differences[environment]?.verdict === 'impossible' ? 'skipped' : 'passed';
    return status === allowed ? [] : [`${place}: ${id} ${status ?? 'was not run'}`];
  });
}

const [mode] = process.argv.slice(2);
if (mode === '--check' || mode === '--write') {
  const { results } = await runSuite('v1', { list: true });
  const text = render(results);
  if (mode === '--write') writeFileSync(page, text);
  else if (readFileSync(page, 'utf8') !== text) {
    process.stderr.write('docs/interface.md is not what the tests declare: node scripts/interface-table.mjs --write\n');
    process.exitCode = 1;
  }
} else {
  for (const place of Object.keys(PLACES)) {
    const failures = failuresOf(place, (await runSuite(place)).results);
    process.stdout.write(`${place}: ${failures.length === 0 ? 'all hold' : `\n  ${failures.join('\n  ')}`}\n`);
    if (failures.length > 0) process.exitCode = 1;
  }
}
