import type { Hierarchy, Memcg, OomListener } from '../cgroup/cgroup.js';
import { isRevoked, isVanished, ReprieveError } from '../errors.js';
import type { GuardedDeadlines } from '../guard/guard.js';
import type { Entry } from '../guard/ledger.js';

/**
 * One memcg whose tasks wait for us: the kernel's killer is switched off there, and its signals are listened to by us and
 * by the guard. What was there before is written down, and put back by `restore`.
 */
export class ArmedMemcg {
  readonly memcg: Memcg;
  /** This memcg and those above it, topmost first, the root left out: whose out-of-memory it is, is read there. */
  readonly chain: readonly Memcg[];
  /** What `oom_kill_disable` was. */
  readonly original: boolean;
  readonly #hierarchy: Hierarchy;
  readonly #listener: OomListener;
  /** Null where limits are written down by whoever changes them. */
  readonly #entry: Entry | null;

  /**
   * @param original what `oom_kill_disable` goes back to; by default what it was
   * @throws ReprieveError ERR_REPRIEVE_ALREADY_WATCHED if another handler has it, of this process or another;
   * ERR_REPRIEVE_PERMISSION, ERR_REPRIEVE_STATE, ERR_REPRIEVE_VANISHED; nothing stays armed then
   */
  constructor(
    hierarchy: Hierarchy,
    memcg: Memcg,
    above: readonly Memcg[],
    deadlines: GuardedDeadlines,
    signal: (atUs: number) => void,
    original?: boolean,
  ) {
    this.memcg = memcg;
    this.chain = [...above, memcg];
    this.#hierarchy = hierarchy;
    if (!memcg.claim()) {
      throw new ReprieveError('ERR_REPRIEVE_ALREADY_WATCHED', `memcg:${memcg.path} is watched by another handler`);
    }
    const undo = [() => memcg.unclaim()];
    try {
      this.original = original ?? memcg.oomState().killDisabled;
      // Listen first: a task must not wait in a memcg whose signal nobody would see.
      this.#listener = hierarchy.listenOom(memcg, signal);
      undo.push(() => this.#listener.close());
      this.#entry = memcg.parks ? hierarchy.ledger.armed(memcg, this.original) : null;
      undo.push(() => this.#entry?.clear());
      if (memcg.parks) hierarchy.guard.arm(memcg, this.original, deadlines);
      else hierarchy.guard.tend(memcg, deadlines);
      undo.push(() => hierarchy.guard.disarm(memcg));
      memcg.setKillDisabled(true);
    } catch (error) {
      for (const step of undo.reverse()) step();
      throw error;
    }
  }

  /** What its signals cannot tell of here, and why; undefined as a rule. */
  get lacks(): string | undefined {
    return this.#listener.lacks;
  }

  /** Signals ourselves: for a drill. */
  trigger(): void {
    this.#listener.trigger();
  }

  /** Takes charge again after a hand-over, once nobody waits, or after whoever owns the memcg has changed it. */
  rearm(): void {
    if (!this.memcg.isArmed() && !this.memcg.oomState().underOom) this.memcg.setKillDisabled(true);
  }

  /**
   * Puts the kernel's killer back as it was; that wakes the waiters. Synchronous, so that it also runs when the process
   * exits. A memcg that is gone needs nothing, nor one that the guard has taken over. May be called again, for what a
   * late hand-over has changed.
   */
  restore(): void {
    this.#listener.close();
    try {
      this.memcg.setKillDisabled(this.original);
    } catch (error) {
      // The claim stays as well, until the guard has gone: nobody is to arm what it is still putting back.
      if (isRevoked(error)) return;
      if (!isVanished(error)) throw error;
    }
    this.#entry?.clear();
    this.#hierarchy.guard.disarm(this.memcg);
    this.memcg.unclaim();
  }
}
