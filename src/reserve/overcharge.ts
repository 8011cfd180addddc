/**
 * The overcharge window: for what must be charged to the full memcg itself, such as a shell, a profiler, a child process.
 * Its jobs are frozen one by one, and its limit is raised by the reserve when every thread of theirs is seen standing:
 * those that wait for memory are woken by that, and reach the freezer before they try again. What is above the old limit
 * is then nobody's but the window's. To close: what runs in it dies, the limit goes back, the jobs are thawed.
 *
 * Tried on Linux 6.18 (test/host/overcharge.test.ts); docs/reserve.md tells how it can fail.
 */
import { type ChildProcess, type SpawnOptions, spawn } from 'node:child_process';
import { type Freezing, FrozenJobs } from '../action/freeze.js';
import {
  closeAll,
  fullSlack,
  type Hierarchy,
  isAtOrBelow,
  type Memcg,
  openDescendants,
  WINDOW_PREFIX,
} from '../cgroup/cgroup.js';
import type { Freezer } from '../cgroup/freezer.js';
import { directoryOf } from '../cgroup/real.js';
import { finiteLimits, peakOf, removeBelow, usageOf } from '../cgroup/v1.js';
import { isRevoked, isVanished, ReprieveError, type SystemError } from '../errors.js';
import type { PutBack } from '../guard/control-files.js';
import type { Entry, FileLedger } from '../guard/ledger.js';
import { type LiveJob, pidsIn } from '../snapshot/jobs.js';
import { formatBytes } from '../units.js';
import type { Raise, RaisedLimits } from './raised-limits.js';

/** Longest pause between two looks at who has not stopped yet, in milliseconds. */
const LONGEST_PAUSE_MS = 8;
/** How long what ran in a window may take to die before the rest is put back all the same, in milliseconds. */
const LONGEST_DEATH_MS = 1_000;
/** The kernel gives back some of what a dead process held only a moment later. In milliseconds. */
const DRAIN_MS = 20;
/** Looks for who joined from outside, or waits in vain, are this far apart, in milliseconds, */
const LOOK_MS = 10;
/** and so many times as long as one takes. */
const LOOK_SHARE = 20;
/** Written down for a cgroup that is about to be made. */
const NOT_YET = 0;

/** What windows need of this machine. */
export interface OverchargeGround {
  hierarchy: Hierarchy;
  /** Mount point of the memory hierarchy. */
  point: string;
  limits: RaisedLimits;
  freezer: Freezer;
  ledger: FileLedger;
  /** Processes that may never be frozen: the handler, the guard. */
  spared: () => ReadonlySet<number>;
  /** Those that are open, or being opened or closed. */
  windows: Set<OverchargeWindow>;
  counters: WindowCounters;
}

/** Overcharge windows of a handler so far. */
export interface WindowCounters {
  opened: number;
  refused: number;
  /** Closed as they were used up. */
  exhausted: number;
}

/** What a window is opened with. */
export interface OverchargeSetup {
  /** The memcg that is full, and those above it without the root. */
  owner: Memcg;
  above: readonly Memcg[];
  /** Every job in it, as they are now. */
  jobs: () => LiveJob[];
  /** How far the limit is raised, in whole pages. */
  bytes: number;
  /** Milliseconds that the jobs have to stop in. */
  stopWithin: number;
  /** Aborted when the condition has ended, or nobody wants the window any more. */
  signal: AbortSignal;
  /** Kept up to date as the window goes on. */
  record: WindowRecord;
  sinceUs: () => number;
  /** Told of every part of `bytes` that is not charged any more, also if no window is opened. */
  freed: (bytes: number) => void;
  closed: () => void;
}

/** A window as the report tells of it. Times are microseconds from the event. */
export interface WindowRecord {
  askedUs: number;
  /** How far the limit was to be raised. */
  bytes: number;
  /** Why it was not opened; null if it was. */
  refused: string | null;
  openedUs: number | null;
  closedUs: number | null;
  /** How each job was frozen: by its own freezer cgroup, by one that was made for it, or by somebody before. */
  frozen: { job: string; how: Freezing }[];
  /** The most that was charged in it, in bytes. */
  maxCharged: number;
  /** It was used up: what ran in it was killed. */
  exhausted: boolean;
  /** What became of the raised limits; 'due' while more is in use than they allow. */
  limit: PutBack | 'due' | null;
  /** What could not be undone at once and stays written down; null as a rule. */
  failed: string | null;
}

