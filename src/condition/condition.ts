/**
 * One out-of-memory episode of one memcg, from the first signal until it is over: the clock and the ladder.
 *
 * The way from the event to the kill runs in one go, without a promise or a timer between, as long as the policy
 * answers at once. Everything else is driven by `#check`, which looks at the memcg's state and goes on from there:
 * signals, exits and timers only say when to look.
 */
import type { FrozenJobs } from '../action/freeze.js';
import { goneSince, hasKillableTask, processesOf } from '../action/hand-over.js';
import type { KernelPreference } from '../action/kernel-preference.js';
import type { Hierarchy, Memcg } from '../cgroup/cgroup.js';
import { isRevoked, isVanished, messageOf, ReprieveError } from '../errors.js';
import {
  checkDecision,
  type Decision,
  findVictim,
  type KillDecision,
  type Policy,
  type PolicyContext,
} from '../policy/decision.js';
import { compareJobs } from '../policy/lowest-priority.js';
import type { KernelVictim, Outcome, Report } from '../report/report.js';
import type { ConditionReserve, Reserve } from '../reserve/account.js';
import type { OverchargeGround } from '../reserve/overcharge.js';
import { withResolvers } from '../resolvers.js';
import type { Pace } from '../self/hardening.js';
import { type JobGroup, pidsOf } from '../snapshot/jobs.js';
import { diesWith, type Job, type Snapshot } from '../snapshot/snapshot.js';
import { shownPath } from '../source/scope.js';
import { Context, isPromise, readOnce, reasonOf } from './answer.js';
import type { LadderOptions } from './options.js';
import { count, Story } from './story.js';
import type { Toll } from './toll.js';
import { type KillResult, Victims } from './victims.js';
import { ConditionWindows } from './windows.js';

/** `under_oom` falls for a moment whenever waiters are woken: it must stay down this long to count as cleared. */
const SETTLE_US = 10_000;
/** What a dead victim gave back reaches the waiters within this time, or was not enough. */
const GRACE_US = 5_000;
/** A waiter that sleeps on this long with memory there was lost (since Linux 6.5) and is poked. */
const LOST_US = 20_000;
/** A process that the kernel killed is gone within this time after the memory came back, or is not waited for. */
const GONE_US = 200_000;
/** Pause between two looks while a victim dies: it needs the CPU, and its exit tells at once. In milliseconds. */
const DYING_LOOK_MS = 10;
/** Longest pause between two looks while nothing is signalled, in milliseconds. */
const LONGEST_LOOK_MS = 50;
/** Who is not dead after so long is held up by something else than the processor. */
const KILLING_US = 500_000;
/** A victim that dies slower than this may be outrun by others. */
const SLOW_US = 50_000;
/** After a longer thought than this, memory may have come back meanwhile. */
const PROMPT_US = 5_000;

/** What a condition is opened with. */
export interface ConditionSetup {
  hierarchy: Hierarchy;
  owner: Memcg;
  /** The watch armed the owner itself; else it lies above everything watched. */
  armed: boolean;
  scopes: string[];
  jobs: readonly JobGroup[];
  options: LadderOptions;
  reserve: ConditionReserve;
  /** Null where no window can be opened: in the simulation, without a freezer, or above what is watched. */
  overcharge: OverchargeGround | null;
  /** Freezes the jobs that are to be held, those left out whose identities are given; null where the kernel holds them, or nobody is to be held. */
  freezing: ((killed: ReadonlySet<string>) => FrozenJobs) | null;
  /** Processes that the kernel's killer took since it was asked before, by job. */
  takenByKernel: () => KernelVictim[];
  /** The memcgs above the owner, without the root. */
  above: readonly Memcg[];
  preference: Pick<KernelPreference, 'prepareHandOver'>;
  /** Tells the guard who may die. */
  plan: () => void;
  /** Raised while somebody is chosen; whatever follows a kill gives way to the victim. */
  pace: Pace;
  toll: Toll;
  /** Hands the condition to whoever iterates. */
  deliver: (condition: OomCondition) => void;
  /** True while a victim of a condition above or below is still dying. */
  deathsNearby: () => boolean;
  ended: (condition: OomCondition, report: Report) => unknown;
  /** No task can be killed and no job may be: somebody must look. */
  alarm: (message: string) => unknown;
  /** The handler cannot work in this memcg: has the guard act instead of any rung, and says why. Null where it can. */
  unable: (() => string) | null;
}

