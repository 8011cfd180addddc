import type { FrozenJobs } from './action/freeze.js';
import { KernelKills } from './action/kernel-kills.js';
import { KernelPreference } from './action/kernel-preference.js';
import { mayBeHeld } from './action/never-hold.js';
import type { OomGroups } from './action/oom-groups.js';
import type { ScoreRegister } from './action/scores.js';
import { type Hierarchy, isWindow, type Listener, type Memcg, type TreeChange } from './cgroup/cgroup.js';
import { Subtree } from './cgroup/subtree.js';
import type { OomCondition } from './condition/condition.js';
import type { LadderOptions } from './condition/options.js';
import { isRevoked, isVanished, ReprieveError } from './errors.js';
import type { Bound } from './guard/bound.js';
import type { Entry } from './guard/ledger.js';
import { MOST_PLANNED } from './guard/protocol.js';
import { rankForGuard } from './policy/lowest-priority.js';
import type { Account, ReserveCounters } from './reserve/account.js';
import { setKernelReserve } from './reserve/kernel.js';
import type { Piece } from './self/upkeep.js';
import { identityOf, type JobGroup, type LiveJob, pidsOf } from './snapshot/jobs.js';
import type { MachineJobs } from './snapshot/machine.js';
import { MemcgJobs } from './snapshot/memcg-jobs.js';
import type { JobRules } from './snapshot/settings.js';
import type { Job } from './snapshot/snapshot.js';
import { ArmedMemcg } from './source/armed.js';
import { scopeOf, shownPath } from './source/scope.js';

/** Conditions that wait for an iterating caller, at most. */
const MOST_QUEUED = 64;
/** How long `close` waits for the kernel's killer before it takes the prepared `oom_score_adj` back. */
const RELEASE_MS = 1_000;

/** Looks, 5 ms apart, in which nobody waits: `under_oom` falls for a moment when waiters are woken, before they try again. */
const QUIET_LOOKS = 5;
/** The same at the end of the process, which is not held up for longer. */
const EXIT_MS = 200;

/** Jobs that a window kept frozen have tried again after so long, and wait if they have to. */
const AFTER_WINDOW_MS = 20;
/** Jobs that may be the next to die, and processes of theirs whose descriptors are held for it. */
const MOST_LIKELY = 4;
const MOST_KEPT = 64;

/** On a machine there are always small jobs that are protected, such as process 1: only what the kernel may choose counts. */
const RIVAL = 16 * 2 ** 20;
/** With less than this part of its memory in use a machine is calm: then it is looked at all its jobs every so many ticks. */
const CALM = 0.75;
const CALM_TICKS = 5;
/** A job of the machine that takes more than this is held while an answer is awaited, in bytes a second. */
const GROWS = 4 * 2 ** 20;

/** How a watch ended, or that it has not. */
export type WatchState = 'watching' | 'closed' | 'vanished' | 'revoked';

/** What a watch is made with. */
export interface WatchSetup {
  hierarchy: Hierarchy;
  scope: Memcg;
  /** The memcgs above the scope, topmost first, without the root. The watch closes them. */
  above: readonly Memcg[];
  recursive: boolean;
  options: LadderOptions;
  rules: JobRules;
  /** Bytes between a limit at which jobs are held and the kernel's killer; null: the kernel holds them, or nobody does. */
  hold: number | null;
  freezing: ((jobs: () => LiveJob[]) => FrozenJobs) | null;
  /** The jobs of the machine, where that is the scope. */
  machine: MachineJobs | null;
  /** Called for each signal of an armed memcg. */
  signalled: (watch: Watch, armed: ArmedMemcg, atUs: number) => void;
  /** What conditions here may charge. */
  account: Account;
  /** True if another watch has armed that memcg. */
  isArmed: (inode: number) => boolean;
  scores: ScoreRegister;
  groups: OomGroups | null;
  bound: Bound;
  /** The scope comes near to its limit. */
  near: (watch: Watch) => unknown;
  /** Called once when the watch has ended by itself or by `close`. */
  ended: (watch: Watch) => void;
  warn: (message: string) => void;
}

