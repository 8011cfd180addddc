/**
 * One out-of-memory episode of one memcg, from the first signal until it is over: the clock and the ladder.
 *
 * The way from the event to the kill runs in one go, without a promise or a timer between, as long as the policy
 * answers at once. Everything else is driven by `#check`, which looks at the memcg's state and goes on from there:
 * signals, exits and timers only say when to look.
 */
import { type KernelPreference, NEVER } from '../action/kernel-preference.js';
import { closeAll, type Hierarchy, type Killing, type Memcg, openDescendants } from '../cgroup/cgroup.js';
import { isVanished, ReprieveError } from '../errors.js';
import { checkDecision, type Decision, findVictim, type Policy, type PolicyContext } from '../policy/decision.js';
import { compareJobs, explain } from '../policy/lowest-priority.js';
import type { Outcome, Report, Victim } from '../report/report.js';
import type { ConditionReserve, Reserve } from '../reserve/account.js';
import { identityOf, type Jobs, type LiveJob, pidsIn, pidsOf } from '../snapshot/jobs.js';
import { diesWith, type Job, type Snapshot } from '../snapshot/snapshot.js';
import { isAtLimit } from '../source/owner.js';
import { formatBytes } from '../units.js';
import type { LadderOptions } from './options.js';

/** `under_oom` falls for a moment whenever waiters are woken: it must stay down this long to count as cleared. */
const SETTLE_US = 10_000;
/** What a dead victim gave back reaches the waiters within this time, or was not enough. */
const GRACE_US = 5_000;
/** A waiter that sleeps on this long with memory there was lost (since Linux 6.5) and is poked. */
const LOST_US = 20_000;
/** A victim that still lives after this long is helped by process_mrelease(2). */
const SLOW_DEATH_US = 50_000;
/** A process that the kernel killed is gone within this time after the memory came back, or is not waited for. */
const GONE_US = 200_000;
/** How long one turn of the event loop may go on killing what a victim forks. */
const ROUNDS_US = 2_000;
/** Longest pause between two looks while nothing is signalled, in milliseconds. */
const LONGEST_LOOK_MS = 50;
/** Less than this that stays charged to a dead job is the kernel's own. */
const WORTH_SAYING = 2 ** 20;
/** Threads listed as waiting, at most. */
const MOST_WAITERS = 200;

/** What `condition.kill()` did. */
export interface KillResult {
  job: string;
  /** Processes that were signalled. */
  processes: number;
  /** All of them are gone. */
  dead: boolean;
  /** Memory that came back, in bytes; null if the job is not dead yet. */
  freed: number | null;
}

/** What a condition is opened with. */
export interface ConditionSetup {
  hierarchy: Hierarchy;
  owner: Memcg;
  /** The watch armed the owner itself; else it lies above everything watched. */
  armed: boolean;
  scopes: string[];
  jobs: readonly Jobs[];
  options: LadderOptions;
  reserve: ConditionReserve;
  preference: Pick<KernelPreference, 'prepareHandOver'>;
  /** Reads the handler's page faults so far. */
  readFaults: (out: Float64Array) => void;
  /** Hands the condition to whoever iterates. */
  deliver: (condition: OomCondition) => void;
  /** True while a victim of a condition above or below is still dying. */
  deathsNearby: () => boolean;
  ended: (condition: OomCondition, report: Report) => unknown;
  /** No task can be killed and no job may be: somebody must look. */
  alarm: (message: string) => unknown;
}

type Rung = { name: string; decide: Policy | 'caller' | 'kernel' };
type State = 'deciding' | 'acting' | 'waiting' | 'kernel' | 'parked' | 'ended';

interface Dying {
  killing: Killing;
  job: LiveJob;
  targets: Memcg[];
  usageBefore: number;
  record: Victim;
  settled: ((result: KillResult) => void) | null;
  helped: boolean;
}

const faultsAtKill = new Float64Array(2);
let nextNumber = 1;