type Rung = { name: string; decide: Policy | 'caller' | 'kernel' };
type State = 'deciding' | 'acting' | 'waiting' | 'kernel' | 'parked' | 'ended';

const WHY_RELEASED = {
  released: 'the watch was closed',
  vanished: 'the watched memcg was removed',
  revoked: 'the guard has taken over',
};

let nextNumber = 1;

/** An open (or ended) out-of-memory condition. */
export class OomCondition {
  /** Unique among the conditions of this machine. */
  readonly id: string;
  readonly #setup: ConditionSetup;
  readonly #rungs: Rung[];
  readonly #openedUs: number;
  readonly #story: Story;
  #abort: AbortController | null = null;
  readonly #closed = withResolvers<Report>();
  readonly #victims: Victims;
  readonly #windows: ConditionWindows;
  readonly #timers = new Map<string, () => void>();
  #state: State = 'waiting';
  #rung = 0;
  /** Goes up with each question: an answer to an older one is late. */
  #question = 0;
  #asked: AbortController | null = null;
  #waitedMs = 0;
  #quietSinceUs: number | null = null;
  #stateSinceUs: number;
  /** Since when somebody waits though there is room. */
  #roomSinceUs: number | null = null;
  #delivered = false;
  #held: FrozenJobs | null = null;
  /** Processes by job, as they were when the kernel got the memcg. */
  #beforeKernel: Map<string, number[]> | null = null;

