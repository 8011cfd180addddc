#!/usr/bin/env node
// Writes docs/interface.md, the behaviours by environment, when all of them hold everywhere.
//   node scripts/interface-table.mjs              runs them in all places first
//   node scripts/interface-table.mjs RESULTS…     takes what scripts/behaviour.mjs has printed, of all places
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

What the same calls do in each environment. Each line is a test in \`test/behaviour/\`, written once against the public API, and run
in every environment; this table is made from them by \`node scripts/interface-table.mjs\`, which writes it only if all hold.
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

/** Of all places, complete and without a failure; an error that names what is not. */
function mustHold(all) {
  const { results: expected } = all[0];
  for (const place of Object.keys(PLACES)) {
    const run = all.find((candidate) => candidate.place === place);
    if (run === undefined) throw new Error(`there are no results of ${place}`);
    for (const { id } of expected) {
      const found = run.results.find((result) => result.id === id);
      const allowed = found?.differences[PLACES[place].environment]?.verdict === 'impossible' ? 'skipped' : 'passed';
      if (found?.status !== allowed) throw new Error(`${id} in ${place}: ${found?.status ?? 'not run'}`);
    }
  }
}

const words = process.argv.slice(2);
if (words[0] === '--check') {
  const { results } = await runSuite('v1', { list: true });
  if (readFileSync(page, 'utf8') !== render(results)) {
    process.stderr.write('docs/interface.md is not what the tests declare: run scripts/interface-table.mjs\n');
    process.exitCode = 1;
  }
} else {
  const all = words.map((file) => JSON.parse(readFileSync(file, 'utf8')));
  if (words.length === 0) for (const place of Object.keys(PLACES)) all.push({ place, ...(await runSuite(place)) });
  mustHold(all);
  writeFileSync(page, render(all[0].results));
}
