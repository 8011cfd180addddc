// One episode: jobs in a memcg, a handler that watches it, a leak, and faults at their moments; then calm, the end, and
// the judgement.
import { setTimeout as sleep } from 'node:timers/promises';
import { BOUND_MS, CLOSE_MS, DEADLINES, GUARD, NEXT_START_MS, REPLACED_MS } from './bounds.mjs';
import { Child } from './child.mjs';
import { FAULTS } from './faults.mjs';
import { jobProcesses, judge } from './judge.mjs';
import { nowUs, Stage } from './stage.mjs';
import { Subject, signalTo } from './subject.mjs';

/** A handler that is not ready by then is not waited for: the leak starts. */
const READY_MS = 1500;
/** Nothing happened for so long: the leaks are dead, and nobody is held. */
const CALM_US = 100_000;
const STEP_MS = 5;
/** A handler in an endless loop is given so long, and then ended. */
const HUNG_MS = 300;
/** Faults after which the handler does not go on. */
const FINAL = /^(handler-(?!stop)|both-)/;

/**
 * @param tools `{ points, workload, observer, folder, log, guardPath, guarded, environment }`
 * @returns `{ outcome, violations, longestMs, injected, … }`
 */
export async function playEpisode(scenario, tools, signal) {
  const episode = new Episode(scenario, tools, signal);
  try {
    return await episode.play();
  } finally {
    await episode.close();
  }
}

class Episode {
  handler = null;
  observer = null;
  #tools;
  #signal;
  #anchors = new Map();
  #timers = [];
  #injections = [];
  #account = null;
  #heldSince = null;
  #holds = [];
  #lastEventUs = 0;
  /** When who could not act any more, and since when he can again; microseconds. */
  #handlerOutUs = null;
  /** The first time, even if it went on later. */
  #firstOutUs = null;
  #guardOut = null;
  /** The policy does not return, or nothing comes of what it answers. */
  #hangs = false;
  #guardStop = null;
  #stopped = 0;
  #next = null;
  #violations = [];
  #notes = [];
  /** When somebody came who can act, where nobody could. */
  #help = null;

  constructor(scenario, tools, signal) {
    this.scenario = scenario;
    this.stage = new Stage(scenario, tools);
    this.#tools = tools;
    this.#signal = signal;
  }

