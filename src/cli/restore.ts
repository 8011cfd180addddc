import { existsSync } from 'node:fs';
import { endStoppedGuards, runRestore, STATE_DIRECTORY } from '../guard/instance.js';

/**
 * Puts back what handlers left behind that are gone, guard and all. Exit code 0 when everything is as it was, 1 when
 * something could not be put back, the guard's program could not be run, or the directory that was named is not there.
 */
export async function restore(options: { dryRun?: boolean; directory?: string }): Promise<void> {
  const directory = options.directory ?? STATE_DIRECTORY;
  if (options.directory !== undefined && !existsSync(directory)) {
    process.stderr.write(`reprieve: there is no directory ${directory}\n`);
    process.exitCode = 1;
    return;
  }
  if (!options.dryRun) for (const line of endStoppedGuards(directory)) process.stdout.write(`${line}\n`);
  const { status, stdout, failure, signal } = await runRestore([...(options.dryRun ? ['--dry-run'] : []), directory]);
  if (status !== null) process.stdout.write(stdout || `Nothing was left in ${directory}.\n`);
  else process.stderr.write(`reprieve: the guard's program could not be run: ${failure ?? `ended by ${signal}`}\n`);
  process.exitCode = status ?? 1;
}
