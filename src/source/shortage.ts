import { invalidOption } from '../errors.js';
import { bytesOf, type Size } from '../units.js';

/** When the whole machine counts as out of memory. */
export interface Shortage {
  /**
   * MemAvailable (proc_meminfo(5)) below which memory is used up: bytes, or a part of all memory such as '3%'. '2%' by
   * default, at most 512 MiB: lower uses more of the memory, higher keeps the machine from stalling before a victim is dead. Who
   * takes memory fast is met earlier, by as much as is taken until its death.
   */
  available?: Size;
  /** Free swap below which swap is used up too: bytes, or a part of all swap. '5%' by default. */
  swapFree?: Size;
  /**
   * Milliseconds of a second in which all tasks stood still for memory (the `full` line of Documentation/accounting/psi.rst): then
   * memory counts as used up although swap is free, while MemAvailable is below four times `available`. 300 by default, up to
   * 1,000; 0 for never.
   */
  stall?: number;
}

/** The same, in bytes of this machine. */
export interface Marks {
  available: number;
  swapFree: number;
  stallMs: number;
}

const MOST_AVAILABLE = 512 * 2 ** 20;
const PERCENT = /^(\d+(?:\.\d+)?)\s*%$/;

/** @throws ReprieveError ERR_REPRIEVE_INVALID_ARGUMENT naming the option */
export function parseShortage(shortage: unknown, memory: number, swap: number): Marks {
  if (typeof shortage !== 'object' || shortage === null || Array.isArray(shortage)) {
    throw invalidOption('the `shortage` option', 'an object', shortage);
  }
  const { available, swapFree, stall, ...unknown } = shortage as Shortage;
  const [surplus] = Object.keys(unknown);
  if (surplus !== undefined) {
    throw invalidOption('the `shortage` option', 'made of available, swapFree and stall', { [surplus]: '…' });
  }
  const stallMs = stall ?? 300;
  if (typeof stallMs !== 'number' || !(stallMs >= 0 && stallMs <= 1000)) {
    throw invalidOption('`shortage.stall`', 'milliseconds of a second, from 0 to 1000', stall);
  }
  return {
    available:
      available === undefined
        ? Math.min(memory * 0.02, MOST_AVAILABLE)
        : partOf(available, memory, '`shortage.available`'),
    swapFree: partOf(swapFree ?? '5%', swap, '`shortage.swapFree`'),
    stallMs,
  };
}

/** Bytes, or a part of `whole`. */
function partOf(size: Size, whole: number, name: string): number {
  const percent = typeof size === 'string' ? PERCENT.exec(size)?.[1] : undefined;
  if (percent === undefined) return bytesOf(size, name);
  if (Number(percent) <= 100) return (whole * Number(percent)) / 100;
  throw invalidOption(name, 'at most 100%', size);
}
