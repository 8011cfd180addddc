import { addAbortListener, EventEmitter } from 'node:events';
import { constants } from 'node:os';
import { OomGroups } from './action/oom-groups.js';
import { ScoreRegister } from './action/scores.js';
import type { Capabilities } from './capabilities.js';
import type { Hierarchy, Memcg } from './cgroup/cgroup.js';
import { isAtOrBelow } from './cgroup/cgroup.js';
import { readMeminfo } from './cgroup/meminfo.js';
import { OomCondition } from './condition/condition.js';
import { DRILL_LADDER, Drills, dryHierarchy, fullMemcg, NO_PREFERENCE } from './condition/drill.js';
import { type LadderOptions, parseLadder, type WatchDeadlines } from './condition/options.js';
import { Toll, USAGE_FIELDS } from './condition/toll.js';
import { invalidOption, isRevoked, isVanished, ReprieveError } from './errors.js';
import { boundOf } from './guard/bound.js';
import type { GuardReplaced } from './guard/process.js';
import type { HandlerStatus } from './guard/status.js';
import type { Policy } from './policy/decision.js';
import type { Report } from './report/report.js';
import { Account, ConditionReserve, type ReserveCounters } from './reserve/account.js';
import { wholePages } from './reserve/arena.js';
import type { WindowCounters } from './reserve/overcharge.js';
import type { Raise } from './reserve/raised-limits.js';
import { onProcessEnd } from './self/exit.js';
import { type Ground, type HandlerOptions, openGround } from './self/ground.js';
import { NO_PACE } from './self/hardening.js';
import { Inside } from './self/inside.js';
import { shield } from './self/shield.js';
import { Upkeep } from './self/upkeep.js';
import { MachineJobs } from './snapshot/machine.js';
import type { JobRule, JobSettings } from './snapshot/rules.js';
import { JobRules } from './snapshot/settings.js';
import type { ArmedMemcg } from './source/armed.js';
import { findOwner } from './source/owner.js';
import { parseScope, SYSTEM_PATH, shownPath } from './source/scope.js';
import { parseShortage, type Shortage } from './source/shortage.js';
import { bytesOf, formatBytes, type Size } from './units.js';
import { openAbove, Watch } from './watch.js';

const { errno } = constants;

/** How often new processes are looked for and cleared memcgs are armed again, in milliseconds. */
const TICK_MS = 1_000;

/** Options of `handler.watch()`. */
export interface WatchOptions extends WatchDeadlines {
  /** Decides what happens; without it, iterate over the watch and act yourself. */
  policy?: Policy;
  /** Also watch every memcg below the scope, and those made later: each may have a limit of its own. */
  recursive?: boolean;
  /**
   * How much of the handler's reserve conditions of this scope may charge; all of it by default. What is charged below
   * another watched scope counts there as well.
   */
  reserve?: Size;
  /** Settings of jobs, by glob on their name below the scope, or by rules; the first that matches counts. */
  jobs?: Record<string, JobSettings> | readonly JobRule[];
  /**
   * For a scope that the handler lives in: raises its limit by the size of the reserve while it is watched, so that the
   * jobs keep what they had. False by default.
   */
  raiseLimit?: boolean;
  /** For 'system': when the machine counts as out of memory. */
  shortage?: Shortage;
  /** Closes the watch when aborted. */
  signal?: AbortSignal;
}

/** What a handler tells without being asked. */
export interface HandlerEvents {
  /** A condition has ended. */
  report: [report: Report];
  /** Tasks stay parked and nobody may be killed: somebody must look. */
  alarm: [message: string];
  /** Something could not be done that is not needed for handling. */
  warning: [message: string];
  /** A watched memcg was removed; its watch has ended. */
  vanished: [scope: string];
  /**
   * The guard has taken over, because this process was stopped or silent for too long: it has put everything back, and this
   * handler has closed itself. Open another one to go on.
   */
  revoked: [why: string];
  /** The guard died and was replaced. */
  guard: [event: GuardReplaced];
}

