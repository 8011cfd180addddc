import { runRestore, STATE_DIRECTORY } from '../guard/instance.js';

/**
 * Puts back what handlers left behind that are gone, guard and all. Exit code 0 when everything is as it was, 1 when
 * something could not be put back, or the guard's program could not be run.
 */
export function restore(options: { dryRun?: boolean; directory?: string }): void {
  const directory = options.directory ?? STATE_DIRECTORY;
  const { status, stdout, error } = runRestore([...(options.dryRun ? ['--dry-run'] : []), directory]);
  if (status !== null) process.stdout.write(stdout || `Nothing was left in ${directory}.\n`);
  if (error) process.stderr.write(`reprieve: the guard's program could not be run: ${error.message}\n`);
  process.exitCode = status ?? 1;
}
