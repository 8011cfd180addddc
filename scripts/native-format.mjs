#!/usr/bin/env node
// Checks the C++ sources against .clang-format; with --write, formats them.
import { spawnSync } from 'node:child_process';
import { readdirSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = dirname(dirname(fileURLToPath(import.meta.url)));
const files = readdirSync(join(root, 'native'), { recursive: true })
  .filter((name) => /\.(h|cc)$/.test(name))
  .map((name) => join('native', name))
  .sort();
const mode = process.argv.includes('--write') ? ['-i'] : ['--dry-run', '--Werror'];
// One version everywhere: another one formats differently.
const { status, error } = spawnSync('clang-format-14', [...mode, ...files], { cwd: root, stdio: 'inherit' });
if (error) process.stderr.write(`native-format: ${error.message} (Debian: clang-format-14)\n`);
process.exitCode = status ?? 1;