/** The guard of a handler. */
export interface GuardState {
  /** Undefined for a moment while it is replaced. */
  pid: number | undefined;
  /** How often one that died was replaced. */
  replaced: number;
}

/** A watch that is being set up: await it, or iterate over its conditions at once. */
export type PendingWatch = Promise<Watch> & AsyncIterable<OomCondition>;

/** What was left to its owner above is not taken up again within this time while it goes on. */
const LEFT_US = 10_000_000;

/** Handles out-of-memory conditions of memory cgroups and of the machine. */
export class OomHandler extends EventEmitter<HandlerEvents> implements AsyncDisposable {
  readonly #ground: Ground;
  readonly #account: Account;
  readonly #scores: ScoreRegister;
  readonly #groups: OomGroups | null;
  readonly #watches = new Set<Watch>();
  /** Open conditions by the inode of the memcg that is full. */
  readonly #conditions = new Map<number, OomCondition>();
  readonly #owners = new Map<OomCondition, string>();
  /** Memcgs above everything watched that were left to their owner: until when, in the clock's microseconds. */
  readonly #left = new Map<number, number>();
  readonly #forgetEnd: () => void;
  readonly #inside: Inside;
  #stopTick: (() => void) | null = null;
  readonly #upkeep: Upkeep;
  #spurious = 0;
  #published = '';
  readonly #dry: Hierarchy;
  readonly #drills: Drills;
  /** Watches that were closed because the guard cannot guard them. */
  readonly #guardFailures = new WeakMap<Watch, Error>();
  /** What had held the thread up at the latest event, and when that was. */
  readonly #usageAtEvent = new Float64Array(USAGE_FIELDS);
  #eventUs = Number.NEGATIVE_INFINITY;
  #closing: Promise<void> | null = null;
  #forgetSignal = () => {};

  /**
   * Opens a handler on this machine: moves the process to a memcg of its own, raises its scheduling, and sets the reserve
   * aside, after it has put back what handlers that are gone left behind, and starts the guard. Everything is put back by
   * `close()`, or by the guard.
   * @throws ReprieveError ERR_REPRIEVE_UNSUPPORTED in a worker, ERR_REPRIEVE_RESERVE_UNAVAILABLE,
   * ERR_REPRIEVE_GUARD, ERR_REPRIEVE_STATE, ERR_REPRIEVE_NATIVE_MISSING, ERR_REPRIEVE_INVALID_ARGUMENT
   */
  static async open(options: HandlerOptions = {}): Promise<OomHandler> {
    const handler = new OomHandler(await openGround(options));
    handler.#forgetSignal = closeOnAbort(options.signal, handler);
    return handler;
  }

  /** A handler on other ground than this machine, such as the simulation. */
  static over(ground: Ground): OomHandler {
    return new OomHandler(ground);
  }