  constructor(setup: ConditionSetup, atUs: number) {
    this.#setup = setup;
    this.id = `${process.pid}-${Math.round(atUs)}-${nextNumber++}`;
    this.#openedUs = atUs;
    this.#stateSinceUs = atUs;
    const { policy, fallback } = setup.options;
    this.#rungs = [
      policy === null ? { name: 'caller', decide: 'caller' } : { name: 'policy', decide: policy },
      ...fallback.map((decide, index) => ({ name: decide === 'kernel' ? 'kernel' : `fallback ${index + 1}`, decide })),
    ];
    this.#victims = new Victims(
      setup.hierarchy,
      atUs,
      () => this.open && this.#check(),
      (text, at) => this.#step(text, at),
    );
    this.#windows = new ConditionWindows(
      setup,
      () => this.#sinceUs(),
      (text, at) => this.open && this.#step(text, at),
    );
    this.#story = new Story(this.id, setup, atUs, () => this.#rungName, {
      victims: this.#victims.records,
      windows: this.#windows.records,
    });
    setup.reserve.openWindow = (bytes, stopWithin, freed) => {
      const mayAct = this.#state === 'deciding' || this.#state === 'waiting';
      return this.#windows.open(bytes, stopWithin, mayAct ? null : 'an action is under way', freed);
    };
  }

  /** Path of the memcg that is out of memory; 'system' for the whole machine. */
  get owner(): string {
    return shownPath(this.#setup.owner.path);
  }

  get open(): boolean {
    return this.#state !== 'ended';
  }

  /** Aborted when the condition ends. */
  get signal(): AbortSignal {
    this.#abort ??= new AbortController();
    if (!this.open) this.#abort.abort();
    return this.#abort.signal;
  }

  /** Memory to work in while the condition is open. */
  get reserve(): Reserve {
    return this.#setup.reserve;
  }

  /** The report, once the condition has ended. */
  get closed(): Promise<Report> {
    return this.#closed.promise;
  }

  /** True while a job that was killed here is not all dead. */
  get dying(): boolean {
    return this.#victims.dying.length > 0;
  }

  /** True while one of them was killed a moment ago, and needs the processor to die. */
  get isKilling(): boolean {
    return this.#victims.isDyingFor(KILLING_US);
  }

  /** True while one of them is still expected to bring memory back. */
  get promising(): boolean {
    return this.#victims.isDyingFor(this.#setup.options.clearWithin * 1000);
  }

  // --- What the caller of the iterator style does ---

  /**
   * The state now, as plain data.
   * @throws ReprieveError ERR_REPRIEVE_CONDITION_CLOSED, ERR_REPRIEVE_VANISHED
   */
  async snapshot(): Promise<Snapshot> {
    this.#mustBeOpen();
    return this.#story.keep(this.#takeSnapshot());
  }

  /**
   * Kills a whole job, and resolves when it is dead or the ladder went on.
   * @param victim `id` of a job
   * @throws ReprieveError ERR_REPRIEVE_CONDITION_CLOSED, ERR_REPRIEVE_TOO_LATE, ERR_REPRIEVE_NOT_A_VICTIM,
   * ERR_REPRIEVE_MAX_VICTIMS
   */
  async kill(victim: string | undefined, because = 'the caller chose it'): Promise<KillResult> {
    this.#mustBeTheirTurn();
    const snapshot = this.#story.keep(this.#takeSnapshot());
    const job = findVictim(snapshot, victim);
    if (typeof job === 'string') throw new ReprieveError('ERR_REPRIEVE_NOT_A_VICTIM', `Nothing was killed: ${job}`);
    if (!this.#isNeeded()) {
      const held = this.#windows.any ? '; close the overcharge window, and its jobs go on' : '';
      throw new ReprieveError(
        'ERR_REPRIEVE_TOO_LATE',
        `Nothing was killed: memory has come back to ${this.owner}${held}`,
      );
    }
    const { maxVictims } = this.#setup.options;
    if (this.#victims.records.length >= maxVictims) {
      throw new ReprieveError('ERR_REPRIEVE_MAX_VICTIMS', `Nothing was killed: ${maxVictims} jobs have died already`);
    }
    return new Promise((resolve, reject) => {
      const killed = this.#carryOut({ action: 'kill', victim: job.id, because }, snapshot, resolve);
      if (!killed) reject(new ReprieveError('ERR_REPRIEVE_NOT_A_VICTIM', `Job ${job.name} is gone by itself`));
    });
  }

  /** Puts the deadline off: the ladder goes on after `ms`, at most `clearWithin` in all. */
  async wait(ms: number, because = 'the caller waits'): Promise<void> {
    this.#mustBeTheirTurn();
    const decision: Decision = { action: 'wait', ms, because };
    const wrong = checkDecision(decision, { jobs: [] } as unknown as Snapshot);
    if (wrong !== null) throw new ReprieveError('ERR_REPRIEVE_INVALID_ARGUMENT', wrong);
    this.#carryOut(decision, null);
  }

  /** Gives the memcg back to the kernel's own killer, for this condition. */
  async handOver(because = 'the caller handed over'): Promise<void> {
    this.#mustBeTheirTurn();
    this.#carryOut({ action: 'kernel', because }, null);
  }

  #mustBeOpen(): void {
    if (this.#state === 'ended') {
      throw new ReprieveError('ERR_REPRIEVE_CONDITION_CLOSED', `The condition of ${this.owner} has ended`);
    }
  }

  #mustBeTheirTurn(): void {
    this.#mustBeOpen();
    const rung = this.#rungs[this.#rung];
    if (rung?.decide === 'caller' && (this.#state === 'deciding' || this.#state === 'waiting')) return;
    throw new ReprieveError(
      'ERR_REPRIEVE_TOO_LATE',
      rung?.decide === 'caller'
        ? 'An action of this condition is under way'
        : `The ladder has gone on to its rung '${rung?.name}'`,
    );
  }

  // --- The ladder ---

  /**
   * Called once: from here to the first SIGKILL in one go, if the policy answers at once.
   * @param full the memcg was just seen at its limit
   */
  start(full: boolean): void {
    const { hierarchy, options } = this.#setup;
    try {
      if (full && !this.#setup.deathsNearby()) this.#ask();
      else this.#waitForMemory();
    } catch (error) {
      this.#failed(error);
    }
    if (!this.open) return;
    if (this.#state !== 'parked') hierarchy.guard.opened(this.#setup.owner);
    this.#story.opened();
    const left = options.handleWithin - this.#sinceUs() / 1000;
    this.#after('handle', Math.max(0, left), () => {
      if (this.#windows.any || this.#setup.owner.oomState().underOom)
        this.#handOver(`the ${options.handleWithin} ms of handleWithin are over`);
      else this.#cleared();
    });
    this.#look();
  }

  /** The kernel signalled again. While a victim is dying its exit tells more, and waiters come and go. */
  onSignal(): void {
    if (this.open && !this.dying) this.#check();
  }

  /** Something that belongs to it, and happened before it was opened. */
  note(text: string): void {
    if (this.open) this.#step(text, 0);
  }

  get hasWindow(): boolean {
    return this.#windows.any;
  }

  /** Closes the overcharge window, and opens none any more. */
  endWindow(): Promise<void> {
    return this.#windows.end();
  }

  /** The watch has ended: so does the condition, as it is; the end of the watch wakes the waiters. */
  release(outcome: 'released' | 'vanished' | 'revoked'): void {
    if (!this.open) return;
    this.#step(WHY_RELEASED[outcome]);
    this.#end(outcome);
  }

  #sinceUs(): number {
    return this.#story.sinceUs();
  }

  #step(text: string, atUs?: number): void {
    this.#story.step(text, atUs);
  }

  /** Whose turn it is. */
  get #rungName(): string {
    return this.#rungs[this.#rung]?.name ?? 'kernel';
  }

  #enter(state: State, why?: string): void {
    this.#state = state;
    this.#stateSinceUs = this.#setup.hierarchy.clock.nowUs();
    if (why !== undefined) this.#step(why);
  }

  /** Sets the named timer anew. What it runs may find the memcg gone. */
  #after(name: string, ms: number, run: () => void): void {
    this.#cancel(name);
    const cancel = this.#setup.hierarchy.clock.after(ms, () => {
      this.#timers.delete(name);
      if (!this.open) return;
      try {
        run();
      } catch (error) {
        this.#failed(error);
      }
    });
    this.#timers.set(name, cancel);
  }

  #cancel(name: string): void {
    this.#timers.get(name)?.();
    this.#timers.delete(name);
  }

  /** A step of the ladder threw: the memcg is gone, or something is broken; then the next rung must not be lost. */
  #failed(error: unknown): void {
    if (!this.open || isRevoked(error)) return; // once it is revoked the handler ends everything
    if (isVanished(error) && !this.#ownerIsThere()) {
      this.#step('the memcg was removed');
      this.#end('vanished');
      return;
    }
    this.#step(`failed: ${messageOf(error)}`);
    if (this.#rung < this.#rungs.length - 1) this.#nextRung();
    else this.#after('next', LONGEST_LOOK_MS, () => this.#handOver('trying again'));
    this.#look();
  }

  #ownerIsThere(): boolean {
    try {
      this.#setup.owner.oomState();
      return true;
    } catch {
      return false;
    }
  }

  #takeSnapshot(): Snapshot {
    const { owner, jobs, armed } = this.#setup;
    const limit = this.#windows.limitBefore ?? owner.limit();
    const sampled =
      jobs.length === 1 && jobs[0]
        ? jobs[0].sample(this.#victims.killed)
        : jobs.flatMap((group) => group.sample(this.#victims.killed));
    return {
      version: 1,
      owner: this.owner,
      above: !armed,
      limit: Number.isFinite(limit) ? limit : null,
      usage: owner.usage(),
      sinceUs: this.#sinceUs(),
      victims: this.#victims.records.map(({ job }) => job),
      jobs: sampled,
    };
  }

  /** False while memory comes back by itself, or with a job that is dying: then nobody is to be asked. */
  #isNeeded(): boolean {
    const { owner, deathsNearby } = this.#setup;
    const full =
      this.#windows.isFull ?? ((owner.oomState().underOom || this.#windows.closedWithin(SETTLE_US)) && owner.isFull());
    return full && !deathsNearby();
  }

  #waitForMemory(): void {
    this.#enter('acting', 'memory is coming back; waiting for that');
  }

  /** Goes on with the ladder, if that is still needed. */
  #decide(): void {
    this.#cancel('clear');
    if (this.#isNeeded()) this.#ask();
    else this.#waitForMemory();
  }

  /** Asks the rung whose turn it is. */
  #ask(): void {
    const { unable } = this.#setup;
    if (unable !== null) return this.#enter('waiting', unable());
    this.#setup.pace.raise();
    this.#enter('deciding');
    const question = this.#nextQuestion();
    const rung = this.#rungs[this.#rung];
    if (rung === undefined || rung.decide === 'kernel') return this.#handOver('nothing else is left on the ladder');
    const { maxVictims, respondWithin } = this.#setup.options;
    if (this.#victims.records.length >= maxVictims) return this.#handOver(`${maxVictims} jobs have died (maxVictims)`);

    const answerIsLate = () => {
      this.#step(`no answer within ${respondWithin} ms`);
      this.#nextRung();
    };
    const snapshot = this.#story.keep(this.#takeSnapshot());
    const { hierarchy, owner, plan } = this.#setup;
    // Should whoever is asked be the end of us: jobs may have come since the guard was told.
    if (hierarchy.guard.lacks(owner, snapshot.jobs)) plan();
    if (rung.decide === 'caller') {
      this.#after('respond', respondWithin, answerIsLate);
      if (!this.#delivered) {
        this.#delivered = true;
        this.#setup.deliver(this);
      }
      return;
    }
    let answer: Decision | PromiseLike<Decision>;
    try {
      answer = rung.decide(snapshot, this.#context());
    } catch (error) {
      this.#step(`threw: ${messageOf(error)}`);
      return this.#nextRung();
    }
    if (!isPromise(answer)) return this.#promptAnswer(answer, snapshot, question);
    this.#after('respond', respondWithin, answerIsLate);
    answer.then(
      (decision) =>
        this.#lateAnswer(question, () => {
          if (this.#isNeeded()) this.#answer(decision, snapshot);
          else this.#enter('acting', 'memory is coming back: the answer was not followed');
        }),
      (error) =>
        this.#lateAnswer(question, () => {
          this.#step(`rejected: ${messageOf(error)}`);
          this.#nextRung();
        }),
    );
  }

  #context(): PolicyContext {
    const question = this.#question;
    return new Context(this.#setup.reserve, () => {
      if (question !== this.#question) return AbortSignal.abort();
      this.#asked ??= new AbortController();
      return this.#asked.signal;
    });
  }

  /** A policy that did not give the event loop a turn: it may have taken its time, or closed the watch. */
  #promptAnswer(decision: Decision, snapshot: Snapshot, question: number): void {
    if (!this.open || question !== this.#question) return;
    const tookUs = this.#setup.hierarchy.clock.nowUs() - this.#stateSinceUs;
    const { respondWithin } = this.#setup.options;
    if (tookUs > respondWithin * 1000) {
      this.#step(`answered after ${Math.round(tookUs / 1000)} ms, not within ${respondWithin} ms`);
      return this.#nextRung();
    }
    if (tookUs > PROMPT_US && !this.#isNeeded()) return this.#waitForMemory();
    this.#answer(decision, snapshot);
  }

  #lateAnswer(question: number, run: () => void): void {
    if (!this.open) return;
    if (question !== this.#question) return this.#step('an answer came after its deadline and was not followed');
    try {
      run();
    } catch (error) {
      this.#failed(error);
    }
  }

  #answer(answer: Decision, snapshot: Snapshot): void {
    const decision = readOnce(answer);
    const wrong = checkDecision(decision, snapshot);
    if (wrong !== null) {
      this.#step(`refused: ${wrong}`);
      return this.#nextRung();
    }
    this.#carryOut(decision, snapshot);
  }

  /** An answer to the question before is late from here on. */
  #nextQuestion(): number {
    this.#asked?.abort();
    this.#asked = null;
    return ++this.#question;
  }

  #nextRung(): void {
    this.#cancel('respond');
    this.#cancel('clear');
    this.#cancel('wait');
    this.#nextQuestion();
    this.#waitedMs = 0;
    this.#rung++;
    // Out of the stack of whatever failed: a ladder of failing rungs must not nest.
    this.#enter('waiting');
    this.#after('next', 0, () => this.#withoutWindow(() => this.#decide()));
  }

  /** Carries a checked decision out; false if its job is gone by itself. */
  #carryOut(decision: Decision, snapshot: Snapshot | null, settled?: (result: KillResult) => void): boolean {
    this.#cancel('respond');
    this.#cancel('wait');
    this.#story.decided(decision);
    if (decision.action === 'kill') return this.#kill(decision, snapshot as Snapshot, settled ?? null);
    if (decision.action === 'wait') this.#wait(decision.ms, reasonOf(decision));
    else this.#handOver(reasonOf(decision));
    return true;
  }

  #wait(ms: number, because: string): void {
    const left = this.#setup.options.clearWithin - this.#waitedMs;
    if (left <= 0) {
      this.#step(`has waited for ${this.#waitedMs} ms in all; no more (clearWithin)`);
      return this.#nextRung();
    }
    const granted = Math.min(Math.max(1, ms), left);
    this.#waitedMs += granted;
    this.#enter('waiting', `waits for ${granted} ms: ${because}`);
    this.#after('wait', granted, () => this.#decide());
    this.#look();
  }

  #kill(decision: KillDecision, snapshot: Snapshot, settled: ((result: KillResult) => void) | null): boolean {
    const { hierarchy, jobs, options, owner } = this.#setup;
    const id = decision.victim;
    const sampled = snapshot.jobs.find((candidate) => candidate.id === id) as Job;
    // Another job may have come to that path since the snapshot.
    const job = jobs.map((group) => group.find(id)).find((found) => found?.born === sampled.born);
    if (job?.settings.protected) {
      // The snapshot may have been changed since it was taken, or the settings.
      this.#step(`refused: job ${job.name} is protected`);
      this.#nextRung();
      return false;
    }
    if (job === undefined) {
      this.#enter('acting', `job ${sampled.name} is gone by itself`);
      this.#look();
      return false;
    }
    const rung = this.#rungName;
    const record = this.#victims.kill(job, diesWith(sampled), rung, settled);
    this.#windows.thaw(job);
    this.#attempt('thawing', () => this.#held?.thaw(job));
    if (record.pids.length > 0) this.#story.killed(record.killedUs);
    this.#enter('acting');
    hierarchy.guard.killed(owner, job);
    this.#after('clear', options.clearWithin, () => {
      const stuck = this.#victims.dying.join(', ');
      if (!this.#windows.any && !this.#setup.owner.oomState().underOom) return this.#cleared();
      this.#step(`${stuck ? `${stuck} is not all dead` : 'not cleared'} after ${options.clearWithin} ms (clearWithin)`);
      this.#victims.settle();
      this.#nextRung();
    });
    this.#setup.pace.ease();
    this.#story.later(() => {
      record.because = reasonOf(decision);
      this.#story.step(`kills ${job.name} (${count(record.pids.length)}): ${record.because}`, record.killedUs, rung);
    });
    this.#look();
    return true;
  }

  // --- Looking at the state ---

  /** Looks again: soon after the state changed, more seldom later. Signals and exits look at once. */
  #look(): void {
    this.#hold();
    const age = this.#setup.hierarchy.clock.nowUs() - this.#stateSinceUs;
    const least = this.dying ? DYING_LOOK_MS : 1;
    this.#after('look', Math.min(LONGEST_LOOK_MS, Math.max(least, age / 8000)), () => this.#check());
  }

  /**
   * Where the kernel makes nobody wait: jobs stand still while an answer is awaited, or a victim is slow to die. One that
   * answers at once is quicker than any freezing.
   */
  #hold(): void {
    const { freezing, hierarchy } = this.#setup;
    if (freezing === null || !this.open || this.#state === 'kernel') return;
    const prompt = this.#state === 'acting' && hierarchy.clock.nowUs() - this.#stateSinceUs < SLOW_US;
    if (prompt && this.#held === null) return;
    const before = new Set(this.#held?.how.map(({ job }) => job));
    this.#held ??= freezing(this.#victims.killed);
    const { how } = this.#held;
    this.#attempt('freezing', () => this.#held?.freeze());
    const fresh = how.length === this.#held.how.length ? [] : this.#held.how.filter(({ job }) => !before.has(job));
    if (fresh.length > 0) this.#step(`holds ${fresh.map(({ job }) => job).join(', ')}: frozen`);
  }

  /** What was held goes on; a process that could not be moved back yet, as it dies, is tried again. */
  #letGo(): void {
    const held = this.#held;
    this.#held = null;
    if (held === null) return;
    let done: boolean | undefined;
    const release = () => {
      done = this.#attempt('thawing', () => held.release());
      if (done !== true) this.#setup.hierarchy.clock.after(LONGEST_LOOK_MS, release);
    };
    release();
  }

  #check(): void {
    try {
      this.#story.speak();
      // What forks while it is killed is gone on with at once, but others have a turn between.
      if (this.#victims.check()) this.#after('rounds', 0, () => this.#check());
      if (this.#victims.lastDeathUs !== null)
        this.#story.report.timings.deadUs = this.#victims.lastDeathUs - this.#openedUs;
      this.#windows.settleLimit();
      this.#checkState();
    } catch (error) {
      this.#failed(error);
    }
  }

  #checkState(): void {
    if (!this.open) return;
    if (this.#windows.any) return this.#checkWindow();
    const { owner, hierarchy } = this.#setup;
    const now = hierarchy.clock.nowUs();
    if (!owner.oomState().underOom) {
      this.#quietSinceUs ??= now;
      const quietUs = now - this.#quietSinceUs;
      const clearUs = this.#setup.options.clearWithin * 1000;
      if (quietUs < SETTLE_US) return this.#look();
      // A victim that never dies does not keep a condition open in which nobody waits.
      if (this.#victims.isDyingFor(clearUs)) return this.#look();
      // The kernel's victim gives its memory back before it is gone.
      const patienceUs = owner.parks ? GONE_US : clearUs / 2; // it may have some way to go until its limit
      if (this.#state === 'kernel' && quietUs < patienceUs && this.#kernelVictims().length === 0) {
        return this.#look();
      }
      return this.#cleared();
    }
    this.#quietSinceUs = null;
    this.#pokeLost(now);
    switch (this.#state) {
      case 'deciding':
        if (now - this.#stateSinceUs > LOST_US) this.#story.noteWaiters();
        break;
      case 'acting':
        if (!this.dying && now - (this.#victims.lastDeathUs ?? this.#stateSinceUs) > GRACE_US && this.#isNeeded())
          this.#decide();
        break;
      case 'parked':
        if (hasKillableTask(hierarchy, owner)) this.#handOver('there is a task again that the kernel can kill');
        else this.#killUnprotected('there may be a job again that may be killed');
        break;
      default:
        break;
    }
    if (this.open) this.#look();
  }

  /**
   * A task that decided to wait just as the memory came back, or the killer, sleeps on (since Linux 6.5). Writing 0 wakes
   * it; while there is memory nobody dies of that.
   */
  #pokeLost(now: number): void {
    const { owner, armed } = this.#setup;
    const handedOver = this.#state === 'kernel';
    if (!armed || this.#state === 'parked' || (!handedOver && owner.isFull())) {
      this.#roomSinceUs = null;
      return;
    }
    this.#roomSinceUs ??= now;
    if (now - this.#roomSinceUs < LOST_US) return;
    this.#roomSinceUs = now;
    owner.setKillDisabled(false);
    if (handedOver) return;
    owner.setKillDisabled(true);
    if (this.#story.report.pokes++ === 0) this.#step('a waiter slept on with memory there: it was woken');
  }

  #cleared(): void {
    const clearedUs = (this.#quietSinceUs ?? this.#setup.hierarchy.clock.nowUs()) - this.#openedUs;
    this.#story.report.timings.clearedUs = clearedUs;
    this.#step('nobody waits any more', clearedUs);
    this.#end(this.#state === 'kernel' ? 'kernel' : 'cleared');
  }

  // --- The overcharge window ---

  /** When its victim is dead the limit fits again. */
  #checkWindow(): void {
    this.#quietSinceUs = null;
    this.#windows.check();
    if (this.#state === 'acting' && !this.dying) this.#withoutWindow(() => {});
    this.#look();
  }

  /** First closes a window: while there is one the memcg does not show who waits. */
  #withoutWindow(run: () => void): void {
    if (!this.#windows.any) return run();
    void this.#windows.close().then(() => {
      if (!this.open) return;
      try {
        run();
      } catch (error) {
        this.#failed(error);
      }
    });
  }

  // --- The last rung ---

  #handOver(why: string): void {
    if (this.#state === 'kernel' || this.#state === 'ended') return;
    const { hierarchy, owner, armed, preference, jobs, options } = this.#setup;
    for (const name of ['respond', 'clear', 'wait', 'next']) this.#cancel(name);
    this.#nextQuestion();
    this.#victims.settle();
    this.#rung = this.#rungs.length - 1;
    if (this.#windows.any) {
      this.#enter('waiting');
      return this.#withoutWindow(() => this.#handOver(why));
    }
    if (!armed) {
      this.#step(`${why}; ${this.owner} lies above what is watched and is left to its owner`);
      return this.#end('left');
    }
    // Whatever of this fails, for want of descriptors, say, must not keep the waiters from being let go.
    this.#attempt('preparing the kernel', () => preference.prepareHandOver(jobs, this.#victims.killed, owner.limit()));
    const killable = this.#attempt('looking for a task to kill', () => hasKillableTask(hierarchy, owner));
    if (killable === false) {
      this.#step('the kernel could kill nothing here: every task has oom_score_adj -1000');
      return this.#killUnprotected(why);
    }
    this.#attempt('looking who waits', () => this.#story.noteWaiters());
    this.#beforeKernel = this.#attempt('listing processes', () => processesOf(jobs)) ?? null;
    this.#letGo();
    owner.setKillDisabled(false);
    this.#cancel('handle');
    this.#enter('kernel', `handed over to the kernel's own killer: ${why}`);
    this.#after('clear', options.clearWithin, () => {
      if (owner.oomState().underOom && !hasKillableTask(hierarchy, owner)) {
        return this.#killUnprotected('the kernel has killed what it can');
      }
      this.#step(`the kernel has not cleared it within ${options.clearWithin} ms; it keeps the memcg until it has`);
      this.#end('kernel');
    });
    this.#look();
  }

  #attempt<T>(what: string, run: () => T): T | undefined {
    try {
      return run();
    } catch (error) {
      this.#step(`${what} failed: ${messageOf(error)}`);
      return undefined;
    }
  }

  /** With nothing for the kernel to kill, a task that waits would spin for ever: a job dies by signal, or an alarm. */
  #killUnprotected(why: string): void {
    const { jobs, options, alarm, owner } = this.#setup;
    if (this.promising || !owner.oomState().underOom || !owner.isFull()) {
      this.#enter('acting');
      return this.#after('next', LONGEST_LOOK_MS, () => this.#handOver(why));
    }
    const snapshot = this.#takeSnapshot();
    const peopled = new Set(
      jobs.flatMap((group) => group.live()).flatMap((job) => (pidsOf(job).length > 0 ? [job.id] : [])),
    );
    const eligible = snapshot.jobs
      .filter((job) => !job.protected && !job.killed && peopled.has(job.id))
      .sort(compareJobs);
    const [victim] = eligible;
    if (victim !== undefined && this.#victims.records.length < options.maxVictims) {
      const because = 'the kernel can kill no task here';
      this.#kill({ action: 'kill', victim: victim.id, because }, snapshot, null);
      return;
    }
    if (this.#state !== 'parked') {
      const message = `${this.owner} stays parked: no task can be killed by the kernel and no job may be killed (${why})`;
      this.#enter('parked', message);
      this.#setup.hierarchy.guard.parked(owner);
      alarm(message);
    }
    this.#look();
  }

  #end(outcome: Outcome): void {
    if (this.#state === 'ended') return;
    this.#victims.settle();
    this.#enter('ended');
    for (const cancel of this.#timers.values()) cancel();
    this.#timers.clear();
    this.#nextQuestion();
    this.#victims.close();
    this.#letGo();
    this.#setup.hierarchy.guard.resolved(this.#setup.owner);
    this.#withoutWindow(() => {});
    // Whatever of the report fails, somebody waits for its end, and the memcg for the next condition.
    const kernelVictims =
      outcome === 'vanished' ? [] : this.#attempt('looking whom the kernel killed', () => this.#kernelVictims());
    const byKernel = outcome === 'cleared' && this.#victims.records.length === 0 && kernelVictims?.length;
    const report = this.#story.end(byKernel ? 'kernel' : outcome, kernelVictims ?? []);
    this.#setup.reserve.close();
    this.#setup.ended(this, report);
    this.#abort?.abort();
    this.#closed.resolve(report);
  }

  /** By processes that are gone since the kernel got the memcg; else by what it has counted. */
  #kernelVictims(): KernelVictim[] {
    if (this.#beforeKernel !== null) return goneSince(this.#beforeKernel, this.#setup.jobs);
    return this.#setup.takenByKernel();
  }
}