export function newWindowRecord(bytes: number, askedUs: number): WindowRecord {
  return {
    askedUs,
    bytes,
    refused: null,
    openedUs: null,
    closedUs: null,
    frozen: [],
    maxCharged: 0,
    exhausted: false,
    limit: null,
    failed: null,
  };
}

const HOW_FROZEN: Record<Freezing, string> = {
  own: 'by its own freezer cgroup',
  made: 'by one that was made for it',
  before: 'by somebody before',
};

/** For the report. */
export function sayOpened({ bytes, frozen }: WindowRecord): string {
  const jobs = frozen.map(({ job, how }) => `${job} ${HOW_FROZEN[how]}`).join(', ');
  return `opens an overcharge window of ${formatBytes(bytes)}; frozen: ${jobs || 'nobody'}`;
}

const WHAT_BECAME: Record<PutBack | 'due', string> = {
  back: 'is as it was',
  theirs: 'was changed by somebody else meanwhile, and is left so',
  gone: 'is gone with the memcg',
  due: 'is put back as soon as less is in use',
};

/** For the report. */
export function sayLimit({ limit }: WindowRecord): string {
  return limit === null ? '' : `the limit ${WHAT_BECAME[limit]}`;
}

/** For the report. */
export function sayClosed(record: WindowRecord): string {
  const { maxCharged, exhausted, limit, failed } = record;
  const used = exhausted
    ? 'it was used up, and what ran in it was killed'
    : `at most ${formatBytes(maxCharged)} were charged in it`;
  const became = limit === null ? '' : `; ${sayLimit(record)}`;
  return `the overcharge window is closed: ${used}${became}${failed === null ? '' : `; failed: ${failed}`}`;
}

let nextWindow = 1;

/** An open overcharge window. */
export class OverchargeWindow implements AsyncDisposable {
  readonly #ground: OverchargeGround;
  readonly #setup: OverchargeSetup;
  readonly #frozen: FrozenJobs;
  readonly #name = `${WINDOW_PREFIX}${process.pid}-${nextWindow++}`;
  readonly #ending = new AbortController();
  readonly #spawned = new Set<ChildProcess>();
  #raised: Raise | null = null;
  #memcg: Memcg | null = null;
  #entry: Entry | null = null;
  #stopLooking: () => void = () => {};
  #closing: Promise<void> | null = null;

  private constructor(ground: OverchargeGround, setup: OverchargeSetup) {
    this.#ground = ground;
    this.#setup = setup;
    this.#frozen = new FrozenJobs(ground.freezer, setup.jobs, ground.spared());
  }

  /**
   * Opens a window, or changes nothing.
   * @throws ReprieveError ERR_REPRIEVE_WINDOW_REFUSED with the reason, ERR_REPRIEVE_RESERVE_CLOSED when the condition ended
   * meanwhile, ERR_REPRIEVE_STATE, ERR_REPRIEVE_REVOKED
   */
  static async open(ground: OverchargeGround, setup: OverchargeSetup): Promise<OverchargeWindow> {
    const { owner, record, sinceUs } = setup;
    let window: OverchargeWindow | undefined;
    try {
      window = new OverchargeWindow(ground, setup);
      ground.windows.add(window);
      window.#mustHaveRoom();
      await window.#freeze();
      window.#raise();
      record.openedUs = sinceUs();
      ground.counters.opened++;
      window.#look();
      return window;
    } catch (error) {
      record.refused = (error as Error).message;
      await window?.close();
      if (error instanceof ReprieveError && error.code !== 'ERR_REPRIEVE_SYSTEM') throw error;
      ground.counters.refused++;
      throw new ReprieveError(
        'ERR_REPRIEVE_WINDOW_REFUSED',
        `No overcharge window was opened in ${owner.path}: ${record.refused}`,
        error,
      );
    }
  }

