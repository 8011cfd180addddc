import { ReprieveError } from '../errors.js';
import { bytesOf, formatBytes, type Size } from '../units.js';
import { type ArenaAllocator, wholePages } from './arena.js';

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
}

/** A counter with a limit below another one, like the kernel's page_counter: a charge counts at every level or at none. */
export class Account implements ReserveCounters {
  #charged = 0;
  #maxCharged = 0;
  #failures = 0;

  constructor(
    readonly bytes: number,
    private readonly parent: Account | null = null,
  ) {}

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
    const own = this.bytes - this.#charged;
    return this.parent === null ? own : Math.min(own, this.parent.available);
  }

  /** Charges here and above; false, and counted as a failure at each level, when any level has no room or nothing backs it. */
  tryCharge(bytes: number, backed = true): boolean {
    if (!backed || bytes > this.available) {
      for (let level: Account | null = this; level !== null; level = level.parent) level.#failures++;
      return false;
    }
    for (let level: Account | null = this; level !== null; level = level.parent) {
      level.#charged += bytes;
      level.#maxCharged = Math.max(level.#maxCharged, level.#charged);
    }
    return true;
  }

  uncharge(bytes: number): void {
    for (let level: Account | null = this; level !== null; level = level.parent) level.#charged -= bytes;
  }
}

/** The reserve of one condition: open as long as the condition is, backed by the handler's arena. */
export class ConditionReserve implements Reserve {
  readonly #account: Account;
  readonly #arena: ArenaAllocator | null;
  readonly #leases = new Set<Lease>();
  #open = true;

  constructor(account: Account, arena: ArenaAllocator | null) {
    this.#account = account;
    this.#arena = arena;
  }

  get bytes(): number {
    return this.#account.bytes;
  }

  get charged(): number {
    return this.#account.charged;
  }

  get available(): number {
    return this.#open ? this.#account.available : 0;
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
    throw new ReprieveError(
      'ERR_REPRIEVE_RESERVE_EXHAUSTED',
      `The reserve of ${formatBytes(this.bytes)} has ${formatBytes(this.available)} left, ${formatBytes(bytesOf(size, '`size`'))} were asked for`,
    );
  }

  tryCharge(size: Size): Lease | null {
    const bytes = bytesOf(size, '`size`');
    if (bytes === 0) throw new ReprieveError('ERR_REPRIEVE_INVALID_ARGUMENT', 'Expected `size` to be above 0');
    if (!this.#open) {
      throw new ReprieveError(
        'ERR_REPRIEVE_RESERVE_CLOSED',
        'The reserve may be charged only while a condition is open, and this one has ended',
      );
    }
    const charged = wholePages(bytes);
    // The range first: there may be room in all, but not in one piece.
    const range = this.#arena?.take(bytes) ?? null;
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