/** An open (or ended) out-of-memory condition. */
export class OomCondition {
  /** Unique among the conditions of this machine. */
  readonly id: string;
  readonly #setup: ConditionSetup;
  readonly #rungs: Rung[];
  readonly #openedUs: number;
  readonly #report: Report;
  #abort: AbortController | null = null;
  readonly #closed: { promise: Promise<Report>; resolve: (report: Report) => void };
  readonly #killed = new Set<string>();
  readonly #timers = new Map<string, () => void>();
  readonly #faultsAtEvent = new Float64Array(2);
  #state: State = 'waiting';
  #rung = 0;
  /** Goes up with each question: an answer to an older one is late. */
  #question = 0;
  #asked: AbortController | null = null;
  #waitedMs = 0;
  #dying: Dying[] = [];
  #quietSinceUs: number | null = null;
  #stateSinceUs: number;
  #lastDeathUs: number | null = null;
  /** Since when somebody waits though there is room. */
  #roomSinceUs: number | null = null;
  #delivered = false;
  #pidsBeforeKernel: Map<string, number[]> | null = null;

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
    let resolve: (report: Report) => void = () => {};
    const promise = new Promise<Report>((done) => {
      resolve = done;
    });
    this.#closed = { promise, resolve };
    this.#report = {
      version: 1,
      id: this.id,
      owner: setup.owner.path,
      scopes: setup.scopes,
      openedAt: '',
      outcome: 'cleared',
      timings: { snapshotUs: null, decidedUs: null, killedUs: null, deadUs: null, clearedUs: null, endedUs: 0 },
      faults: null,
      snapshot: null,
      decisions: [],
      explanation: [],
      victims: [],
      kernelVictims: [],
      waiters: [],
      steps: [],
      pokes: 0,
      reserve: setup.reserve.counters(),
    };
  }

  /** Path of the memcg that is out of memory. */
  get owner(): string {
    return this.#setup.owner.path;
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
    return this.#dying.length > 0;
  }

  // --- What the caller of the iterator style does ---

  /**
   * The state now, as plain data.
   * @throws ReprieveError ERR_REPRIEVE_CONDITION_CLOSED, ERR_REPRIEVE_VANISHED
   */
  async snapshot(): Promise<Snapshot> {
    this.#mustBeOpen();
    return this.#takeSnapshot();
  }

  /**
   * Kills a whole job, and resolves when it is dead or the ladder went on.
   * @param victim `id` of a job
   * @throws ReprieveError ERR_REPRIEVE_CONDITION_CLOSED, ERR_REPRIEVE_TOO_LATE, ERR_REPRIEVE_NOT_A_VICTIM,
   * ERR_REPRIEVE_MAX_VICTIMS
   */
  async kill(victim: string | undefined, because = 'the caller chose it'): Promise<KillResult> {
    this.#mustBeTheirTurn();
    const snapshot = this.#takeSnapshot();
    const job = findVictim(snapshot, victim);
    if (typeof job === 'string') throw new ReprieveError('ERR_REPRIEVE_NOT_A_VICTIM', `Nothing was killed: ${job}`);
    if (!this.#isNeeded()) {
      throw new ReprieveError('ERR_REPRIEVE_TOO_LATE', `Nothing was killed: memory has come back to ${this.owner}`);
    }
    const { maxVictims } = this.#setup.options;
    if (this.#report.victims.length >= maxVictims) {
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

  /** Called once: from here to the first SIGKILL in one go, if the policy answers at once. */
  start(): void {
    const { hierarchy, options, readFaults } = this.#setup;
    readFaults(this.#faultsAtEvent);
    try {
      this.#decide();
    } catch (error) {
      this.#failed(error);
    }
    if (!this.open) return;
    this.#report.openedAt = new Date(Date.now() - (hierarchy.clock.nowUs() - this.#openedUs) / 1000).toISOString();
    const left = options.handleWithin - this.#sinceUs() / 1000;
    this.#after('handle', Math.max(0, left), () => {
      if (this.#setup.owner.oomState().underOom)
        this.#handOver(`the ${options.handleWithin} ms of handleWithin are over`);
      else this.#cleared();
    });
    this.#look();
  }

  /** The kernel signalled again. */
  onSignal(): void {
    if (this.open) this.#check();
  }

  /** The watch has ended: so does the condition, as it is; the end of the watch wakes the waiters. */
  release(outcome: 'released' | 'vanished'): void {
    if (!this.open) return;
    this.#step(outcome === 'released' ? 'the watch was closed' : 'the watched memcg was removed');
    this.#end(outcome);
  }

  #sinceUs(): number {
    return this.#setup.hierarchy.clock.nowUs() - this.#openedUs;
  }

  #step(text: string, atUs = this.#sinceUs()): void {
    this.#report.steps.push({ atUs, rung: this.#rungs[this.#rung]?.name ?? 'kernel', text });
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
    if (!this.open) return;
    if (isVanished(error) && !this.#ownerIsThere()) {
      this.#step('the memcg was removed');
      this.#end('vanished');
      return;
    }
    this.#step(`failed: ${messageOf(error)}`);
    if (this.#state !== 'kernel' && this.#state !== 'parked') this.#nextRung();
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
    const limit = owner.limit();
    const sampled =
      jobs.length === 1 && jobs[0] ? jobs[0].sample(this.#killed) : jobs.flatMap((group) => group.sample(this.#killed));
    return {
      version: 1,
      owner: owner.path,
      above: !armed,
      limit: Number.isFinite(limit) ? limit : null,
      usage: owner.usage(),
      sinceUs: this.#sinceUs(),
      victims: this.#report.victims.map(({ job }) => job),
      jobs: sampled,
    };
  }

  /** False while memory comes back by itself, or with a job that is dying: then nobody is to be asked. */
  #isNeeded(): boolean {
    const { owner, deathsNearby } = this.#setup;
    return owner.oomState().underOom && isAtLimit(owner) && !deathsNearby();
  }

  /** Asks the rung whose turn it is. */
  #decide(): void {
    this.#cancel('clear');
    if (!this.#isNeeded()) return this.#enter('acting', 'memory is coming back; waiting for that');
    this.#enter('deciding');
    const question = this.#nextQuestion();
    const rung = this.#rungs[this.#rung];
    if (rung === undefined || rung.decide === 'kernel') return this.#handOver('nothing else is left on the ladder');
    const { maxVictims, respondWithin } = this.#setup.options;
    if (this.#report.victims.length >= maxVictims) return this.#handOver(`${maxVictims} jobs have died (maxVictims)`);

    const answerIsLate = () => {
      this.#step(`no answer within ${respondWithin} ms`);
      this.#nextRung();
    };
    if (rung.decide === 'caller') {
      this.#after('respond', respondWithin, answerIsLate);
      if (!this.#delivered) {
        this.#delivered = true;
        this.#setup.deliver(this);
      }
      return;
    }
    const snapshot = this.#takeSnapshot();
    if (this.#report.snapshot === null) {
      this.#report.snapshot = snapshot;
      this.#report.timings.snapshotUs = this.#sinceUs();
    }
    let answer: Decision | PromiseLike<Decision>;
    try {
      answer = rung.decide(snapshot, this.#context());
    } catch (error) {
      this.#step(`threw: ${messageOf(error)}`);
      return this.#nextRung();
    }
    if (!isPromise(answer)) return this.#answer(answer, snapshot);
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

  /** Its signal is made when the policy asks for it: a quick one does not. */
  #context(): PolicyContext {
    const question = this.#question;
    const ask = () => {
      if (question !== this.#question) return AbortSignal.abort();
      this.#asked ??= new AbortController();
      return this.#asked.signal;
    };
    return {
      reserve: this.#setup.reserve,
      get signal() {
        return ask();
      },
    };
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

  #answer(decision: Decision, snapshot: Snapshot): void {
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
    this.#after('next', 0, () => this.#decide());
  }

  /** Carries a checked decision out; false if its job is gone by itself. */
  #carryOut(decision: Decision, snapshot: Snapshot | null, settled?: (result: KillResult) => void): boolean {
    this.#cancel('respond');
    this.#cancel('wait');
    let done = true;
    const atUs = this.#sinceUs();
    if (decision.action === 'kill') done = this.#kill(decision.victim, snapshot as Snapshot, settled ?? null, decision);
    const because = reasonOf(decision); // put into words only now: a victim is dying already
    this.#report.timings.decidedUs ??= atUs;
    this.#report.decisions.push({ ...withReason(decision, because), rung: this.#rungs[this.#rung]?.name ?? '', atUs });
    if (decision.action === 'wait') this.#wait(decision.ms, because);
    else if (decision.action === 'kernel') this.#handOver(because);
    return done;
  }

  #wait(ms: number, because: string): void {
    const left = this.#setup.options.clearWithin - this.#waitedMs;
    if (left <= 0) {
      this.#step(`has waited for ${this.#waitedMs} ms in all; no more (clearWithin)`);
      return this.#nextRung();
    }
    const granted = Math.min(ms, left);
    this.#waitedMs += granted;
    this.#enter('waiting', `waits for ${granted} ms: ${because}`);
    this.#after('wait', granted, () => this.#decide());
    this.#look();
  }

  #kill(id: string, snapshot: Snapshot, settled: Dying['settled'], decision: Decision): boolean {
    const { hierarchy, jobs, options } = this.#setup;
    const sampled = snapshot.jobs.find((candidate) => candidate.id === id) as Job;
    // Another job may have come to that path since the snapshot.
    const job = jobs.map((group) => group.find(id)).find((found) => found?.born === sampled.born);
    const killing = hierarchy.startKilling(() => this.onSignal());
    const targets: Memcg[] = [];
    let usageBefore = diesWith(sampled);
    let signalled = 0;
    if (job?.kind === 'process') {
      signalled = killing.signal(job.process);
    } else if (job !== undefined) {
      targets.push(job.memcg, ...openDescendants(job.memcg));
      usageBefore = job.memcg.usage();
      signalled = killing.round(targets);
    }
    const killedUs = this.#sinceUs();
    if (this.#report.timings.killedUs === null && signalled > 0) {
      this.#setup.readFaults(faultsAtKill);
      const [minor = 0, major = 0] = faultsAtKill.map((count, index) => count - (this.#faultsAtEvent[index] ?? 0));
      this.#report.faults = { minor, major };
      this.#report.timings.killedUs = killedUs;
    }
    if (job === undefined) {
      killing.close();
      this.#enter('acting', `job ${sampled.name} is gone by itself`);
      this.#look();
      return false;
    }
    this.#killed.add(identityOf(job));
    const record: Victim = {
      job: job.id,
      name: job.name,
      rung: this.#rungs[this.#rung]?.name ?? 'kernel',
      because: '',
      pids: [],
      killedUs,
      deadUs: null,
      freed: null,
      left: null,
    };
    this.#report.victims.push(record);
    this.#dying.push({ killing, job, targets, usageBefore, record, settled, helped: false });
    this.#enter('acting');
    this.#after('clear', options.clearWithin, () => {
      const stuck = this.#dying.map((other) => other.job.name).join(', ');
      if (!this.#setup.owner.oomState().underOom) return this.#cleared();
      this.#step(`${stuck ? `${stuck} is not all dead` : 'not cleared'} after ${options.clearWithin} ms (clearWithin)`);
      this.#settle(false);
      this.#nextRung();
    });
    record.because = reasonOf(decision);
    this.#step(`kills ${job.name} (${count(signalled)}): ${record.because}`, killedUs);
    this.#noteWaiters();
    this.#look();
    return true;
  }

  /** Resolves what a caller waits for. */
  #settle(dead: boolean): void {
    for (const dying of this.#dying) {
      dying.settled?.({ job: dying.job.id, processes: dying.record.pids.length, dead, freed: dying.record.freed });
      dying.settled = null;
    }
  }

  /** Who waits: seen after the first action, or while an answer is awaited, as that may take long. */
  #noteWaiters(): void {
    if (this.#report.waiters.length > 0) return;
    const { hierarchy, jobs, owner } = this.#setup;
    const note = (job: string, memcg: Memcg) => {
      const left = MOST_WAITERS - this.#report.waiters.length;
      for (const waiter of hierarchy.listWaiters(memcg, left)) this.#report.waiters.push({ job, ...waiter });
    };
    try {
      note(owner.path, owner);
      for (const job of jobs.flatMap((group) => group.live())) {
        if (job.kind !== 'memcg') continue;
        const below = openDescendants(job.memcg);
        for (const memcg of [job.memcg, ...below]) note(job.name, memcg);
        for (const memcg of below) memcg.close();
      }
    } catch (error) {
      if (!isVanished(error)) throw error; // only for the report; the next look finds out
    }
  }

  // --- Looking at the state ---

  /** Looks again: soon after the state changed, more seldom later. Signals and exits look at once. */
  #look(): void {
    const age = this.#setup.hierarchy.clock.nowUs() - this.#stateSinceUs;
    this.#after('look', Math.min(LONGEST_LOOK_MS, Math.max(1, age / 8000)), () => this.#check());
  }

  #check(): void {
    try {
      this.#checkDeaths();
      this.#checkState();
    } catch (error) {
      this.#failed(error);
    }
  }

  #checkDeaths(): void {
    const { clock } = this.#setup.hierarchy;
    for (const dying of [...this.#dying]) {
      const { killing, job, record } = dying;
      let signalled = 0;
      const stop = clock.nowUs() + ROUNDS_US;
      if (job.kind === 'memcg') {
        do {
          closeAll(dying.targets.splice(1));
          dying.targets.push(...openDescendants(job.memcg));
          signalled = killing.round(dying.targets);
        } while (signalled > 0 && clock.nowUs() < stop);
      }
      if (signalled > 0) {
        this.#after('rounds', 0, () => this.#check()); // it forks: go on at once, but let others have a turn
        continue;
      }
      if (killing.alive() > 0 || killing.unreachable > 0) {
        if (!dying.helped && this.#sinceUs() - record.killedUs > SLOW_DEATH_US) {
          dying.helped = true;
          const [reaped] = killing.release();
          if (reaped > 0) this.#step(`${job.name} is slow to die: its memory was reaped (process_mrelease)`);
        }
        continue;
      }
      this.#dead(dying);
    }
  }

  #dead(dying: Dying): void {
    const { job, killing, record, usageBefore } = dying;
    this.#dying = this.#dying.filter((other) => other !== dying);
    record.pids = [...killing.pids];
    record.deadUs = this.#sinceUs();
    record.left = leftOf(job);
    record.freed = Math.max(0, usageBefore - (record.left ?? 0));
    this.#report.timings.deadUs = record.deadUs;
    this.#lastDeathUs = this.#setup.hierarchy.clock.nowUs();
    const back = formatBytes(record.freed);
    const { left } = record;
    const stays =
      left !== null && left >= WORTH_SAYING ? `; ${formatBytes(left)} stay charged (tmpfs or page cache)` : '';
    this.#step(
      record.freed < (left ?? 0) / 2
        ? `${job.name} is dead, but its death brought back only ${back}${stays}`
        : `${job.name} is dead: ${back} came back${stays}`,
      record.deadUs,
    );
    dying.settled?.({ job: job.id, processes: record.pids.length, dead: true, freed: record.freed });
    killing.close();
    closeAll(dying.targets.splice(1));
  }

  #checkState(): void {
    if (!this.open) return;
    const { owner, hierarchy } = this.#setup;
    const now = hierarchy.clock.nowUs();
    if (!owner.oomState().underOom) {
      this.#quietSinceUs ??= now;
      const quietUs = now - this.#quietSinceUs;
      const clearUs = this.#setup.options.clearWithin * 1000;
      if (quietUs < SETTLE_US) return this.#look();
      // A victim that never dies does not keep a condition open in which nobody waits.
      if (this.#dying.some(({ record }) => this.#sinceUs() - record.killedUs < clearUs)) return this.#look();
      // The kernel's victim gives its memory back before it is gone.
      if (this.#state === 'kernel' && quietUs < GONE_US && this.#kernelVictims().length === 0) {
        return this.#look();
      }
      return this.#cleared();
    }
    this.#quietSinceUs = null;
    this.#pokeLost(now);
    switch (this.#state) {
      case 'deciding':
        if (now - this.#stateSinceUs > LOST_US) this.#noteWaiters();
        break;
      case 'acting':
        if (!this.dying && now - (this.#lastDeathUs ?? this.#stateSinceUs) > GRACE_US && this.#isNeeded())
          this.#decide();
        break;
      case 'parked':
        if (this.#killableTasks(false)) this.#handOver('there is a task again that the kernel can kill');
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
    if (!armed || this.#state === 'parked' || (!handedOver && isAtLimit(owner))) {
      this.#roomSinceUs = null;
      return;
    }
    this.#roomSinceUs ??= now;
    if (now - this.#roomSinceUs < LOST_US) return;
    this.#roomSinceUs = now;
    owner.setKillDisabled(false);
    if (handedOver) return;
    owner.setKillDisabled(true);
    if (this.#report.pokes++ === 0) this.#step('a waiter slept on with memory there: it was woken');
  }

  #cleared(): void {
    const clearedUs = (this.#quietSinceUs ?? this.#setup.hierarchy.clock.nowUs()) - this.#openedUs;
    this.#report.timings.clearedUs = clearedUs;
    this.#step('nobody waits any more', clearedUs);
    this.#end(this.#state === 'kernel' ? 'kernel' : 'cleared');
  }

  // --- The last rung ---

  #handOver(why: string): void {
    if (this.#state === 'kernel' || this.#state === 'ended') return;
    const { owner, armed, preference, jobs, options } = this.#setup;
    for (const name of ['respond', 'clear', 'wait', 'next', 'handle']) this.#cancel(name);
    this.#nextQuestion();
    this.#settle(false);
    this.#rung = this.#rungs.length - 1;
    if (!armed) {
      this.#step(`${why}; ${owner.path} lies above what is watched and is left to its owner`);
      return this.#end('left');
    }
    preference.prepareHandOver(jobs, this.#killed, owner.limit());
    if (!this.#killableTasks(true)) return this.#killUnprotected(why);
    this.#noteWaiters();
    this.#pidsBeforeKernel = new Map(jobs.flatMap((group) => group.live().map((job) => [job.name, pidsOf(job)])));
    owner.setKillDisabled(false);
    this.#enter('kernel', `handed over to the kernel's own killer: ${why}`);
    this.#after('clear', options.clearWithin, () => {
      this.#step(`the kernel has not cleared it within ${options.clearWithin} ms; it keeps the memcg until it has`);
      this.#end('kernel');
    });
    this.#look();
  }

  /** True if the kernel's killer finds a task that it may take (oom_score_adj above -1000). */
  #killableTasks(note: boolean): boolean {
    const { hierarchy, owner } = this.#setup;
    const below = openDescendants(owner);
    try {
      for (const memcg of [owner, ...below]) {
        for (const pid of pidsIn(memcg)) {
          const process = hierarchy.openProcess(pid);
          if (process === null) continue;
          try {
            if (process.scoreAdj() > NEVER) return true;
          } catch (error) {
            if (!isVanished(error)) throw error;
          } finally {
            process.close();
          }
        }
      }
    } finally {
      closeAll(below);
    }
    if (note) this.#step('the kernel could kill nothing here: every task has oom_score_adj -1000');
    return false;
  }

  /** With nothing for the kernel to kill, a task that waits would spin for ever: a job dies by signal, or an alarm. */
  #killUnprotected(why: string): void {
    const { jobs, options, alarm } = this.#setup;
    const snapshot = this.#takeSnapshot();
    const peopled = new Set(
      jobs.flatMap((group) => group.live()).flatMap((job) => (pidsOf(job).length > 0 ? [job.id] : [])),
    );
    const eligible = snapshot.jobs
      .filter((job) => !job.protected && !job.killed && peopled.has(job.id))
      .sort(compareJobs);
    const [victim] = eligible;
    if (victim !== undefined && this.#report.victims.length < options.maxVictims) {
      const because = 'the kernel can kill no task here';
      this.#kill(victim.id, snapshot, null, { action: 'kill', victim: victim.id, because });
      return;
    }
    if (this.#state !== 'parked') {
      const message = `${this.owner} stays parked: no task can be killed by the kernel and no job may be killed (${why})`;
      this.#enter('parked', message);
      alarm(message);
    }
    this.#look();
  }

  #end(outcome: Outcome): void {
    if (this.#state === 'ended') return;
    this.#settle(false);
    this.#enter('ended');
    for (const cancel of this.#timers.values()) cancel();
    this.#timers.clear();
    this.#nextQuestion();
    for (const { killing, record, targets } of this.#dying) {
      record.pids = [...killing.pids];
      killing.close();
      closeAll(targets.splice(1));
    }
    this.#dying = [];
    const report = this.#report;
    report.reserve = this.#setup.reserve.counters();
    report.steps.sort((a, b) => a.atUs - b.atUs);
    this.#setup.reserve.close();
    report.outcome = outcome;
    report.timings.endedUs = this.#sinceUs();
    report.openedAt ||= new Date().toISOString();
    if (report.snapshot !== null) report.explanation = explain(report.snapshot);
    this.#report.kernelVictims = outcome === 'vanished' ? [] : this.#kernelVictims();
    for (const { job, pids } of this.#report.kernelVictims)
      this.#step(`the kernel killed ${count(pids.length)} of ${job}`);
    this.#setup.ended(this, report);
    this.#abort?.abort();
    this.#closed.resolve(report);
  }

  /** Processes that are gone since the hand-over, by job. */
  #kernelVictims(): { job: string; pids: number[] }[] {
    const live = this.#setup.jobs.flatMap((group) => group.live());
    return [...(this.#pidsBeforeKernel ?? [])].flatMap(([job, before]) => {
      const after = new Set(live.filter(({ name }) => name === job).flatMap(pidsOf));
      const pids = before.filter((pid) => !after.has(pid));
      return pids.length > 0 ? [{ job, pids }] : [];
    });
  }
}

/** The reason that a policy gives; it may be a getter of the policy's own. */
function reasonOf(decision: Decision): string {
  try {
    return String(decision.because ?? 'no reason was given');
  } catch (error) {
    return `the reason could not be read: ${messageOf(error)}`;
  }
}

function withReason(decision: Decision, because: string): Decision {
  switch (decision.action) {
    case 'kill':
      return { action: 'kill', victim: decision.victim, because };
    case 'wait':
      return { action: 'wait', ms: decision.ms, because };
    default:
      return { action: 'kernel', because };
  }
}

function count(processes: number): string {
  return processes === 1 ? '1 process' : `${processes} processes`;
}

function isPromise<T>(value: T | PromiseLike<T>): value is PromiseLike<T> {
  return typeof (value as PromiseLike<T> | null)?.then === 'function';
}

function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

/** What is still charged to a dead job; null for a process, or if the memcg is gone. */
function leftOf(job: LiveJob): number | null {
  if (job.kind === 'process') return null;
  try {
    return job.memcg.usage();
  } catch (error) {
    if (isVanished(error)) return null;
    throw error;
  }
}