  #mustHaveRoom(): void {
    const { owner, above, bytes } = this.#setup;
    if (finiteLimits(owner).length === 0) throw new Error('it has no limit that could be raised');
    const others = [...this.#ground.windows].filter((window) => window !== this);
    for (const { path } of others) {
      // What one has frozen the other would thaw.
      if (isAtOrBelow(owner.path, path) || isAtOrBelow(path, owner.path)) throw new Error(`there is one in ${path}`);
    }
    for (const memcg of above) {
      const promised = others.filter(({ path }) => isAtOrBelow(path, memcg.path));
      const room =
        memcg.limit() - memcg.usage() - promised.reduce((sum, { bytes, charged }) => sum + bytes - charged, 0);
      if (room >= bytes) continue;
      throw new Error(
        `${memcg.path} above it has room for ${formatBytes(Math.max(0, room))} only, ${formatBytes(bytes)} were asked for`,
      );
    }
  }

  /** Of the memcg that is full. */
  get path(): string {
    return this.#setup.owner.path;
  }

  /** Until every thread stands, however they fork. */
  async #freeze(): Promise<void> {
    const { stopWithin, signal, record } = this.#setup;
    const { clock } = this.#ground.hierarchy;
    let end: number | undefined;
    for (let pause = 1; ; pause = Math.min(2 * pause, LONGEST_PAUSE_MS)) {
      const found = this.#frozen.freeze();
      // Moving them takes what the kernel needs for it, which says nothing of the threads.
      end ??= clock.nowUs() + stopWithin * 1000;
      record.frozen = this.#frozen.how;
      // Nothing may come between this look and the raising.
      const running = found === 0 ? this.#frozen.running() : [];
      if (found === 0 && running.length === 0) return;
      if (clock.nowUs() > end) {
        const who = running.map(
          ({ job, tid, name, where }) => `thread ${tid} (${name}) of ${job} ${where ? `is in ${where}` : 'runs'}`,
        );
        throw new Error(
          `${who.length > 0 ? who.join(', ') : 'new processes kept coming'} after ${stopWithin} ms; it would take what is not its own`,
        );
      }
      // What forks is not given the time to.
      await this.#pause(found > 0 ? 0 : pause);
      if (this.open && !signal.aborted) continue;
      throw new ReprieveError(
        'ERR_REPRIEVE_RESERVE_CLOSED',
        'The condition ended, or the ladder went on, while the window was opened',
      );
    }
  }

  #pause(ms: number): Promise<void> {
    return new Promise((resolve) => {
      this.#ground.hierarchy.clock.after(ms, resolve);
    });
  }

  #raise(): void {
    const { owner, bytes, freed, record } = this.#setup;
    const { limits, ledger } = this.#ground;
    const settled = (became: PutBack) => {
      record.limit = became;
    };
    this.#raised = limits.raise(owner, bytes, { freed, settled, used: () => this.charged });
    const path = `${owner.path}/${this.#name}`;
    // Its inode is known only once it is there.
    this.#entry = ledger.window({ path, inode: NOT_YET });
    try {
      directoryOf(owner).makeDirectory(this.#name);
    } catch (error) {
      if ((error as SystemError).code !== 'ENOMEM') throw error;
      throw new Error(`${formatBytes(bytes)} are too few for the memcg that it runs in`, { cause: error });
    }
    this.#memcg = owner.child(this.#name);
    const entry = ledger.window(this.#memcg);
    this.#entry.clear();
    this.#entry = entry;
  }

  /** Bytes that the limit is raised by. */
  get bytes(): number {
    return this.#setup.bytes;
  }

  /** Bytes that are charged in it now. */
  get charged(): number {
    return this.#memcg?.usage() ?? 0; // while it closes as well: what is dying is not the jobs'
  }

  /** What can still be charged in it, as far as the memcg's limit goes. */
  get available(): number {
    if (!this.open) return 0;
    const { owner } = this.#setup;
    return Math.max(0, Math.min(this.bytes - this.charged, owner.limit() - owner.usage()));
  }

  get open(): boolean {
    return this.#closing === null;
  }

  /**
   * Aborted when the window closes: with ERR_REPRIEVE_RESERVE_EXHAUSTED as its reason if that is because something in it
   * wanted more than there was, and was killed.
   */
  get signal(): AbortSignal {
    return this.#ending.signal;
  }

  /** The directory of the memcg that the window's processes are in; write a process id to its `cgroup.procs` to add one. */
  get directory(): string {
    return `${this.#ground.point}${this.#setup.owner.path}/${this.#name}`;
  }

  /**
   * Starts a program that is charged to the window (child_process.spawn(), through /bin/sh, which joins before it
   * executes the program). It is killed when the window closes.
   * @throws ReprieveError ERR_REPRIEVE_RESERVE_CLOSED, ERR_REPRIEVE_INVALID_ARGUMENT for `uid`, `gid` and `shell`
   */
  spawn(file: string, args: readonly string[] = [], options: SpawnOptions = {}): ChildProcess {
    if (options.uid !== undefined || options.gid !== undefined) {
      throw new ReprieveError(
        'ERR_REPRIEVE_INVALID_ARGUMENT',
        'Expected no `uid` or `gid`: only root may join the window; change to them in the program (setpriv(1))',
      );
    }
    if (options.shell) {
      throw new ReprieveError(
        'ERR_REPRIEVE_INVALID_ARGUMENT',
        "Expected no `shell` option: a shell starts the program; name one for a command line (spawn('sh', ['-c', …]))",
      );
    }
    if (!this.open) throw new ReprieveError('ERR_REPRIEVE_RESERVE_CLOSED', 'The overcharge window was closed');
    const words = ['-c', 'echo 0 >"$0/cgroup.procs" && exec "$@"', this.directory, file, ...args];
    const child = spawn('/bin/sh', words, options);
    this.#spawned.add(child);
    child.once('exit', () => this.#spawned.delete(child));
    return child;
  }

  /** Kills what `spawn` started: it may not have joined yet, and would do so when the others are dead. */
  killSpawned(): void {
    for (const child of this.#spawned) child.kill('SIGKILL');
  }

  /** The limit that the jobs have. */
  get limitBefore(): number {
    return this.#raised?.before.find(({ name }) => name === 'memory.limit_in_bytes')?.bytes ?? Number.POSITIVE_INFINITY;
  }

  /** What the memcg itself tells is no evidence while its jobs are frozen: whether they use all that they may. */
  get isFull(): boolean {
    const { owner } = this.#setup;
    const limits = this.#raised?.before ?? [];
    return limits.some(({ name, bytes }) => usageOf(owner, name) - this.charged + fullSlack(bytes) >= bytes);
  }

  /** Lets a victim go: frozen it would not die. */
  thaw(job: LiveJob): void {
    this.#frozen.thaw(job);
  }

  /** Now and then: a look reads a line for each process of the jobs, so many of them are looked at more seldom. */
  #look(pauseMs = LOOK_MS): void {
    const { clock } = this.#ground.hierarchy;
    this.#stopLooking = clock.after(pauseMs, () => {
      const beganUs = clock.nowUs();
      try {
        this.#keepStill();
        this.check();
      } catch (error) {
        if (isRevoked(error)) return; // the guard closes it
        void this.close(
          new ReprieveError(
            'ERR_REPRIEVE_RESERVE_CLOSED',
            `The overcharge window was closed, as its jobs could not be kept still: ${(error as Error).message}`,
            error,
          ),
        );
      }
      if (this.open) this.#look(Math.max(LOOK_MS, ((clock.nowUs() - beganUs) / 1000) * LOOK_SHARE));
    });
  }

  /** Who joined a job from outside is stopped; one that somebody has thawed is not ours to stop again. */
  #keepStill(): void {
    this.#frozen.freeze();
    const thawed = this.#frozen.thawedByOthers();
    if (thawed !== null) throw new Error(`somebody has thawed ${thawed}`);
  }

  /** Looks whether something in it waits for more than there is. */
  check(): void {
    if (!this.open || this.#memcg === null) return;
    const { hierarchy } = this.#ground;
    const { record, bytes } = this.#setup;
    const all = [this.#memcg, ...openDescendants(this.#memcg)];
    const waits = all.some((memcg) => hierarchy.listWaiters(memcg, 1).length > 0);
    closeAll(all.slice(1));
    if (!waits) return;
    record.exhausted = true;
    this.#ground.counters.exhausted++;
    void this.close(
      new ReprieveError(
        'ERR_REPRIEVE_RESERVE_EXHAUSTED',
        `The overcharge window of ${formatBytes(bytes)} was used up; what ran in it was killed`,
      ),
    );
  }

  /** Kills what runs in it, puts the limit back, thaws the jobs. Resolves when that is done; never rejects. */
  close(reason?: ReprieveError): Promise<void> {
    this.#closing ??= this.#close(reason);
    return this.#closing;
  }

  async #close(reason?: ReprieveError): Promise<void> {
    const { record, sinceUs, closed } = this.#setup;
    this.#stopLooking();
    this.#ending.abort(reason);
    // One step that fails must not keep the others from being gone.
    const steps = [
      () => this.#empty(),
      () => this.#lower(),
      () => this.#removed(),
      () => this.#release(),
      () => this.#remove(),
    ];
    for (const step of steps) {
      try {
        await step();
      } catch (error) {
        if (isRevoked(error)) break; // the guard does it
        if (!isVanished(error)) record.failed = (error as Error).message;
      }
    }
    this.#memcg?.close();
    this.#memcg = null;
    record.closedUs = sinceUs();
    this.#ground.windows.delete(this);
    closed();
  }

  async #empty(): Promise<void> {
    const memcg = this.#memcg;
    this.killSpawned();
    if (memcg === null) return;
    const { clock } = this.#ground.hierarchy;
    const end = clock.nowUs() + LONGEST_DEATH_MS * 1000;
    while (this.#kill(memcg) > 0 && clock.nowUs() < end) await this.#pause(1);
    this.#setup.record.maxCharged = peakOf(memcg);
  }

  /** SIGKILL for all that is in it; how many are not gone. */
  #kill(memcg: Memcg): number {
    const all = [memcg, ...openDescendants(memcg)];
    const killing = this.#ground.hierarchy.startKilling(() => {});
    try {
      killing.round(all);
      return all.reduce((sum, one) => sum + pidsIn(one).length, 0);
    } finally {
      killing.close();
      closeAll(all.slice(1));
    }
  }

  /** What is still above the old limit stays charged to the reserve until it is back. */
  async #lower(): Promise<void> {
    const { hierarchy, limits } = this.#ground;
    const { owner, record, bytes, freed } = this.#setup;
    if (this.#raised === null) return freed(bytes);
    const end = hierarchy.clock.nowUs() + DRAIN_MS * 1000;
    for (;;) {
      record.limit = limits.lower(this.#raised);
      if (record.limit !== 'due') return;
      // The full memcg holds a little more than its jobs do, such as what the kernel keeps of the dead. Nothing of that is
      // to become the jobs'.
      limits.tighten(owner);
      if (hierarchy.clock.nowUs() > end) return;
      await this.#pause(2);
    }
  }

  /** The memcg that it ran in, with what was made in it; false while somebody is in one of them. */
  #removed(): boolean {
    if (this.#memcg !== null) {
      if (!removeBelow(this.#setup.owner, this.#memcg)) return false;
      this.#memcg.close();
      this.#memcg = null;
    }
    this.#entry?.clear();
    return true;
  }

  /** Who is dying is in it for a moment, and others may still have joined: the jobs are not to wait for that. */
  async #remove(): Promise<void> {
    const { clock } = this.#ground.hierarchy;
    const end = clock.nowUs() + LONGEST_DEATH_MS * 1000;
    while (!this.#removed()) {
      if (clock.nowUs() > end) throw new Error(`${this.directory} cannot be removed: it is in use`);
      if (this.#memcg !== null) this.#kill(this.#memcg);
      await this.#pause(2);
    }
  }

  async #release(): Promise<void> {
    const { clock } = this.#ground.hierarchy;
    const end = clock.nowUs() + LONGEST_DEATH_MS * 1000;
    for (;;) {
      try {
        if (this.#frozen.release()) return;
        if (clock.nowUs() > end) throw new Error('a freezer cgroup that was made is still in use');
      } catch (error) {
        if (isRevoked(error) || clock.nowUs() > end) throw error;
      }
      await this.#pause(2);
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }
}