  private constructor(ground: Ground) {
    super();
    this.#ground = ground;
    this.#dry = dryHierarchy(ground.hierarchy);
    this.#upkeep = new Upkeep(ground.hierarchy.clock, ground.pace, () => this.#isKilling());
    this.#inside = new Inside(ground, (message) => this.#tell('warning', message));
    this.#drills = new Drills({
      ground,
      watches: this.#watches,
      isUnableIn: (path) => this.#inside.isUnableIn(path),
      run: (armed, atUs) => this.#runDrill(armed, atUs),
      warn: (message) => this.#tell('warning', message),
    });
    this.#account = new Account(ground.reserve.bytes);
    this.#scores = new ScoreRegister(ground.hierarchy);
    this.#groups = ground.hierarchy.kind === 'v2' && ground.files !== null ? new OomGroups(ground.files) : null;
    this.#forgetEnd = onProcessEnd(() => this.#atEnd());
    this.#tellRestored(ground.restored);
    if (ground.guard === null) return;
    const { process, epoch } = ground.guard;
    epoch.onRevoked = () => this.#revoked();
    process.events = {
      replaced: (event) => this.#tell('guard', event),
      lost: (error) => {
        this.#tell('alarm', `${error.message}; nobody would act if this process died, so all watches were closed`);
        for (const watch of this.#watches) void watch.close();
      },
      failed: (inode, error) => this.#notGuarded(inode, error),
    };
  }

  /** What this machine offers, and what of it is used. */
  get capabilities(): Capabilities {
    const { capabilities, own } = this.#ground;
    const { use, path, refuge, whyNot } = own;
    return { ...capabilities, ownMemcg: { use, path, refuge, whyNot } };
  }

  /** Counters of the reserve, over all conditions. */
  get reserve(): ReserveCounters {
    return this.#account.counters();
  }

  /** Overcharge windows so far; none where none can be opened. */
  get windows(): WindowCounters {
    return { ...(this.#ground.overcharge?.counters ?? { opened: 0, refused: 0, exhausted: 0 }) };
  }

  /** Null without a guard. */
  get guard(): GuardState | null {
    const process = this.#ground.guard?.process;
    return process === undefined ? null : { pid: process.pid, replaced: process.replaced };
  }

  get watches(): readonly Watch[] {
    return [...this.#watches];
  }

  /** Signals that found nothing to handle: the condition was over, or was handled already. */
  get spurious(): number {
    return this.#spurious;
  }

  /**
   * Watches a scope 'memcg:/path', or 'system'. Until the watch is closed, tasks that run into the limit wait.
   * Rejects with a ReprieveError: ERR_REPRIEVE_INVALID_SCOPE, ERR_REPRIEVE_NOT_A_MEMCG, ERR_REPRIEVE_ALREADY_WATCHED,
   * ERR_REPRIEVE_INSIDE_SCOPE, ERR_REPRIEVE_PERMISSION, ERR_REPRIEVE_INVALID_ARGUMENT, ERR_REPRIEVE_UNSUPPORTED,
   * ERR_REPRIEVE_CLOSED, ERR_REPRIEVE_GUARD, ERR_REPRIEVE_STATE, ERR_REPRIEVE_REVOKED; nothing is armed then.
   */
  watch(scope: string, options: WatchOptions = {}): PendingWatch {
    const watch = (async () => {
      this.#checkOpen();
      // What was left armed is not to be taken for what was there.
      this.#tellRestored(await this.#ground.restoreStale());
      await this.#ground.guard?.process.mustBeThere();
      const armed = this.#watch(scope, options);
      try {
        await this.#ground.guard?.process.settled();
        const failure = this.#guardFailures.get(armed);
        if (failure !== undefined) throw failure;
        await this.#drills.first(armed);
      } catch (error) {
        await armed.close();
        throw error;
      }
      return armed;
    })();
    watch.catch(() => {}); // whoever only iterates gets it there
    let iterator: Promise<AsyncIterator<OomCondition, void>> | undefined;
    const begin = () => {
      iterator ??= watch.then((armed) => armed[Symbol.asyncIterator]());
      return iterator;
    };
    return Object.assign(watch, {
      [Symbol.asyncIterator]: () => ({
        next: async () => (await begin()).next(),
        return: async () => (await begin()).return?.() ?? { done: true as const, value: undefined },
      }),
    });
  }

  #checkOpen(): void {
    if (this.#closing !== null) throw new ReprieveError('ERR_REPRIEVE_CLOSED', 'The handler was closed');
  }

  #tellRestored(lines: readonly string[]): void {
    for (const line of lines) this.#tell('warning', `left by a handler that is gone: ${line}`);
  }

  #watch(scope: string, options: WatchOptions): Watch {
    this.#checkOpen();
    if (options.recursive !== undefined && typeof options.recursive !== 'boolean') {
      throw invalidOption('the `recursive` option', 'true or false', options.recursive);
    }
    const raise = options.raiseLimit ?? false;
    if (typeof raise !== 'boolean') throw invalidOption('the `raiseLimit` option', 'true or false', raise);
    const path = parseScope(scope);
    const { hierarchy, own } = this.#ground;
    if (options.shortage !== undefined && path !== SYSTEM_PATH) {
      throw invalidOption('the `shortage` option', "left out of a watch of anything but 'system'", options.shortage);
    }
    const ladder = parseLadder(options);
    const account = new Account(this.#reserveOf(options.reserve));
    options.signal?.throwIfAborted();

    own.locate();
    const rules = new JobRules(options.jobs ?? {}, own.path);
    // What is pending of memcgs made below a scope that is watched already decides what they had before.
    hierarchy.drainTree();
    const opened: Memcg[] = [];
    let raised: Raise | null = null;
    let forgetSignal = () => {};
    let unshield = () => {};
    let root: Memcg | null = null;
    let machine: MachineJobs | null = null;
    try {
      opened.push(...(path === SYSTEM_PATH ? [] : openAbove(hierarchy, path)), this.#openScope(path, options));
      const memcg = opened.at(-1) as Memcg;
      if (this.#memberOf(memcg.inode) !== undefined) {
        throw new ReprieveError('ERR_REPRIEVE_ALREADY_WATCHED', `${scope} is watched already`);
      }
      this.#inside.check(path, raise);
      if (path === SYSTEM_PATH) {
        unshield = this.#shield();
        root = hierarchy.kind === 'none' ? null : hierarchy.open('/');
        machine = this.#machineJobs(root, rules);
      }
      if (raise) {
        raised = this.#ground.limits?.raise(memcg, this.#ground.reserve.bytes) ?? null;
      }
      const watch = new Watch({
        hierarchy,
        scope: memcg,
        above: opened.slice(0, -1),
        recursive: options.recursive ?? false,
        options: ladder,
        hold: this.#holdOf(memcg, ladder),
        freezing: this.#ground.freezing,
        machine,
        rules,
        signalled: (_, armed, atUs) => this.#signalled(armed, atUs),
        account,
        isArmed: (inode) => this.#memberOf(inode) !== undefined,
        scores: this.#scores,
        groups: this.#groups,
        bound: this.#ground.guard?.process.boundOf(ladder) ?? boundOf(ladder, null),
        near: (watch) => {
          this.#inside.stepOut(watch.path);
          if (this.#isKilling()) return;
          if (watch.path === SYSTEM_PATH) this.#ground.pace.eased(() => watch.comesNear());
          this.#drills.warmUp(watch);
        },
        ended: (ended) => {
          forgetSignal();
          unshield();
          root?.close();
          this.#lower(raised, path);
          this.#ended(ended);
        },
        warn: (message) => this.#tell('warning', message),
      });
      this.#watches.add(watch);
      this.#nestAccounts();
      hierarchy.keepAlive(true);
      this.#tick();
      forgetSignal = closeOnAbort(options.signal, watch);
      return watch;
    } catch (error) {
      unshield();
      machine?.close();
      root?.close();
      this.#lower(raised, path);
      for (const memcg of opened) memcg.close();
      throw error;
    }
  }

  #machineJobs(root: Memcg | null, rules: JobRules): MachineJobs {
    const { hierarchy, guard } = this.#ground;
    return new MachineJobs({
      hierarchy,
      root,
      rules,
      spared: () => new Set(guard?.process.pid === undefined ? [] : [guard.process.pid]),
      scoreBefore: (process) => this.#scores.before(process),
      warn: (message) => this.#tell('warning', message),
    });
  }

  /** The kernel's killer stays beneath a watch of the machine: it is to find others before us. */
  #shield(): () => void {
    const { guard } = this.#ground;
    const { undo, whyNot } = shield([process.pid, ...(guard?.process.pid === undefined ? [] : [guard.process.pid])]);
    if (whyNot !== null) this.#tell('warning', `the kernel may take this handler or its guard as a victim: ${whyNot}`);
    return undo;
  }

  #openScope(path: string, { shortage }: WatchOptions): Memcg {
    const { hierarchy } = this.#ground;
    if (path !== SYSTEM_PATH) return hierarchy.open(path);
    const { total, swapTotal } = readMeminfo();
    return hierarchy.openMachine(parseShortage(shortage ?? {}, total, swapTotal));
  }

  /** Bytes between the limit at which jobs are held and the kernel's killer; null where we hold nobody. */
  #holdOf({ parks, path }: Memcg, { hold }: LadderOptions): number | null {
    if (path === SYSTEM_PATH) return hold === false ? null : 0;
    if (!parks) return hold === true ? this.#ground.reserve.bytes : null;
    if (hold !== false) return null;
    throw invalidOption(
      'the `hold` option',
      'true or left out: in a memcg of cgroup v1 the kernel holds who wants memory',
      hold,
    );
  }

  #lower(raised: Raise | null, path: string): void {
    try {
      if (raised !== null && this.#ground.limits?.lower(raised) === 'due')
        this.#tell('warning', `the limit of ${path} is put back once less is used`);
    } catch (error) {
      if (!isRevoked(error)) this.#tell('warning', `lowering the limit of ${path}: ${(error as Error).message}`);
    }
  }

  #reserveOf(size: Size | undefined): number {
    const { bytes } = this.#ground.reserve;
    if (size === undefined) return bytes;
    const wanted = wholePages(bytesOf(size, 'the `reserve` option'));
    if (wanted <= bytes) return wanted;
    throw invalidOption('the `reserve` option', `no more than the handler's, ${formatBytes(bytes)}`, size);
  }

  /** The account of a scope lies below the one of the next watched scope above it, in the end below the handler's. */
  #nestAccounts(): void {
    for (const { path, account } of this.#watches) {
      const above = [...this.#watches].filter((other) => other.path !== path && isAtOrBelow(path, other.path));
      const nearest = above.sort((a, b) => b.path.length - a.path.length)[0];
      account.moveBelow(nearest?.account ?? this.#account);
    }
  }

  // --- A handler that lives in what it watches ---

  #stepBack(): void {
    this.#inside.stepBack(this.#owners.values());
  }

  /** Nothing is tried that would fail, or park us, in the memcg that holds us: the guard can do all of it. */
  #leaveInside(path: string): string {
    const { process, epoch } = this.#ground.guard as NonNullable<Ground['guard']>;
    process.dismiss(false);
    process.takenOver = `it left ${path} to the guard`;
    this.#tell('warning', `${path} is full and left to the guard; ${this.#inside.whyUnable(path)}`);
    process.gone().then(() => epoch.tell());
    return 'left to the guard';
  }

  #memberOf(inode: number): { watch: Watch; armed: ArmedMemcg } | undefined {
    for (const watch of this.#watches) {
      const armed = watch.member(inode);
      if (armed !== undefined) return { watch, armed };
    }
    return undefined;
  }

  // --- From signal to condition ---

  #signalled(armed: ArmedMemcg, atUs: number): void {
    this.#noteUsage(atUs);
    const drill = this.#drills.isDue(armed);
    try {
      const chain = armed.chain.filter((memcg) => !this.#isLeft(memcg, atUs));
      const owner = findOwner(chain);
      if (owner !== null) this.#inside.stepOut(owner.memcg.path);
      this.#ground.hierarchy.drainTree();
      if (owner === null) {
        if (drill) this.#runDrill(armed, atUs);
        else if (!this.#kernelWasQuicker(armed, atUs)) this.#spurious++;
        return;
      }
      const { memcg, full } = owner;
      if (!full && chain.length < armed.chain.length) return; // what it shows comes from the one that was left
      const open = this.#conditions.get(memcg.inode);
      if (open !== undefined) open.onSignal();
      else this.#open(memcg, full, atUs);
    } catch (error) {
      // Short of memory in the memcg that holds us: nothing else keeps the handler from acting there.
      const short = !drill && (error as ReprieveError).errno === errno.ENOMEM;
      const held = short ? armed.chain.find(({ path }) => this.#inside.isUnableIn(path)) : undefined;
      if (isVanished(error)) for (const watch of this.#watches) watch.scopeIsThere();
      else if (held !== undefined && !isRevoked(error)) this.#leaveInside(held.path);
      else this.#tell('warning', `a signal of ${shownPath(armed.memcg.path)}: ${(error as Error).message}`);
    } finally {
      if (drill) this.#drills.done(armed);
    }
  }

  /** Where it lets nobody wait, it may have killed already: then there is a report of that. */
  #kernelWasQuicker({ memcg }: ArmedMemcg, atUs: number): boolean {
    const kills = this.#memberOf(memcg.inode)?.watch.kernelKills;
    if (!kills?.any || this.#conditions.has(memcg.inode)) return false;
    this.#open(memcg, false, atUs);
    return true;
  }

  /** Once for each event: of several signals of one wake-up the first counts. */
  #noteUsage(atUs: number): void {
    if (atUs === this.#eventUs) return;
    this.#eventUs = atUs;
    this.#ground.readUsage(this.#usageAtEvent);
  }

  /** True for a memcg above everything watched that was left to its owner a moment ago. */
  #isLeft(memcg: Memcg, atUs: number): boolean {
    return this.#left.size > 0 && atUs < (this.#left.get(memcg.inode) ?? 0);
  }

  /** What a real signal does, without the deed. */
  #runDrill(armed: ArmedMemcg, atUs: number): void {
    findOwner(armed.chain);
    this.#inside.drill(armed.memcg.path);
    this.#open(fullMemcg(armed.memcg), true, atUs, true);
  }

  #open(owner: Memcg, full: boolean, atUs: number, drill = false): void {
    const own = this.#memberOf(owner.inode);
    const members = own === undefined ? this.#topmostBelow(owner.path) : [own];
    const [first] = members;
    if (first === undefined) return; // its watch was closed by an earlier signal of this wake-up
    const { watch } = first;
    const parent = own?.watch.account ?? this.#account;
    const { heap, hierarchy, pace, readUsage, reserve } = this.#ground;
    const unable = !drill && this.#inside.isUnableIn(owner.path);
    const condition: OomCondition = new OomCondition(
      {
        hierarchy: drill ? this.#dry : hierarchy,
        owner,
        armed: own !== undefined,
        scopes: members.map((member) => member.watch.scope),
        jobs: members.map((member) => member.watch.jobsOf(member.armed)),
        options: drill ? DRILL_LADDER : watch.options,
        reserve: new ConditionReserve(new Account(parent.bytes, parent), reserve.arena),
        overcharge: own === undefined || drill ? null : this.#ground.overcharge,
        freezing: own === undefined || drill ? null : own.watch.holding(own.armed),
        takenByKernel: () => (drill ? [] : (watch.kernelKills?.take() ?? [])),
        above: own?.armed.chain.slice(0, -1) ?? [],
        preference: drill ? NO_PREFERENCE : watch.preference,
        plan: () => own?.watch.plan(own.armed),
        pace: drill ? NO_PACE : pace,
        toll: new Toll(readUsage, heap, this.#usageAtEvent, atUs),
        deliver: (opened) => watch.deliver(opened),
        deathsNearby: () => this.#deathsNear(owner.path, condition),
        ended: (ended, report) => drill || this.#conditionEnded(ended, report, owner),
        alarm: (message) => drill || this.#tell('alarm', message),
        unable: unable ? () => this.#leaveInside(owner.path) : null,
      },
      atUs,
    );
    if (drill) {
      condition.start(full);
      condition.release('released');
      return;
    }
    this.#conditions.set(owner.inode, condition);
    this.#owners.set(condition, owner.path);
    watch.opened(condition);
    if (unable) condition.note(this.#inside.whyUnable(owner.path));
    condition.start(full);
    const steppedOut = this.#inside.sayOut(owner.path, atUs);
    if (steppedOut !== null) condition.note(steppedOut);
  }

  #isKilling(): boolean {
    for (const condition of this.#conditions.values()) if (condition.isKilling) return true;
    return false;
  }

  /** The armed memcgs below a path that have no armed one above them there, by path. */
  #topmostBelow(path: string): { watch: Watch; armed: ArmedMemcg }[] {
    const below = [...this.#watches]
      .flatMap((watch) => [...watch.members()].map((armed) => ({ watch, armed })))
      .filter(({ armed }) => isAtOrBelow(armed.memcg.path, path))
      .sort((a, b) => (a.armed.memcg.path < b.armed.memcg.path ? -1 : 1));
    return below.filter(
      ({ armed }) =>
        !below.some((other) => other.armed !== armed && isAtOrBelow(armed.memcg.path, other.armed.memcg.path)),
    );
  }

  #deathsNear(path: string, self: OomCondition): boolean {
    for (const [condition, owner] of this.#owners) {
      if (condition !== self && condition.promising && (isAtOrBelow(owner, path) || isAtOrBelow(path, owner)))
        return true;
    }
    return false;
  }

  #conditionEnded(condition: OomCondition, report: Report, owner: Memcg): void {
    this.#conditions.delete(owner.inode);
    this.#owners.delete(condition);
    this.#tell('report', report);
    if (report.outcome === 'left') this.#left.set(owner.inode, this.#ground.hierarchy.clock.nowUs() + LEFT_US);
    // Signals below were taken for this condition's; one that has its own limit at hand goes on by itself.
    setImmediate(() => {
      this.#ground.pace.raise();
      this.#lookBelow(owner.path);
      this.#stepBack();
    });
  }

  /** Takes up what is out of memory at or below a path, and arms again what the kernel has cleared. */
  #lookBelow(path: string): void {
    if (this.#closing !== null) return;
    for (const watch of this.#watches) {
      try {
        for (const armed of watch.members()) {
          if (!isAtOrBelow(armed.memcg.path, path)) continue;
          if (this.#conditions.has(armed.memcg.inode)) continue; // it looks by itself
          armed.rearm();
          const { killDisabled, underOom } = armed.memcg.oomState();
          const taken = watch.kernelKills?.any === true;
          if ((killDisabled && underOom) || taken) this.#signalled(armed, this.#ground.hierarchy.clock.nowUs());
        }
      } catch (error) {
        if (isVanished(error)) watch.scopeIsThere();
        else if (!isRevoked(error)) this.#tell('warning', `${watch.scope}: ${(error as Error).message}`);
      }
    }
  }

  /** Outside of the handling: a listener that throws or dawdles is not to stand in its way. */
  #tell<K extends keyof HandlerEvents>(event: K, ...args: HandlerEvents[K]): void {
    setImmediate(() => this.emit(event as string & K, ...(args as never)));
  }

  #tick(): void {
    this.#stopTick?.();
    this.#stopTick = this.#ground.hierarchy.clock.after(TICK_MS, () => {
      this.#stopTick = null;
      this.#ground.guard?.process.heartbeat();
      this.#lookBelow('/'); // whatever became of a signal, nobody waits unseen for longer than this
      if (this.#watches.size > 0) this.#tick();
      this.#upkeep.begin(() => [
        () => this.#publish(),
        ...[...this.#watches].flatMap((watch) => watch.upkeep()),
        ...this.#drills.upkeep(),
        () => this.#stepBack(),
        () => this.#inside.fetchPrograms(),
      ]);
    });
  }

  /** For `reprieve doctor`, if something has changed. */
  #publish(): void {
    const watches = [...this.#watches].map(({ scope, reserve }) => ({ scope, reserve }));
    const status: HandlerStatus = {
      version: 1,
      pid: process.pid,
      watches,
      reserve: this.reserve,
      windows: this.windows,
    };
    const text = JSON.stringify(status);
    const revoked = this.#ground.guard?.epoch.revoked === true; // what is written then is for nobody, and stays
    if (this.#ground.publish === null || this.#published === text || this.#closing !== null || revoked) return;
    try {
      this.#ground.publish(status);
    } catch (error) {
      this.#tell('warning', `how this handler is doing cannot be shown: ${(error as Error).message}`);
    }
    this.#published = text;
  }

  // --- The guard ---

  /** What the guard cannot guard is not armed; a memcg that is gone needs no guard. */
  #notGuarded(inode: number, error: Error): void {
    const found = this.#memberOf(inode);
    if (found === undefined) return;
    const { watch, armed } = found;
    try {
      armed.memcg.oomState();
    } catch (gone) {
      if (isVanished(gone)) return;
    }
    this.#guardFailures.set(watch, error);
    this.#tell('alarm', `${watch.scope} was closed: ${error.message}`);
    void watch.close();
  }

  /** The guard has taken over: whatever is still done here would be done a second time. */
  #revoked(): void {
    const inside = [...this.#watches].find(({ path }) => this.#inside.isUnableIn(path));
    const reason = this.#ground.guard?.process.takenOver ?? 'it was silent for too long';
    const why = inside === undefined ? reason : `${reason}; ${this.#inside.whyUnable(inside.path)}`;
    for (const watch of this.#watches) watch.revoke();
    if (this.#closing !== null) return; // at the end something was left to the guard: nothing was taken from us
    // Whoever is told opens another one, perhaps: not before the guard is done.
    const tell = () => this.#tell('revoked', why);
    this.close().then(tell, tell);
  }

  // --- The end ---

  #ended(watch: Watch): void {
    this.#watches.delete(watch);
    this.#nestAccounts();
    this.#drills.ended();
    if (watch.state === 'vanished') this.#tell('vanished', watch.scope);
    this.#stepBack();
    if (this.#watches.size > 0) return;
    this.#stopTick?.();
    this.#upkeep.stop();
    if (this.#closing === null) this.#ground.hierarchy.keepAlive(false);
  }

  /** The process ends without `close`: no promise runs any more, but writes do. */
  #atEnd(): void {
    // Before they are moved with the process: then they would be in no window any more.
    for (const window of this.#ground.overcharge?.windows ?? []) window.killSpawned();
    if (!this.#leavesToGuard()) for (const watch of this.#watches) watch.disarmNow();
    this.#ground.leave();
  }

  /**
   * Limits back and jobs thawed, before a memcg is the kernel's again. True if that cannot be done, as more is used than a
   * limit allows: a job has to die for it, and then the guard does all the rest, in the right order.
   */
  #leavesToGuard(): boolean {
    const { files, guard } = this.#ground;
    files?.putBackAll(guard !== null);
    return files?.pending === true && guard !== null;
  }

  /** Ends every watch and puts everything back: the kernel's killer, oom_score_adj, scheduling, the process's memcg. */
  close(): Promise<void> {
    this.#closing ??= this.#close();
    return this.#closing;
  }

  async #close(): Promise<void> {
    this.#forgetSignal();
    const { guard, hierarchy, overcharge } = this.#ground;
    await Promise.all([...(overcharge?.windows ?? [])].map((window) => window.close()));
    if (this.#leavesToGuard()) {
      guard?.process.dismiss(false);
      await guard?.process.gone();
      for (const watch of this.#watches) watch.revoke();
    }
    const closed = await Promise.allSettled([...this.#watches].map((watch) => watch.close()));
    this.#stopTick?.();
    this.#upkeep.stop();
    this.#ground.limits?.close();
    this.#forgetEnd();
    if (guard?.epoch.revoked) await guard.process.gone(); // it puts back what is written down
    this.#ground.leave();
    await guard?.process.gone();
    for (const line of await this.#ground.restoreRest()) this.#tell('warning', `left at the end: ${line}`);
    hierarchy.close();
    const failures = closed.flatMap((result) => (result.status === 'rejected' ? [result.reason] : []));
    if (failures.length > 0) throw new AggregateError(failures, 'Not everything could be put back');
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }
}

/** Closes what was opened when the signal is aborted; what it returns forgets the signal. */
function closeOnAbort(signal: AbortSignal | undefined, opened: { close(): Promise<void> }): () => void {
  if (signal === undefined) return () => {};
  const listener = addAbortListener(signal, () => void opened.close());
  return () => listener[Symbol.dispose]();
}
