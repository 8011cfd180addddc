import type { Hierarchy, Memcg, OomListener } from '../cgroup/cgroup.js';
import { isVanished } from '../errors.js';

/**
 * One memcg whose tasks wait for us: the kernel's killer is switched off there and its signals are listened to.
 * What was there before is put back by `restore`.
 */
export class ArmedMemcg {
  readonly memcg: Memcg;
  /** This memcg and those above it, topmost first, the root left out: whose out-of-memory it is, is read there. */
  readonly chain: readonly Memcg[];
  readonly #original: boolean;
  readonly #listener: OomListener;

  /**
   * @param original what `oom_kill_disable` goes back to; by default what it is now
   * @throws ReprieveError ERR_REPRIEVE_PERMISSION, ERR_REPRIEVE_VANISHED; nothing stays armed then
   */
  constructor(
    hierarchy: Hierarchy,
    memcg: Memcg,
    above: readonly Memcg[],
    signal: (atUs: number) => void,
    original?: boolean,
  ) {
    this.memcg = memcg;
    this.chain = [...above, memcg];
    this.#original = original ?? memcg.oomState().killDisabled;
    // Listen first: a task must not wait in a memcg whose signal nobody would see.
    this.#listener = hierarchy.listenOom(memcg, signal);
    try {
      memcg.setKillDisabled(true);
    } catch (error) {
      this.#listener.close();
      throw error;
    }
  }

  /** What `oom_kill_disable` was. */
  get original(): boolean {
    return this.#original;
  }

  /** Signals ourselves: for a drill. */
  trigger(): void {
    this.#listener.trigger();
  }

  /** Switches the kernel's killer off again after a hand-over, once nobody waits. */
  rearm(): void {
    const { killDisabled, underOom } = this.memcg.oomState();
    if (!killDisabled && !underOom) this.memcg.setKillDisabled(true);
  }

  /**
   * Puts the kernel's killer back as it was; that wakes the waiters. Synchronous, so that it also runs when the process
   * exits. A memcg that is gone needs nothing.
   */
  restore(): void {
    this.#listener.close();
    try {
      this.memcg.setKillDisabled(this.#original);
    } catch (error) {
      if (!isVanished(error)) throw error;
    }
  }
}
