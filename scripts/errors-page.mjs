#!/usr/bin/env node
// Writes docs/errors.md from the one table of error codes; --check says whether it is up to date.
import { readFileSync, writeFileSync } from 'node:fs';
import { ERROR_CODES } from '../dist/errors.js';

const page = new URL('../docs/errors.md', import.meta.url);
const rows = Object.entries(ERROR_CODES).map(([code, meaning]) => `| \`${code}\` | ${meaning} |`);
const text = `# Errors

Every error of the API is a \`ReprieveError\` with one of these \`code\`s; where a system call failed it carries \`errno\`
(positive), \`syscall\` and \`path\`, and the original error as \`cause\`.

| code | meaning |
|---|---|
${rows.join('\n')}
`;
if (!process.argv.includes('--check')) writeFileSync(page, text);
else if (readFileSync(page, 'utf8') !== text) {
  process.stderr.write('docs/errors.md is not up to date: node scripts/errors-page.mjs\n');
  process.exitCode = 1;
}
