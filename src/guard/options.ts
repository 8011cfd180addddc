import { invalidOption } from '../errors.js';

/** Options of the guard. Times are milliseconds. */
export interface GuardOptions {
  /** Time for the guard's own kills before it gives the memcgs back to the kernel; 5,000 by default. */
  within?: number;
  /** How long past its deadline the handler may be silent, or a condition open; 1,000 by default. */
  silence?: number;
  /** Kill a handler that was stopped or hangs, and not only take its epoch away: for a daemon. False by default. */
  killHandler?: boolean;
  /** The guard's program, if it is not the one of this package. */
  path?: string;
}

export const DEFAULT_GUARD = { within: 5_000, silence: 1_000, killHandler: false } as const;

/** Of the guard's times. */
const LEAST_MS = 50;
const MOST_MS = 3_600_000;

/** @returns null for none. @throws ReprieveError ERR_REPRIEVE_INVALID_ARGUMENT naming the option */
export function checkGuardOptions(guard: unknown): GuardOptions | null {
  if (guard === false) return null;
  if (guard === true) return {};
  if (typeof guard !== 'object' || guard === null || Array.isArray(guard)) {
    throw invalidOption('the `guard` option', 'true, false or an object', guard);
  }
  const { within, silence, killHandler, path, ...unknown } = guard as GuardOptions;
  const [surplus] = Object.keys(unknown);
  if (surplus !== undefined) {
    throw invalidOption('the `guard` option', 'made of within, silence, killHandler and path', { [surplus]: '…' });
  }
  for (const [name, value] of Object.entries({ within, silence })) {
    if (value !== undefined && (!Number.isInteger(value) || value < LEAST_MS || value > MOST_MS)) {
      throw invalidOption(`\`guard.${name}\``, `whole milliseconds from ${LEAST_MS} to ${MOST_MS}`, value);
    }
  }
  if (killHandler !== undefined && typeof killHandler !== 'boolean') {
    throw invalidOption('`guard.killHandler`', 'true or false', killHandler);
  }
  if (path !== undefined && typeof path !== 'string') throw invalidOption('`guard.path`', 'a path', path);
  return Object.fromEntries(Object.entries(guard).filter(([, value]) => value !== undefined));
}
