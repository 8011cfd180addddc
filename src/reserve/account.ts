import { invalidOption, ReprieveError } from '../errors.js';
import { bytesOf, formatBytes, type Size } from '../units.js';
import { type ArenaAllocator, wholePages } from './arena.js';
import type { OverchargeWindow } from './overcharge.js';

/** Longer than this nobody holds still for. */
const LONGEST_STOP_MS = 60_000;

/** Counters of an account, in bytes; `failures` counts refused charges. */
export interface ReserveCounters {
  bytes: number;
  charged: number;
  available: number;
  maxCharged: number;
  failures: number;
}

/** Memory of the reserve, lent: give it back by `release()`, by `using`, or it ends with the condition. */
export interface Lease extends Disposable {
  readonly bytes: number;
  /** Locked and resident memory of the arena. Of zero length after the lease has ended. */
  readonly buffer: Uint8Array;
  release(): void;
}

/** The reserve as a condition's handler sees it. */
export interface Reserve extends Readonly<ReserveCounters> {
  /**
   * Charges `size` and lends that much memory.
   * @throws ReprieveError ERR_REPRIEVE_RESERVE_CLOSED when no condition is open, ERR_REPRIEVE_RESERVE_EXHAUSTED when
   * there is no room, ERR_REPRIEVE_INVALID_ARGUMENT when `size` is no size above 0
   */
  charge(size: Size): Lease;
  /** The same, with null when there is no room. */
  tryCharge(size: Size): Lease | null;
  /**
   * Charges `size` and lends it above the limit of the full memcg, for programs that must be charged there: its jobs are
   * frozen meanwhile. It is closed by `close()`, by `await using`, before the ladder goes on, or when a victim is dead.
   * Rejects with a ReprieveError: as `charge`, and ERR_REPRIEVE_WINDOW_REFUSED with the reason when the jobs did not all
   * stop in time, a memcg above has no room, or there is no freezer here.
   */
  overcharge(size: Size, options?: OverchargeOptions): Promise<OverchargeWindow>;
}

/** Options of `reserve.overcharge()`. */
export interface OverchargeOptions {
  /** How long the jobs may take to stop, in milliseconds; 100 by default. */
  stopWithin?: number;
}

/** Opens a window for a condition; `freed` is called with every part of `bytes` that is free again, also if it fails. */
export type OpenWindow = (
  bytes: number,
  stopWithin: number,
  freed: (bytes: number) => void,
) => Promise<OverchargeWindow>;

/** A counter with a limit below another one, like the kernel's page_counter: a charge counts at every level or at none. */
export class Account implements ReserveCounters {
  readonly bytes: number;
  #parent: Account | null;
  #charged = 0;
  #maxCharged = 0;
  #failures = 0;

  constructor(bytes: number, parent: Account | null = null) {
    this.bytes = bytes;
    this.#parent = parent;
  }

  get parent(): Account | null {
    return this.#parent;
  }

