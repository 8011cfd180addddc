#!/usr/bin/env node
import { readFileSync } from 'node:fs';
import { Command } from 'commander';
import { ReprieveError } from '../errors.js';
import { runDemo } from './demo.js';
import { runDoctor } from './doctor.js';
import { restore } from './restore.js';

const { version } = JSON.parse(readFileSync(new URL('../../package.json', import.meta.url), 'utf8')) as {
  version: string;
};

const program = new Command('reprieve')
  .description('Userspace out-of-memory handling for Linux: tasks wait, your policy decides, nobody waits for ever.')
  .version(version);

program
  .command('demo')
  .description('run jobs into a memory limit and show how the episode is handled')
  .option('--json', 'print the episode as data (see docs/report.md)')
  .option('--fallback', 'with a policy that never answers: the ladder goes on by itself')
  .option('--simulate', 'in process, without touching a cgroup')
  .action(runDemo);

program
  .command('doctor')
  .description('what this machine offers, what each missing thing costs, and how to get it')
  .option('--json', 'print the rows as data')
  .action(runDoctor);

program
  .command('restore')
  .description('put back what handlers left behind that were killed together with their guards')
  .option('--dry-run', 'only say what would be put back')
  .option('--directory <path>', 'where it is written down, if not in /run/reprieve')
  .action(restore);

try {
  await program.parseAsync();
} catch (error) {
  if (!(error instanceof ReprieveError)) throw error;
  process.stderr.write(`reprieve: ${error.message} (${error.code})\n`);
  process.exitCode = 1;
}
