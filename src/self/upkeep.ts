import type { Clock } from '../clock.js';
import type { Pace } from './hardening.js';

/** A piece of work: short, and no worse for what happens before the next one. It throws nothing. */
export type Piece = () => unknown;

/** The longest pause after a piece, in milliseconds. */
const LONGEST_PAUSE_MS = 50;

/**
 * The handler's work of each second, in pieces with as much time between them as they take: on a machine that is short of
 * memory those who live on need the processor, and what is signalled meanwhile is handled after the piece.
 */
export class Upkeep {
  readonly #clock: Pick<Clock, 'nowUs' | 'after'>;
  readonly #pace: Pace;
  readonly #isUnwelcome: () => boolean;
  #pieces: Piece[] = [];
  #cancel: (() => void) | null = null;

  /** @param isUnwelcome true while the processor is needed for something else: it goes on after that */
  constructor(clock: Pick<Clock, 'nowUs' | 'after'>, pace: Pace, isUnwelcome: () => boolean) {
    this.#clock = clock;
    this.#pace = pace;
    this.#isUnwelcome = isUnwelcome;
  }

  /** Begins at once, unless it is still at what it was given before. */
  begin(pieces: () => Piece[]): void {
    if (this.#cancel !== null) return;
    this.#pieces = pieces();
    this.#goOn();
  }

  #goOn(): void {
    this.#cancel = null;
    if (this.#isUnwelcome()) return this.#goOnAfter(LONGEST_PAUSE_MS);
    const piece = this.#pieces.shift();
    if (piece === undefined) return;
    const tookMs = this.#pace.eased(() => {
      const beganUs = this.#clock.nowUs();
      piece();
      return (this.#clock.nowUs() - beganUs) / 1000;
    });
    this.#goOnAfter(Math.min(LONGEST_PAUSE_MS, tookMs));
  }

  #goOnAfter(ms: number): void {
    this.#cancel = this.#clock.after(ms, () => this.#goOn());
  }

  stop(): void {
    this.#cancel?.();
    this.#cancel = null;
    this.#pieces = [];
  }
}