  async play() {
    const { stage, scenario } = this;
    await stage.open();
    this.#tools.log.kills();
    await this.#observe();
    for (const fault of scenario.faults) this.#schedule(fault);
    await this.#reached('start');
    const startUs = nowUs();
    this.handler = this.#start({
      path: stage.path,
      limit: scenario.limit,
      policy: scenario.policy,
      jobs: Object.fromEntries(
        [...scenario.jobs, scenario.late].map((job) => [
          job.name,
          { priority: job.priority, protected: job.protected ?? false },
        ]),
      ),
    });
    this.#reached('spawned');
    stage.go(false);
    await this.#until(() => this.#isReadyToLeak(), READY_MS);
    this.#reached('leak');
    stage.go(true);
    await this.#calm();
    const closedUs = nowUs();
    await this.#end(closedUs);
    await this.#look();
    const result = {
      startUs,
      closedUs,
      account: this.#account,
      kills: this.#tools.log.kills(),
      help: this.#help,
      holds: this.#holds,
      handlerOutUs: this.#firstOutUs,
      guardOut: this.#guardOut,
      notes: this.#notes,
    };
    return judge({
      ...result,
      episode: this,
      violations: this.#violations,
      injections: this.#injections,
      next: this.#next,
    });
  }

  #isReadyToLeak() {
    if (this.handler.ended !== null) return true;
    return this.handler.all(this.scenario.leaksAt).length > 0;
  }

  #start(options) {
    const { guarded, guardPath, environment } = this.#tools;
    const guard = guarded
      ? { ...GUARD, killHandler: this.scenario.killHandler, ...(guardPath === null ? {} : { path: guardPath }) }
      : false;
    return new Subject(
      { deadlines: DEADLINES, guard, stateDirectory: this.stage.state, ...options },
      this.stage.handlerGroup,
      {
        environment,
        timeNamespace: this.scenario.scenes.includes('time namespace') && options.path !== undefined,
        onSay: (told) => {
          // Its clock is another one there.
          if (this.scenario.scenes.includes('time namespace')) told.atUs = nowUs();
          this.#hear(told);
        },
      },
    );
  }

  #hear({ event, atUs }) {
    this.#lastEventUs = nowUs();
    if (event === 'policy' && ['busy', 'stuck'].includes(this.scenario.policy.hazard)) {
      this.#hangs = true;
      this.#noteOut(atUs);
    }
    if (event === 'guard' && this.#guardOut !== null) {
      this.#guardOut.backUs ??= atUs;
      this.#guardOut.replacedUs ??= atUs;
      this.#endGuardStop();
    }
    if (['opened', 'ready', 'policy', 'window'].includes(event)) this.#reached(event);
  }

  // --- Looking on ---

  async #observe() {
    let ready;
    const isReady = new Promise((resolve) => (ready = resolve));
    this.observer = new Child(this.#tools.observer, [this.stage.memcg, 'frozen'], {
      detached: true,
      onLine: (line) => {
        const told = JSON.parse(line);
        if (told.event === 'ready') return ready();
        if (told.event === 'account') this.#account = told;
        this.#lastEventUs = nowUs();
        if (told.event === 'held') this.#heldSince = told.atUs;
        if (told.event === 'free') {
          this.#holds.push({ fromUs: this.#heldSince ?? told.atUs, toUs: told.atUs });
          this.#heldSince = null;
        }
        if (told.event === 'held' || told.event === 'gone') this.#reached(told.event);
      },
    });
    await Promise.race([isReady, this.observer.gone]);
    if (this.observer.ended !== null) throw new Error(`no observer: ${this.observer.complaints}`);
  }

  async #look() {
    this.#account = null;
    this.observer.say('account');
    await this.#until(() => this.#account !== null, 5_000);
    if (this.#account === null) throw new Error('the observer does not answer');
  }

  async #until(check, ms) {
    const end = performance.now() + ms;
    while (!check() && performance.now() < end) {
      this.#signal.throwIfAborted();
      this.#tools.log.read();
      await sleep(STEP_MS);
    }
    return check();
  }

  // --- Faults ---

  #schedule(fault) {
    const { anchor } = fault;
    if (anchor === undefined) return;
    const list = this.#anchors.get(anchor) ?? [];
    this.#anchors.set(anchor, [...list, fault]);
  }

  /** Injects what follows this moment; the first time only. */
  async #reached(anchor) {
    const faults = this.#anchors.get(anchor) ?? [];
    this.#anchors.delete(anchor);
    for (const fault of faults) {
      if (anchor === 'start') await this.#inject(fault);
      else this.#timers.push(setTimeout(() => this.#inject(fault), fault.delayMs));
    }
  }

  async #inject({ name, parameters }) {
    const { of, inject } = FAULTS[name];
    const injection = { name, atUs: nowUs(), failed: null, held: this.#heldSince !== null };
    this.#injections.push(injection);
    this.#lastEventUs = injection.atUs;
    const guardThere = this.handler !== null && this.handler.guards().length > 0;
    if (of === 'handler' && this.handler.ended !== null) injection.failed = 'it had ended';
    if ((of === 'handler' || of === 'both') && this.handler.ended === null) this.#noteOut(injection.atUs);
    if ((of === 'guard' || of === 'both') && guardThere) {
      const signal = name === 'guard-stop' ? 'SIGSTOP' : 'SIGKILL';
      this.#guardOut = { fromUs: injection.atUs, backUs: null, signal };
    }
    try {
      if ((await inject(this, parameters)) === false) injection.failed = 'there was nobody';
    } catch (error) {
      injection.failed = error.message;
    }
  }

  #noteOut(atUs) {
    this.#handlerOutUs ??= atUs;
    this.#firstOutUs ??= atUs;
  }

  stop(process, goesOnAfterMs) {
    process.kill('SIGSTOP');
    this.#stopped++;
    this.#later(goesOnAfterMs, () => {
      process.kill('SIGCONT');
      this.#stopped--;
      if (this.#injections.some(({ name }) => FINAL.test(name))) return;
      if (this.#isNobodyThere()) this.#noteHelp('goes on', BOUND_MS);
      if (!this.#hangs) this.#handlerOutUs = null;
    });
  }

  stopGuard(goesOnAfterMs) {
    const stopped = this.handler.guards();
    if (stopped.length === 0) return false;
    for (const pid of stopped) signalTo(pid, 'SIGSTOP');
    this.#stopped++;
    this.#guardStop = { pids: stopped, forGood: goesOnAfterMs > REPLACED_MS.SIGSTOP };
    this.#later(goesOnAfterMs, () => {
      if (this.#guardStop === null) return;
      const there = this.handler.guards();
      for (const pid of stopped.filter((pid) => there.includes(pid))) signalTo(pid, 'SIGCONT');
      if (this.#isNobodyThere()) this.#noteHelp('goes on', BOUND_MS);
      if (this.#guardOut !== null) this.#guardOut.backUs ??= nowUs();
      this.#endGuardStop();
    });
    return true;
  }

  /** One that was stopped was ended by the next start. */
  #forgetDeadGuard() {
    if (this.#guardStop === null) return;
    const there = this.handler.guards();
    if (!this.#guardStop.pids.some((pid) => there.includes(pid))) this.#endGuardStop();
  }

  /** It goes on, or was replaced. */
  #endGuardStop() {
    if (this.#guardStop === null) return;
    this.#guardStop = null;
    this.#stopped--;
  }

  #later(ms, run) {
    this.#timers.push(setTimeout(run, ms));
  }

  /** Handler and guard were both put out of action. */
  #isNobodyThere() {
    const { handler } = this;
    if (this.#handlerOutUs === null || this.#guardOut === null) return false;
    const { fromUs, backUs, signal } = this.#guardOut;
    if (backUs !== null && backUs < this.#handlerOutUs) return false; // it was replaced before
    if (this.#handlerOutUs - fromUs > REPLACED_MS[signal] * 1000) return false; // or should have been
    return fromUs < this.#handlerOutUs || handler.guards().length === 0 || backUs === null;
  }

  #noteHelp(what, withinMs) {
    this.#help = { what, atUs: nowUs(), withinMs };
  }

  // --- To the end ---

  /** Waits until the leaks are dead and nobody is held; or for longer than anything may take. */
  async #calm() {
    const most = BOUND_MS + NEXT_START_MS + 1_000 + (this.#faultMs ?? 0);
    const end = performance.now() + most;
    const calm = await this.#until(() => {
      const quietUs = nowUs() - this.#lastEventUs;
      this.#forgetDeadGuard();
      // A guard that was stopped for good is no help: it is for the next start to see that.
      const alone = this.#guardStop?.forGood && (this.#hangs || this.handler.ended !== null);
      const stopped = alone ? 0 : this.#stopped;
      const awaited = this.#heldSince !== null || alone;
      if (this.#isNobodyThere() && stopped === 0 && this.#next === null && awaited) this.#startNext();
      const leaking = [...this.stage.jobs.values()].some(({ kind, child }) => kind === 'leak' && child.ended === null);
      return !leaking && this.#heldSince === null && this.#stopped === 0 && quietUs > CALM_US;
    }, end - performance.now());
    // A leak that gets little of the processor may go on: nobody waits for it.
    if (!calm && this.#heldSince !== null) this.#violations.push(`it is not over after ${most} ms`);
  }

  /** A guard that was stopped for good is waited for, until it is replaced. */
  get #faultMs() {
    const stop = this.scenario.faults.find(({ name }) => name === 'guard-stop');
    return stop === undefined ? 0 : Math.min(stop.parameters.goesOnAfterMs, REPLACED_MS.SIGSTOP);
  }

  /** As a supervisor does: what hangs is killed, and a new one started. */
  #startNext() {
    this.handler.kill('SIGKILL');
    this.handlerWasEnded = true;
    this.#noteHelp('next start', NEXT_START_MS);
    this.#next = this.#start({});
    return this.#next;
  }

  async #end(closedUs) {
    const { handler } = this;
    this.#reached('closing');
    if (handler.ended === null) handler.say('close');
    handler.endInput();
    const spins = this.#handlerOutUs !== null && this.#stopped === 0;
    await this.#until(() => handler.ended !== null && this.#stopped === 0, spins ? HUNG_MS : CLOSE_MS);
    if (handler.ended === null) {
      const hangs = this.#handlerOutUs !== null;
      if (!hangs) this.#violations.push(`the handler did not close within ${CLOSE_MS} ms`);
      handler.kill('SIGKILL');
      handler.kill('SIGCONT');
      await handler.gone;
      this.handlerWasEnded = true;
    }
    for (const timer of this.#timers) clearTimeout(timer); // what did not happen so far does not happen
    if (this.#next !== null) await this.#until(() => this.#next.ended !== null, CLOSE_MS);
    await this.#until(() => handler.processes().length === 0, CLOSE_MS);
    const left = handler.processes();
    if (left.length > 0) this.#violations.push(`processes left: ${left.join(', ')}`);
    for (const pid of left) {
      signalTo(pid, 'SIGKILL');
      signalTo(pid, 'SIGCONT');
    }
    this.observer.say('clock back');
    await this.#judgeBefore(closedUs);
    await this.#putInOrder();
  }

  /** What was put back without a next start, and a guard that should have been replaced. */
  async #judgeBefore(closedUs) {
    const { stage, handler } = this;
    if (this.#isNobodyThere()) return;
    await this.#look();
    const living = jobProcesses(this.#account, stage).filter(({ goneUs, job }) => goneUs === 0 && job !== null);
    const wrong = [...stage.changedFiles(), ...stage.changedScores(living), ...stage.strayed(living)];
    this.#violations.push(...wrong.map((what) => `${what}, before the next start`));
    if (this.#guardOut === null || this.#guardOut.backUs !== null) return;
    const { fromUs, signal } = this.#guardOut;
    const watches = handler.all('ready').length > 0 && handler.all('vanished').length === 0;
    const aloneMs = (Math.min(this.#firstOutUs ?? Infinity, closedUs) - fromUs) / 1000;
    if (watches && aloneMs > REPLACED_MS[signal]) {
      this.#violations.push(`the guard got ${signal} and was not replaced within ${Math.round(aloneMs)} ms`);
    }
  }

  /**
   * What nobody could put back is for the next start: where both were out of action, where the handler outlived its guard
   * and was ended then, where it died before it had one, and where the folder for the state was not to be written to.
   */
  async #putInOrder() {
    const left = () => [...this.stage.leftFiles(), ...this.#madeGroups()];
    if (left().length === 0) return;
    const { handler, stage, scenario } = this;
    // One that lived when its guard had done all else is left in its memcg, and with its directory.
    const outlived = /^reason (silent|overdue)$/m.test(stage.records().join('\n'));
    const excused =
      this.#isNobodyThere() || outlived || handler.all('opened').length === 0 || scenario.scenes.includes('mount');
    if (!excused) this.#violations.push(`left: ${left().join(', ')}`);
    stage.healState();
    if (this.#next === null) {
      this.#next = this.#start({});
      await this.#until(() => this.#next.ended !== null, CLOSE_MS);
      this.#next.kill('SIGKILL');
      await this.#next.gone;
    }
    if (left().length > 0) this.#violations.push(`left after the next start: ${left().join(', ')}`);
  }

  #madeGroups() {
    return this.stage.madeGroups([this.handler, this.#next].filter(Boolean).map(({ pid }) => pid));
  }

  async close() {
    for (const timer of this.#timers) clearTimeout(timer);
    this.observer?.endInput();
    for (const subject of [this.handler, this.#next].filter(Boolean)) {
      subject.kill('SIGKILL');
      subject.kill('SIGCONT');
    }
    await this.stage.close();
    for (const child of [this.observer, this.handler, this.#next].filter(Boolean)) {
      await Promise.race([child.gone, sleep(2_000, undefined, { ref: false })]);
      child.release();
    }
  }
}
