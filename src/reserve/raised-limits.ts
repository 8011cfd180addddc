import type { Memcg } from '../cgroup/cgroup.js';
import { finiteLimits, type LimitName, usageOf } from '../cgroup/v1.js';
import type { Clock } from '../clock.js';
import { fromSystem, isRevoked, isVanished, ReprieveError, type SystemError } from '../errors.js';
import type { ControlFiles, PutBack } from '../guard/control-files.js';

/** A limit below what is used is tried again after this time, in milliseconds, if nobody asks before. */
const AGAIN_MS = 1_000;
/** What is used is charged by the kernel between reading it and making it the limit: so often it is read anew. */
const TRIES = 5;

interface Limit {
  name: LimitName;
  bytes: number;
}

/** One memcg whose limits are raised. */
interface Raised {
  memcg: Memcg;
  /** As they were before the first raise, in the order in which they are raised. */
  limits: readonly Limit[];
  raises: Set<Raise>;
  /** Somebody else has changed one of them since: it is not ours any more. */
  theirs: boolean;
}

/** A limit that was raised; several of one memcg add up. */
export interface Raise {
  /** By how much it is raised still. */
  bytes: number;
  /** It is to be put back, and the kernel refuses that as long as more is used. */
  due: boolean;
  /** The limits without what is due or raised by this one. */
  readonly before: readonly Limit[];
  readonly memcg: Memcg;
  /** Told how many bytes it is raised less. */
  freed: (bytes: number) => void;
  /** Told what became of the limit in the end. */
  settled: (became: PutBack) => void;
  /** How many of its bytes are used by what it is for; the others are promised to that. */
  used: () => number;
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