  /** Puts it below another one, with all that is charged: that may be more there than could have been charged anew. */
  moveBelow(parent: Account): void {
    if (parent === this.#parent) return;
    this.#parent?.uncharge(this.#charged);
    this.#parent = parent;
    parent.#count(this.#charged);
  }

  get charged(): number {
    return this.#charged;
  }

  get maxCharged(): number {
    return this.#maxCharged;
  }

  get failures(): number {
    return this.#failures;
  }

  /** What could be charged here, which the levels above may make less. */
  get available(): number {
    const own = Math.max(0, this.bytes - this.#charged);
    return this.#parent === null ? own : Math.min(own, this.#parent.available);
  }

  counters(): ReserveCounters {
    const { bytes, charged, available, maxCharged, failures } = this;
    return { bytes, charged, available, maxCharged, failures };
  }

  /** Charges here and above; false, and counted as a failure at each level, when any level has no room or nothing backs it. */
  tryCharge(bytes: number, backed = true): boolean {
    if (!backed || bytes > this.available) {
      for (let level: Account | null = this; level !== null; level = level.#parent) level.#failures++;
      return false;
    }
    this.#count(bytes);
    return true;
  }

  #count(bytes: number): void {
    for (let level: Account | null = this; level !== null; level = level.#parent) {
      level.#charged += bytes;
      level.#maxCharged = Math.max(level.#maxCharged, level.#charged);
    }
  }

  uncharge(bytes: number): void {
    for (let level: Account | null = this; level !== null; level = level.#parent) level.#charged -= bytes;
  }
}

/**
 * The reserve of one condition: open as long as the condition is. Leases are backed by the handler's arena, windows by a
 * raised limit; both count as one.
 */
export class ConditionReserve implements Reserve {
  readonly #account: Account;
  readonly #arena: ArenaAllocator;
  readonly #leases = new Set<Lease>();
  #openWindow: OpenWindow | null = null;
  #open = true;

  constructor(account: Account, arena: ArenaAllocator) {
    this.#account = account;
    this.#arena = arena;
  }

  /** Says how windows are opened. */
  set openWindow(open: OpenWindow) {
    this.#openWindow = open;
  }

  get bytes(): number {
    return this.#account.bytes;
  }

  get charged(): number {
    return this.#account.charged;
  }

  /** What one charge may ask for now: the arena may have room in all, but not in one piece. */
  get available(): number {
    return this.#open ? Math.min(this.#account.available, this.#arena.largest) : 0;
  }

  get maxCharged(): number {
    return this.#account.maxCharged;
  }

  get failures(): number {
    return this.#account.failures;
  }

  counters(): ReserveCounters {
    const { bytes, charged, available, maxCharged, failures } = this;
    return { bytes, charged, available, maxCharged, failures };
  }

  charge(size: Size): Lease {
    const lease = this.tryCharge(size);
    if (lease !== null) return lease;
    throw this.#exhausted(bytesOf(size, '`size`'), this.available);
  }

  #exhausted(bytes: number, available: number): ReprieveError {
    return new ReprieveError(
      'ERR_REPRIEVE_RESERVE_EXHAUSTED',
      `The reserve of ${formatBytes(this.bytes)} has ${formatBytes(available)} left, ${formatBytes(bytes)} were asked for`,
    );
  }

  /** Bytes of a size that may be charged now, if there is room. */
  #check(size: Size): number {
    const bytes = bytesOf(size, '`size`');
    if (bytes === 0) throw new ReprieveError('ERR_REPRIEVE_INVALID_ARGUMENT', 'Expected `size` to be above 0');
    if (this.#open) return bytes;
    throw new ReprieveError(
      'ERR_REPRIEVE_RESERVE_CLOSED',
      'The reserve may be charged only while a condition is open, and this one has ended',
    );
  }

  async overcharge(size: Size, options: OverchargeOptions = {}): Promise<OverchargeWindow> {
    const { stopWithin = 100 } = options;
    if (typeof stopWithin !== 'number' || !(stopWithin > 0 && stopWithin <= LONGEST_STOP_MS)) {
      throw invalidOption(
        'the `stopWithin` option',
        `a time in milliseconds above 0 and up to ${LONGEST_STOP_MS}`,
        stopWithin,
      );
    }
    const bytes = wholePages(this.#check(size));
    if (this.#openWindow === null) throw new Error('a reserve of no condition');
    if (!this.#account.tryCharge(bytes)) throw this.#exhausted(bytes, this.#account.available);
    return this.#openWindow(bytes, stopWithin, (freed) => this.#account.uncharge(freed));
  }

  tryCharge(size: Size): Lease | null {
    const bytes = this.#check(size);
    const charged = wholePages(bytes);
    // The range first: there may be room in all, but not in one piece.
    const range = this.#arena.take(bytes);
    if (!this.#account.tryCharge(charged, range !== null) || range === null) {
      range?.giveBack();
      return null;
    }
    let { buffer } = range;
    const release = () => {
      if (!this.#leases.delete(lease)) return;
      buffer = new Uint8Array(0);
      range.giveBack();
      this.#account.uncharge(charged);
    };
    const lease: Lease = {
      bytes,
      get buffer() {
        return buffer;
      },
      release,
      [Symbol.dispose]: release,
    };
    this.#leases.add(lease);
    return lease;
  }

  /** The condition has ended: every lease is returned, nothing can be charged any more. */
  close(): void {
    this.#open = false;
    for (const lease of [...this.#leases]) lease.release();
  }
}
