#!/usr/bin/env node
// Runs the behaviour tests in one place and prints the results as JSON: node scripts/behaviour.mjs v1-vm [PATTERN OF IDS]
import { PLACES, runSuite } from './behaviour/run.mjs';

const [place, only = ''] = process.argv.slice(2);
if (!(place in PLACES)) {
  process.stderr.write(`Expected the place to be ${Object.keys(PLACES).join(', ')}, got '${place}'\n`);
  process.exit(2);
}
const { code, results } = await runSuite(place, { only });
process.stdout.write(`${JSON.stringify({ place, results }, null, 2)}\n`);
process.exitCode = code;