  /**
   * @param more who is told of what becomes of it, and who tells how much of it is used: by default all
   * @throws ReprieveError ERR_REPRIEVE_STATE, ERR_REPRIEVE_REVOKED, ERR_REPRIEVE_PERMISSION; nothing is raised then
   */
  raise(memcg: Memcg, bytes: number, more: Partial<Pick<Raise, 'freed' | 'settled' | 'used'>> = {}): Raise {
    const raised = this.#raised.get(memcg.inode) ?? {
      memcg,
      limits: finiteLimits(memcg),
      raises: new Set(),
      theirs: false,
    };
    raised.memcg = memcg; // the handle before may have been closed
    const standing = sum(raised.raises, false);
    const before = raised.limits.map(({ name, bytes: limit }) => ({ name, bytes: limit + standing }));
    if (raised.raises.size > 0) this.#mustStand(raised);
    const raise: Raise = { bytes, due: false, before, memcg, freed() {}, settled() {}, used: () => bytes, ...more };
    this.#raised.set(memcg.inode, raised);
    raised.raises.add(raise);
    try {
      // That of memory and swap first: the one of memory may not be above it (EINVAL).
      for (const limit of raised.limits) this.#set(raised, limit, sum(raised.raises));
    } catch (error) {
      raise.freed = raise.settled = () => {}; // whoever asked learns by the error that nothing is raised
      this.lower(raise);
      throw fromSystem(error, `raising the limit of memcg ${memcg.path}`);
    }
    return raise;
  }

  /** A limit that somebody else has set since is not to be lost under another one of ours. */
  #mustStand({ memcg, limits, theirs }: Raised): void {
    if (!theirs && limits.every(({ name }) => this.#files.stands('memory', memcg.path, name))) return;
    throw new ReprieveError(
      'ERR_REPRIEVE_SYSTEM',
      `raising the limit of memcg ${memcg.path}: somebody else has changed it since it was raised`,
    );
  }

  #set({ memcg }: Raised, { name, bytes }: Limit, extra: number): void {
    this.#files.change('memory', memcg.path, name, String(bytes + extra));
  }

  /**
   * Puts it back. 'due' if the kernel refuses that (EBUSY), as more is used: then `settle` does, or a timer.
   * @throws ReprieveError ERR_REPRIEVE_REVOKED, or the system's error
   */
  lower(raise: Raise): PutBack | 'due' {
    const raised = this.#raised.get(raise.memcg.inode);
    if (raised === undefined) return 'back';
    raise.due = true;
    try {
      return this.#lowerAll(raised);
    } catch (error) {
      if (!isRevoked(error) && !isVanished(error)) this.#again();
      throw error;
    }
  }

  /** All of a memcg that are due, or none. */
  #lowerAll(raised: Raised): PutBack | 'due' {
    const { memcg, limits, raises } = raised;
    const extra = sum(raises, false);
    let became: PutBack = 'back';
    try {
      // The kernel would take that, at the cost of a window that is open; without one, it first reclaims what it can.
      if (!raised.theirs && promised(raised) > 0 && aboveBy(raised) > extra) {
        this.#again();
        return 'due';
      }
      for (const limit of limits.toReversed()) {
        const found = this.#files.stands('memory', memcg.path, limit.name) ? 'back' : 'theirs';
        if (extra > 0 && found === 'back') this.#set(raised, limit, extra);
        const now = extra > 0 ? found : this.#files.putBack('memory', memcg.path, limit.name);
        if (now !== 'back') became = now;
        if (now === 'theirs') raised.theirs = true;
      }
    } catch (error) {
      if (!isNotNow(error)) throw error;
      if (!raised.theirs) {
        this.#again();
        return 'due';
      }
      this.#leaveToThem(raised);
      became = 'theirs';
    }
    for (const raise of raises) if (raise.due) this.#shrink(raised, raise, 0, became);
    if (raises.size === 0) this.#raised.delete(memcg.inode);
    return became;
  }

  /** What they set does not go with what was there: the rest is put as near to that as the kernel takes it. */
  #leaveToThem({ memcg, limits }: Raised): void {
    const memory = finiteLimits(memcg).find(({ name }) => name === 'memory.limit_in_bytes')?.bytes ?? 0;
    for (const { name, bytes } of limits) {
      if (this.#files.written('memory', memcg.path, name) === undefined) continue;
      this.#files.change('memory', memcg.path, name, String(Math.max(bytes, memory)));
      this.#files.forget('memory', memcg.path, name);
    }
  }

  #shrink({ raises }: Raised, raise: Raise, bytes: number, became: PutBack = 'back'): void {
    const freed = raise.bytes - bytes;
    raise.bytes = bytes;
    if (freed > 0) raise.freed(freed);
    if (bytes > 0) return;
    raises.delete(raise);
    raise.settled(became);
  }

  /** Sets limits that are due as low as the kernel takes them, so that what comes back of them is nobody's. */
  tighten(memcg: Memcg): void {
    const raised = this.#raised.get(memcg.inode);
    if (raised === undefined || raised.theirs) return;
    const { limits, raises } = raised;
    for (let attempt = 0; attempt < TRIES; attempt++) {
      try {
        const extra = Math.max(sum(raises, false), aboveBy(raised));
        if (extra >= sum(raises)) return;
        for (const limit of limits.toReversed()) {
          if (this.#files.stands('memory', memcg.path, limit.name)) this.#set(raised, limit, extra);
        }
        let surplus = sum(raises) - extra;
        for (const raise of [...raises].filter(({ due }) => due)) {
          const less = Math.min(surplus, raise.bytes);
          surplus -= less;
          this.#shrink(raised, raise, raise.bytes - less);
        }
        return;
      } catch (error) {
        if (!isNotNow(error)) throw error;
      }
    }
  }

  #again(): void {
    this.#cancel ??= this.#clock.after(AGAIN_MS, () => {
      this.#cancel = null;
      this.settle();
    });
  }

  /** Tries again what is due, each by itself. Never throws: what does not work now is tried again. */
  settle(): void {
    for (const raised of [...this.#raised.values()]) {
      if (sum(raised.raises, true) === 0) continue;
      try {
        if (this.#lowerAll(raised) === 'due') this.tighten(raised.memcg);
      } catch (error) {
        if (isRevoked(error)) return; // the guard does it
        if (!isVanished(error)) this.#again();
      }
    }
  }

  /** What is left is for whoever closes the files. */
  close(): void {
    this.#cancel?.();
    this.#raised.clear();
  }
}

/** What those that stand do not use yet. */
function promised({ raises }: Raised): number {
  let bytes = 0;
  for (const raise of raises) if (!raise.due) bytes += raise.bytes - raise.used();
  return bytes;
}

/** How far what is used, and what is promised, is above the limit that was there. */
function aboveBy(raised: Raised): number {
  const { memcg, limits } = raised;
  return Math.max(...limits.map(({ name, bytes }) => usageOf(memcg, name) - bytes)) + promised(raised);
}

/** Of all, or of those that are due, or not. */
function sum(raises: Iterable<Raise>, due?: boolean): number {
  let bytes = 0;
  for (const raise of raises) if (due === undefined || raise.due === due) bytes += raise.bytes;
  return bytes;
}

/** EINVAL: the limit of memory and swap may not be the lower one, so it waits for the other. */
function isNotNow(error: unknown): boolean {
  const { code } = error as SystemError;
  return code === 'EBUSY' || code === 'EINVAL';
}