/** One watched scope: everything that is armed for it, its jobs, and the conditions it hands to its caller. */
export class Watch implements AsyncIterable<OomCondition>, AsyncDisposable {
  readonly #setup: WatchSetup;
  readonly #armed = new Map<number, ArmedMemcg>();
  readonly #jobs = new Map<number, JobGroup>();
  /** Memcgs below the scope that had their own oom_kill_disable, by inode. */
  readonly #kept = new Map<number, Entry>();
  readonly #subtree: Subtree;
  #likely: LiveJob[] = [];
  #near: { listener: Listener; limit: number } | null = null;
  readonly preference: KernelPreference;
  /** Null where the kernel kills nobody while we watch. */
  readonly kernelKills: KernelKills | null = null;
  readonly #queue: OomCondition[] = [];
  readonly #conditions = new Set<OomCondition>();
  #restoreReserve: (() => void) | null = null;
  readonly #wakes = new Set<() => void>();
  #dropped = 0;
  #state: WatchState = 'watching';
  /** Tasks waited when it ended: the kernel is to choose. */
  #released = false;
  #ticks = 0;
  #closing: Promise<void> | null = null;

  /** Arms everything, or nothing. @throws ReprieveError */
  constructor(setup: WatchSetup) {
    this.#setup = setup;
    const { hierarchy, scope, above, rules } = setup;
    this.preference = new KernelPreference(setup.scores, setup.groups, setup.machine === null ? 0 : RIVAL);
    this.#subtree = new Subtree(hierarchy, scope, {
      created: (memcg) => this.#created(memcg),
      removed: (memcg) => this.#forget(memcg),
      changed: (memcg, change) => this.#changed(memcg, change),
      failed: (memcg, error) => this.#warn(memcg, error),
    });
    try {
      this.#jobs.set(scope.inode, setup.machine ?? new MemcgJobs(hierarchy, scope, scope.path, rules));
      this.#restoreReserve = setKernelReserve(scope, setup.account.bytes, hierarchy.ledger);
      this.#keepBelow();
      this.#arm(scope, above);
      this.#armBelow();
      this.#listenNear();
      if (!scope.parks) this.kernelKills = new KernelKills(scope, () => [...this.#jobs.values()]);
      for (const piece of this.#preparation()) piece();
    } catch (error) {
      this.#state = 'closed';
      this.#disarm();
      this.#forgetAll();
      throw error;
    }
  }

  /** The watched scope, 'memcg:/path' or 'system'. */
  get scope(): string {
    return scopeOf(this.#setup.scope.path);
  }

  get path(): string {
    return this.#setup.scope.path;
  }

  get options(): LadderOptions {
    return this.#setup.options;
  }

  /** Counters of this scope's part of the reserve, which is a part of those above it too. */
  get reserve(): ReserveCounters {
    return this.account.counters();
  }

  /** For the handler. */
  get account(): Account {
    return this.#setup.account;
  }

  /** The longest that a task waits here. */
  get longestWaitMs(): Bound {
    return this.#setup.bound;
  }

  get state(): WatchState {
    return this.#state;
  }

  /** Conditions that nobody iterating took in time; the ladder handled them all the same. */
  get dropped(): number {
    return this.#dropped;
  }

  /** Paths of the memcgs whose tasks wait for this watch. */
  get armed(): string[] {
    return [...this.#armed.values()].map(({ memcg }) => memcg.path);
  }

  /** The armed memcgs, none once the watch has ended; for the handler. */
  members(): ArmedMemcg[] {
    return this.#state === 'watching' ? [...this.#armed.values()] : [];
  }

  member(inode: number): ArmedMemcg | undefined {
    return this.#state === 'watching' ? this.#armed.get(inode) : undefined;
  }

  /** Jobs of an armed memcg. */
  jobsOf({ memcg }: ArmedMemcg): JobGroup {
    let jobs = this.#jobs.get(memcg.inode);
    if (jobs === undefined) {
      jobs = new MemcgJobs(this.#setup.hierarchy, memcg, this.path, this.#setup.rules);
      this.#jobs.set(memcg.inode, jobs);
    }
    return jobs;
  }

  // --- Arming ---

  #arm(memcg: Memcg, above: readonly Memcg[], original?: boolean): void {
    const { hierarchy, signalled, options, hold } = this.#setup;
    if (hold !== null) hierarchy.prepareHold(memcg, hold);
    const signal = (atUs: number) => {
      const armed = this.#armed.get(memcg.inode);
      if (armed !== undefined) signalled(this, armed, atUs);
    };
    const armed = new ArmedMemcg(hierarchy, memcg, above, options, signal, original);
    this.#armed.set(memcg.inode, armed);
    if (armed.lacks !== undefined)
      this.#setup.warn(`${shownPath(memcg.path)}, watched as ${this.scope}: ${armed.lacks}`);
  }

  /** Notes who has an oom_kill_disable of its own below, before others inherit ours: what we made is put back, not that. */
  #keepBelow(): void {
    if (this.#setup.recursive) return; // each is armed, and remembers
    for (const memcg of this.#subtree.all()) {
      if (memcg.oomState().killDisabled) this.#kept.set(memcg.inode, this.#setup.hierarchy.ledger.keep(memcg));
    }
  }

  /** With `recursive`: every memcg below that no other watch has armed. */
  #armBelow(): void {
    if (!this.#setup.recursive) return;
    for (const memcg of this.#subtree.all()) {
      if (!this.#armed.has(memcg.inode) && !isWindow(memcg.path)) this.#armOne(memcg);
    }
  }

  /** One that another watch has, of this process or another, is left to it. */
  #armOne(memcg: Memcg, original?: boolean): void {
    try {
      if (!this.#setup.isArmed(memcg.inode)) this.#arm(memcg, this.#chainAbove(memcg), original);
    } catch (error) {
      if (!(error instanceof ReprieveError) || error.code !== 'ERR_REPRIEVE_ALREADY_WATCHED') throw error;
    }
  }

  #chainAbove(memcg: Memcg): Memcg[] {
    const between = this.#subtree.all().filter(({ path }) => memcg.path.startsWith(`${path}/`));
    return [...this.#setup.above, this.#setup.scope, ...between];
  }

  /**
   * A memcg was made below the scope: it inherited our oom_kill_disable (memory.rst, section 10). If it got a limit of
   * its own and nobody listened, its tasks would wait for ever.
   */
  #created(memcg: Memcg): void {
    if (isWindow(memcg.path)) return;
    const original = this.#armed.get(this.#setup.scope.inode)?.original ?? false;
    if (this.#setup.recursive && this.#state === 'watching') {
      if (!this.#armed.has(memcg.inode)) this.#armOne(memcg, original);
    } else if (!original && !this.#setup.isArmed(memcg.inode)) {
      this.#releaseInherited(memcg);
    }
  }

  #releaseInherited(memcg: Memcg): void {
    if (!memcg.oomState().killDisabled || !memcg.claim()) return; // claimed: another handler has armed it since
    try {
      memcg.setKillDisabled(false);
    } finally {
      memcg.unclaim();
    }
  }

  #warn(memcg: Memcg, error: unknown): void {
    this.#setup.warn(`${shownPath(memcg.path)}, watched as ${this.scope}: ${(error as Error).message}`);
  }

  #forget(memcg: Memcg): void {
    const armed = this.#armed.get(memcg.inode);
    this.#armed.delete(memcg.inode);
    armed?.restore();
    this.#jobs.get(memcg.inode)?.close();
    this.#jobs.delete(memcg.inode);
    this.#kept.get(memcg.inode)?.clear();
    this.#kept.delete(memcg.inode);
  }

  #changed(memcg: Memcg, change: TreeChange): void {
    try {
      this.#jobs.get(memcg.inode)?.changed(change);
      const armed = this.member(memcg.inode);
      if (change.kind === 'attributes' && armed !== undefined) this.plan(armed);
    } catch (error) {
      if (!isVanished(error)) throw error;
      this.scopeIsThere();
    }
  }

  /** False, and the watch ends, if the scope was removed. */
  scopeIsThere(): boolean {
    try {
      this.#setup.scope.oomState();
      return true;
    } catch (error) {
      if (!isVanished(error)) throw error;
      this.#finish('vanished');
      return false;
    }
  }

  /** The armed scope itself; undefined once it is gone. */
  get self(): ArmedMemcg | undefined {
    return this.member(this.#setup.scope.inode);
  }

  /** True where going through all jobs takes a while, as on a machine: others would wait for it. Not each time. */
  get isCostly(): boolean {
    return this.#setup.machine !== null && this.#ticks % CALM_TICKS !== 0;
  }

  /** True for a machine with much memory left, whose many jobs need not be gone through each second. */
  get isResting(): boolean {
    const { scope } = this.#setup;
    return this.isCostly && scope.usage() < CALM * scope.limit();
  }

  /** Once a second: looks for what is new since, such as processes, or another limit. */
  upkeep(): Piece[] {
    this.#ticks++;
    let rests = false;
    const rearm = () => {
      if (!this.#subtree.complete) this.#retry();
      this.#armBelow();
      this.#listenNear();
      rests = this.isResting;
    };
    const preparation = this.#preparation().map((piece) => () => rests || piece());
    return [rearm, ...preparation].map((piece) => () => this.#keepUp(piece));
  }

  #keepUp(piece: Piece): void {
    if (this.#state !== 'watching') return;
    try {
      piece();
    } catch (error) {
      if (isRevoked(error)) return;
      if (isVanished(error)) this.scopeIsThere();
      else this.#setup.warn(`${this.scope}: ${(error as Error).message}`);
    }
  }

  /** Says whom the kernel is to take, and whom the guard, should it come to that. */
  #preparation(): Piece[] {
    const groups = () => [...this.#jobs.values()];
    let sampled: Job[] | null = null; // and stays so where one of them could not be
    return [
      () => this.#setup.machine?.live(),
      () => {
        sampled = groups().flatMap((jobs) => jobs.sample(new Set()));
      },
      () => sampled && this.preference.prepare(groups(), sampled),
      () => {
        if (sampled === null) return;
        this.#likely = rankForGuard(sampled)
          .slice(0, MOST_LIKELY)
          .flatMap(({ id }) => groups().flatMap((jobs) => jobs.find(id) ?? []));
        for (const armed of this.#armed.values()) this.plan(armed);
      },
      () => this.kernelKills?.note(),
    ];
  }

  /** Memory is nearly used up: whoever came since the last look is to be known before it is. */
  comesNear(): void {
    this.#keepUp(() => this.#setup.machine?.look());
  }

  /** What holds the jobs of an armed memcg while an answer is awaited; null where the kernel does, or nobody is to. */
  holding(armed: ArmedMemcg): ((killed: ReadonlySet<string>) => FrozenJobs) | null {
    const { freezing, hold } = this.#setup;
    if (freezing === null || hold === null || armed.memcg.parks) return null;
    const jobs = this.jobsOf(armed);
    return (killed) => {
      const held = new Set<string>();
      return freezing(() => {
        for (const job of this.#toHold(jobs, held, killed)) held.add(identityOf(job));
        return jobs.live().filter((job) => held.has(identityOf(job)));
      });
    };
  }

  /** Of a memcg all jobs, as they would wait there in the kernel; of the machine those that grow. First those that die first. */
  #toHold(jobs: JobGroup, held: ReadonlySet<string>, killed: ReadonlySet<string>): LiveJob[] {
    const { machine } = this.#setup;
    machine?.measure();
    const live = jobs.live().filter((job) => mayBeHeld(job) && !killed.has(identityOf(job)));
    const grows = (job: LiveJob) => held.has(identityOf(job)) || machine === null || machine.growth(job) > GROWS;
    return live.filter(grows).sort((a, b) => a.settings.priority - b.settings.priority);
  }

  /** Processes of the jobs that would die first by the last look, as many as are worth a descriptor each. */
  likelyVictims(): number[] {
    // A process that is a job by itself has one already.
    return this.#likely.flatMap((job) => (job.kind === 'memcg' ? pidsOf(job) : [])).slice(0, MOST_KEPT);
  }

  /** Tells the guard who may die in an armed memcg. */
  plan(armed: ArmedMemcg): void {
    const jobs = this.jobsOf(armed);
    const mayDie = jobs.live().filter(({ settings }) => !settings.protected);
    // The guard ranks them itself, by what they use then; who is left out for want of room is for us to say.
    const told = mayDie.length > MOST_PLANNED ? rankForGuard(jobs.sample(new Set())).map(identityOf) : null;
    if (told !== null) {
      const place = new Map(told.map((identity, index) => [identity, index]));
      mayDie.sort((a, b) => (place.get(identityOf(a)) ?? told.length) - (place.get(identityOf(b)) ?? told.length));
    }
    this.#setup.hierarchy.guard.plan(armed.memcg, mayDie);
  }

  /** What failed before, when descriptors were short, may go well now. */
  #retry(): void {
    this.#subtree.rescan();
    for (const jobs of this.#jobs.values()) jobs.refresh();
    const original = this.self?.original ?? false;
    for (const memcg of this.#setup.recursive || original ? [] : this.#subtree.all()) {
      const kept = this.#kept.has(memcg.inode) || this.#setup.isArmed(memcg.inode);
      if (!kept) this.#releaseInherited(memcg);
    }
  }

  /** The threshold stands at the limit of the time when it was set. */
  #listenNear(): void {
    const { hierarchy, scope, near } = this.#setup;
    const limit = scope.limit();
    if (this.#near?.limit === limit) return;
    this.#near?.listener.close();
    this.#near = { limit, listener: hierarchy.listenNear(scope, () => near(this)) };
  }

  // --- Conditions ---

  /** A condition of this watch was opened. */
  opened(condition: OomCondition): void {
    this.#conditions.add(condition);
    condition.closed.then(() => this.#conditions.delete(condition));
  }

  /** Hands a condition to whoever iterates. */
  deliver(condition: OomCondition): void {
    if (this.#queue.length >= MOST_QUEUED) {
      this.#queue.shift();
      this.#dropped++;
    }
    this.#queue.push(condition);
    this.#wakeAll();
  }

  #wakeAll(): void {
    for (const wake of this.#wakes) wake();
    this.#wakes.clear();
  }

  /**
   * Conditions as they open, for the caller to act on; ends when the watch is closed or its memcg vanishes. A condition
   * that ended before it was taken is passed over.
   * @throws ReprieveError ERR_REPRIEVE_INVALID_ARGUMENT if the watch has a policy, which acts by itself
   */
  [Symbol.asyncIterator](): AsyncIterator<OomCondition, void> {
    return {
      next: async () => {
        const condition = await this.#nextCondition();
        return condition === null ? { done: true, value: undefined } : { done: false, value: condition };
      },
      return: async () => {
        await this.close();
        return { done: true, value: undefined };
      },
    };
  }

  /** Null when the watch has ended. */
  async #nextCondition(): Promise<OomCondition | null> {
    if (this.options.policy !== null) {
      throw new ReprieveError(
        'ERR_REPRIEVE_INVALID_ARGUMENT',
        'Expected a watch without a `policy` to iterate over: with one, the policy acts',
      );
    }
    while (this.#state === 'watching') {
      const condition = this.#queue.shift();
      if (condition?.open) return condition;
      if (condition !== undefined) {
        this.#dropped++;
        continue;
      }
      await new Promise<void>((resolve) => {
        this.#wakes.add(resolve);
      });
    }
    await this.close();
    return null;
  }

  // --- The end ---

  /** Puts the kernel's killer back at once, without waiting: also for the exit of the process. */
  #disarm(): void {
    const steps = [
      () => this.#near?.listener.close(),
      () => this.#restoreReserve?.(),
      ...this.#restoring(),
      // Memcgs made after the last look inherited our setting.
      () => this.#setup.hierarchy.drainTree(),
      () => this.#subtree.rescan(),
      ...this.#restoring(),
    ];
    for (const step of steps) this.#attempt(step);
    this.#near = null;
    this.#restoreReserve = null;
  }

  #restoring(): (() => void)[] {
    return [...this.#armed.values()].map((armed) => () => armed.restore());
  }

  /** One step that fails must not keep the others from being gone. */
  #attempt(step: () => void): void {
    try {
      step();
    } catch (error) {
      if (!isRevoked(error)) this.#warn(this.#setup.scope, error);
    }
  }

  /** Where tasks wait, the kernel is about to choose: it should find everybody in order. True if there are such. */
  #prepareRelease(): boolean {
    let waiting = false;
    for (const armed of this.#armed.values()) {
      this.#attempt(() => {
        const { memcg, original } = armed;
        if (waiting || original || !memcg.oomState().underOom) return;
        waiting = true;
        this.preference.prepareHandOver([this.jobsOf(armed)], new Set(), memcg.limit());
      });
    }
    return waiting;
  }

  /** At the end of the process: no promise runs any more, but the kernel needs a moment to choose. */
  disarmNow(): void {
    if (this.#state !== 'watching') return;
    this.#state = 'closed';
    const released = this.#prepareRelease();
    this.#disarm();
    const nap = new Int32Array(new SharedArrayBuffer(4));
    for (let waited = 0, quiet = released ? 0 : QUIET_LOOKS; waited < EXIT_MS && quiet < QUIET_LOOKS; waited += 5) {
      Atomics.wait(nap, 0, 0, 5);
      quiet = this.#wakeWaiters() ? 0 : quiet + 1;
    }
    this.#attempt(() => this.preference.restoreAll());
    this.#closing = this.#release();
  }

  #finish(state: Exclude<WatchState, 'watching'>): void {
    if (this.#state !== 'watching') return;
    this.#released = state === 'closed' && this.#prepareRelease();
    this.#state = state;
    for (const condition of [...this.#conditions])
      this.#attempt(() => condition.release(state === 'closed' ? 'released' : state));
    this.#disarm();
    this.#wakeAll();
    this.#closing = this.#release();
  }

  /** With the kernel's killer back, the waiters wake and it takes whom we prepared; only then that is taken back. */
  async #release(): Promise<void> {
    const { hierarchy, scope, above } = this.#setup;
    const until = hierarchy.clock.nowUs() + RELEASE_MS * 1000;
    for (let quiet = this.#released ? 0 : QUIET_LOOKS; quiet < QUIET_LOOKS && hierarchy.clock.nowUs() < until; ) {
      await new Promise<void>((resolve) => {
        hierarchy.clock.after(5, resolve);
      });
      quiet = this.#wakeWaiters() ? 0 : quiet + 1;
    }
    this.#forgetAll();
    scope.close();
    for (const memcg of above) memcg.close();
    this.#setup.ended(this);
  }

  #forgetAll(): void {
    this.#attempt(() => this.preference.restoreAll());
    for (const jobs of this.#jobs.values()) jobs.close();
    this.#jobs.clear();
    this.#likely = [];
    for (const entry of this.#kept.values()) entry.clear();
    this.#kept.clear();
    this.#subtree.close();
    this.#armed.clear();
  }

  /** Wakes waiters that slept on; false when nobody waits, or it is not ours to wake them. */
  #wakeWaiters(): boolean {
    let waiting = false;
    for (const { memcg, original } of this.#armed.values()) {
      this.#attempt(() => {
        try {
          if (original || !memcg.oomState().underOom) return;
          memcg.setKillDisabled(false);
          waiting = true;
        } catch (error) {
          if (!isVanished(error)) throw error;
        }
      });
    }
    return waiting;
  }

  /** Ends the watch: open conditions end as 'released', the kernel's killer and every `oom_score_adj` are put back. */
  async close(): Promise<void> {
    if ([...this.#conditions].some(({ hasWindow }) => hasWindow)) await this.#endWindows();
    this.#finish('closed');
    await this.#closing;
  }

  /** Only when their jobs run again it shows who waits, and the kernel is to find everybody in order. */
  async #endWindows(): Promise<void> {
    await Promise.all([...this.#conditions].map((condition) => condition.endWindow()));
    await new Promise<void>((resolve) => {
      this.#setup.hierarchy.clock.after(AFTER_WINDOW_MS, resolve);
    });
  }

  /** The guard has taken over, and puts everything back. */
  revoke(): void {
    this.#finish('revoked');
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }
}

/** Opens the memcgs above a path, topmost first, without the root. */
export function openAbove(hierarchy: Hierarchy, path: string): Memcg[] {
  const names = path.slice(1).split('/').slice(0, -1);
  return names.map((_, index) => hierarchy.open(`/${names.slice(0, index + 1).join('/')}`));
}
