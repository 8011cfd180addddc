import type { Hierarchy, Memcg, OomListener } from '../cgroup/cgroup.js';
import { isVanished, ReprieveError } from '../errors.js';

/**
 * What `oom_kill_disable` was before it was armed, '0' or '1', on the memcg itself: a handler that was killed leaves it
 * there, and the next one puts that back and not what it finds.
 */
const ORIGINAL = 'trusted.reprieve.armed';

/**
 * One memcg whose tasks wait for us: the kernel's killer is switched off there and its signals are listened to.
 * What was there before is put back by `restore`.
 */
export class ArmedMemcg {
  readonly memcg: Memcg;
  /** This memcg and those above it, topmost first, the root left out: whose out-of-memory it is, is read there. */
  readonly chain: readonly Memcg[];
  /** What `oom_kill_disable` was. */
  readonly original: boolean;
  /** True if a handler that was killed had it armed. */
  readonly recovered: boolean;
  readonly #listener: OomListener;

  /**
   * @param original what `oom_kill_disable` goes back to; by default what it was
   * @throws ReprieveError ERR_REPRIEVE_ALREADY_WATCHED if another handler has it, of this process or another;
   * ERR_REPRIEVE_PERMISSION, ERR_REPRIEVE_VANISHED; nothing stays armed then
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
    if (!memcg.claim()) {
      throw new ReprieveError('ERR_REPRIEVE_ALREADY_WATCHED', `memcg:${memcg.path} is watched by another handler`);
    }
    try {
      const left = memcg.attribute(ORIGINAL);
      this.recovered = left !== null;
      this.original = left !== null ? left === '1' : (original ?? memcg.oomState().killDisabled);
      // Listen first: a task must not wait in a memcg whose signal nobody would see.
      this.#listener = hierarchy.listenOom(memcg, signal);
    } catch (error) {
      memcg.unclaim();
      throw error;
    }
    try {
      this.#remember(this.original ? '1' : '0');
      memcg.setKillDisabled(true);
    } catch (error) {
      this.#listener.close();
      this.#remember('');
      memcg.unclaim();
      throw error;
    }
  }

  /** Only a help for the next one: without CAP_SYS_ADMIN there is none. */
  #remember(value: string): void {
    try {
      this.memcg.setAttribute(ORIGINAL, value);
    } catch {
      // nothing depends on it
    }
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
   * exits. A memcg that is gone needs nothing. May be called again, for what a late hand-over has changed.
   */
  restore(): void {
    this.#listener.close();
    try {
      this.memcg.setKillDisabled(this.original);
      this.#remember('');
    } catch (error) {
      if (!isVanished(error)) throw error;
    } finally {
      this.memcg.unclaim();
    }
  }
}
