import type { Memcg } from '../cgroup/cgroup.js';
import { finiteLimits, type LimitName, usageOf } from '../cgroup/v1.js';
import type { Clock } from '../clock.js';
import { fromSystem, isRevoked, isVanished, type SystemError } from '../errors.js';
import type { ControlFiles, PutBack } from '../guard/control-files.js';

/** A limit below what is used is tried again after this time, in milliseconds, if nobody asks before. */
const AGAIN_MS = 1_000;

/** Limits of one memcg, as they were before the first raise. */
interface Raised {
  memcg: Memcg;
  limits: readonly { name: LimitName; bytes: number }[];
  /** By how much each raise that still stands. */
  raises: Set<Raise>;
  due: boolean;
}

/** A limit that was raised; several of one memcg add up. */
export class Raise {
  /** What the limits were without this one, in the order in which they are raised. */
  readonly before: readonly { name: LimitName; bytes: number }[];
  readonly bytes: number;
  readonly #lower: (raise: Raise) => PutBack | 'due';
  readonly #tighten: () => void;
  /** What became of it. */
  state: PutBack | 'due' | 'raised' = 'raised';

  constructor(before: Raise['before'], bytes: number, lower: (raise: Raise) => PutBack | 'due', tighten: () => void) {
    this.before = before;
    this.bytes = bytes;
    this.#lower = lower;
    this.#tighten = tighten;
  }

  /**
   * Puts it back. 'due' if the kernel refuses that (EBUSY), as more is used: then it is put back as soon as that is over.
   * @throws ReprieveError ERR_REPRIEVE_REVOKED, or the system's error
   */
  lower(): PutBack | 'due' {
    this.state = this.#lower(this);
    return this.state;
  }

  /** One that is due: sets the limit as low as the kernel takes it, so that nobody gets what comes back of it. */
  tighten(): void {
    this.#tighten();
  }
}

/** Limits of memcgs that are raised for a while, each written down first. */
export class RaisedLimits {
  readonly #files: ControlFiles;
  readonly #clock: Clock;
  readonly #raised = new Map<number, Raised>();
  #cancel: (() => void) | null = null;

  constructor(files: ControlFiles, clock: Clock) {
    this.#files = files;
    this.#clock = clock;
  }

  /** @throws ReprieveError ERR_REPRIEVE_STATE, ERR_REPRIEVE_REVOKED, ERR_REPRIEVE_PERMISSION; nothing is raised then */
  raise(memcg: Memcg, bytes: number): Raise {
    let raised = this.#raised.get(memcg.inode);
    // Nothing of it stands any more but what was not put back yet: that is still the limit that it goes back to.
    raised ??= { memcg, limits: finiteLimits(memcg), raises: new Set(), due: false };
    const found = raised;
    found.memcg = memcg; // another handle, if the one before was closed
    const extra = sum(found);
    const before = found.limits.map(({ name, bytes: limit }) => ({ name, bytes: limit + extra }));
    const raise = new Raise(
      before,
      bytes,
      (one) => this.#lower(found, one),
      () => this.#tighten(found),
    );
    this.#raised.set(memcg.inode, found);
    found.raises.add(raise);
    try {
      // That of memory and swap first: the one of memory may not be above it (EINVAL).
      for (const { name, bytes: limit } of before) this.#change(found, name, limit + bytes);
    } catch (error) {
      this.#lower(found, raise);
      throw fromSystem(error, `raising the limit of memcg ${memcg.path}`);
    }
    return raise;
  }

  #change({ memcg }: Raised, name: LimitName, bytes: number): void {
    this.#files.change('memory', memcg.path, name, String(bytes));
  }

  #lower(raised: Raised, raise: Raise): PutBack | 'due' {
    raised.raises.delete(raise);
    return this.#apply(raised);
  }

  /** Sets the limits to what they are to be now. */
  #apply(raised: Raised): PutBack | 'due' {
    const { memcg, limits } = raised;
    const extra = sum(raised);
    let became: PutBack | 'due' = 'back';
    for (const { name, bytes } of [...limits].reverse()) {
      try {
        if (!this.#files.stands('memory', memcg.path, name)) became = 'theirs';
        if (extra === 0) became = worse(became, this.#files.putBack('memory', memcg.path, name));
        else if (became !== 'theirs') this.#change(raised, name, bytes + extra);
      } catch (error) {
        // EINVAL: that of memory and swap may not be the lower one, so it waits for the other.
        if (!isNotNow(error)) throw error;
        became = 'due';
      }
    }
    raised.due = became === 'due';
    if (raised.due) this.#again();
    else if (raised.raises.size === 0) this.#raised.delete(memcg.inode);
    return became;
  }

  #tighten(raised: Raised): void {
    const { memcg, limits } = raised;
    for (const { name, bytes } of [...limits].reverse()) {
      for (let attempt = 0; attempt < 5; attempt++) {
        try {
          const least = Math.max(bytes + sum(raised), usageOf(memcg, name));
          if (least < Number(this.#files.written('memory', memcg.path, name) ?? 0)) this.#change(raised, name, least);
          break;
        } catch (error) {
          if (!isNotNow(error)) throw error; // it has grown since it was read, by what the kernel charges
        }
      }
    }
  }

  #again(): void {
    this.#cancel ??= this.#clock.after(AGAIN_MS, () => {
      this.#cancel = null;
      this.settle();
    });
  }

  /** Tries again what is due. */
  settle(): void {
    for (const raised of [...this.#raised.values()]) {
      if (!raised.due) continue;
      try {
        this.#apply(raised);
      } catch (error) {
        if (!isRevoked(error) && !isVanished(error)) throw error; // the guard does it, or there is nothing to be done
      }
    }
  }

  /** Whether a limit of that memcg is still to be put back. */
  isDue(memcg: Memcg): boolean {
    return this.#raised.get(memcg.inode)?.due === true;
  }

  /** What is left is for whoever closes the files. */
  close(): void {
    this.#cancel?.();
    this.#raised.clear();
  }
}

function sum({ raises }: Raised): number {
  let bytes = 0;
  for (const raise of raises) bytes += raise.bytes;
  return bytes;
}

function isNotNow(error: unknown): boolean {
  const { code } = error as SystemError;
  return code === 'EBUSY' || code === 'EINVAL';
}

function worse(before: PutBack | 'due', now: PutBack): PutBack | 'due' {
  return before === 'back' ? now : before;
}
