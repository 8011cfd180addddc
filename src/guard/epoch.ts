import { ReprieveError } from '../errors.js';
import { native, type SharedWords } from '../native.js';

/** Words of the page that handler and guard share (native/core/shared_words.h). */
const EPOCH = 0;
const BEATS = 1;

/** Whether the handler may still act, and the sign that it lives. */
export interface Epoch {
  /** @throws ReprieveError ERR_REPRIEVE_REVOKED once the guard has taken over */
  permit(): void;
  readonly revoked: boolean;
  /** The event loop turns. */
  beat(): void;
}

/** Without a guard nobody revokes anything. */
export const NO_EPOCH: Epoch = { permit() {}, revoked: false, beat() {} };

/** The epoch in memory that the guard has mapped too. */
export class SharedEpoch implements Epoch {
  readonly words: SharedWords = new (native().SharedWords)();
  readonly #view = new Uint32Array(this.words.buffer);
  /** Called once, out of the stack of whoever found out. */
  onRevoked: () => void = () => {};
  #told = false;

  get revoked(): boolean {
    return Atomics.load(this.#view, EPOCH) === 0;
  }

  permit(): void {
    if (!this.revoked) return;
    this.tell();
    throw new ReprieveError(
      'ERR_REPRIEVE_REVOKED',
      'The guard has taken over from this handler, which was silent for too long: it must not act any more',
    );
  }

  tell(): void {
    if (this.#told) return;
    this.#told = true;
    setImmediate(() => this.onRevoked());
  }

  /** No other guard will be given it. */
  close(): void {
    this.words.close();
  }

  beat(): void {
    Atomics.add(this.#view, BEATS, 1);
  }
}
