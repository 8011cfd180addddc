import { ReprieveError, type SystemError } from '../errors.js';
import { type Arena, native } from '../native.js';
import { formatBytes, PAGE } from '../units.js';

/** Bytes rounded up to whole pages, as the kernel charges them. */
export function wholePages(bytes: number): number {
  return Math.ceil(bytes / PAGE) * PAGE;
}

/** Memory of an arena that was taken. */
export interface ArenaRange {
  buffer: Uint8Array;
  giveBack(): void;
}

/** Hands out ranges of whole pages of a buffer, first fit; neighbours that are given back become one again. */
export class ArenaAllocator {
  readonly #buffer: ArrayBuffer;
  /** Free ranges by ascending start. */
  #free: { start: number; end: number }[];

  constructor(buffer: ArrayBuffer) {
    this.#buffer = buffer;
    this.#free = buffer.byteLength > 0 ? [{ start: 0, end: buffer.byteLength }] : [];
  }

  /** Bytes of the largest free piece. */
  get largest(): number {
    return this.#free.reduce((most, { start, end }) => Math.max(most, end - start), 0);
  }

  /** A range of at least `bytes`, or null if no free piece is large enough. */
  take(bytes: number): ArenaRange | null {
    const length = wholePages(bytes);
    const index = this.#free.findIndex(({ start, end }) => end - start >= length);
    const piece = this.#free[index];
    if (piece === undefined) return null;
    const { start } = piece;
    piece.start += length;
    if (piece.start === piece.end) this.#free.splice(index, 1);
    return {
      buffer: new Uint8Array(this.#buffer, start, bytes),
      giveBack: () => this.#giveBack(start, start + length),
    };
  }

  #giveBack(start: number, end: number): void {
    const merged: { start: number; end: number }[] = [];
    for (const piece of [...this.#free, { start, end }].sort((a, b) => a.start - b.start)) {
      const last = merged.at(-1);
      if (last !== undefined && last.end === piece.start) last.end = piece.end;
      else merged.push(piece);
    }
    this.#free = merged;
  }
}

/**
 * Maps, locks and touches an arena, so that it is charged before anyone needs it.
 * @throws ReprieveError ERR_REPRIEVE_RESERVE_UNAVAILABLE when it cannot be locked, or is not resident after that
 */
export function openArena(bytes: number): Arena {
  let arena: Arena;
  try {
    arena = new (native().Arena)(bytes);
  } catch (error) {
    const { message, code } = error as SystemError;
    const advice =
      code === 'ENOMEM' || code === 'EAGAIN' || code === 'EPERM'
        ? '; it needs CAP_IPC_LOCK or a higher RLIMIT_MEMLOCK (ulimit -l), or a smaller `reserve`'
        : '';
    throw new ReprieveError(
      'ERR_REPRIEVE_RESERVE_UNAVAILABLE',
      `The reserve of ${formatBytes(bytes)} could not be locked: ${message}${advice}`,
      error,
    );
  }
  const resident = arena.residentBytes();
  if (resident < bytes) {
    arena.close();
    throw new ReprieveError(
      'ERR_REPRIEVE_RESERVE_UNAVAILABLE',
      `Of the reserve of ${formatBytes(bytes)} only ${formatBytes(resident)} are resident after locking it`,
    );
  }
  return arena;
}
