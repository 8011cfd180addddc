import { type ChildProcess, spawn } from 'node:child_process';
import { getSystemErrorName } from 'node:util';
import type { Memcg } from '../cgroup/cgroup.js';
import { directoryOf, isOpen, pidfdOf, type RealHierarchy } from '../cgroup/real.js';
import { ReprieveError, type SystemError } from '../errors.js';
import { type Channel, type Directory, guardPath, type Pidfd } from '../native.js';
import { identityOf, type LiveJob, type TreeJob } from '../snapshot/jobs.js';
import type { Job } from '../snapshot/snapshot.js';
import { type Bound, boundOf } from './bound.js';
import type { SharedEpoch } from './epoch.js';
import type { Guard, GuardedDeadlines, GuardedScope } from './guard.js';
import type { Instance } from './instance.js';
import { DEFAULT_GUARD, type GuardOptions } from './options.js';
import {
  decodeReply,
  encodeMessage,
  encodePath,
  encodePlan,
  MOST_PLANNED,
  PROTOCOL_VERSION,
  type Reply,
} from './protocol.js';

/** A guard that died was replaced. */
export interface GuardReplaced {
  /** Of the new one. */
  pid: number;
  /** From the moment its death was seen until the new one guarded everything, in milliseconds. */
  unguardedMs: number;
}

/** What becomes of the guard, told to the handler. */
interface GuardEvents {
  replaced: (event: GuardReplaced) => void;
  /** It died and another could not be started: nothing may stay armed. */
  lost: (error: ReprieveError) => void;
  /** It cannot guard that memcg. */
  failed: (inode: number, error: ReprieveError) => void;
}

/** The guard starts within this time, or something is wrong. */
const START_MS = 5_000;
/** A guard that does not answer for this long is stopped or hangs: it is replaced. */
const STUCK_MS = 1_500;
const ASK_AGAIN_MS = 200;
/** So often another one is started in the place of one that died. */
const MOST_STARTS = 3;
/** It ends within this time when it is told to. */
const END_MS = 2_000;
/** How long a message that must not be lost is tried to be sent to a guard that is busy. */
const SEND_MS = 200;

const FAILURES = [
  '',
  'bad message',
  'not a memcg',
  'opening its files',
  'registering for its signals',
  'too many memcgs',
];
const REASONS = ['', 'it died', 'it was silent for too long', 'a condition was open for too long'];

/** The guard works on memcgs alone: a tree is nothing that it could be told of. */
type PlannedJob = Exclude<LiveJob, TreeJob>;

interface Guarded {
  scope: GuardedScope;
  /** Null where nobody parks: then there is nothing but what was changed. */
  memcg: Memcg | null;
  original: boolean;
  deadlines: GuardedDeadlines;
  /** The job that was killed last comes first, whatever the plan says. */
  killed: PlannedJob | null;
  plan: readonly PlannedJob[];
  /** All that were in the plan, beyond those that it has room for: when they were born, by id. */
  told: ReadonlyMap<string, number>;
  open: boolean;
  parked: boolean;
  /** Something of this found no room: it is said again. */
  missed: boolean;
}

interface Waiting {
  seq: number;
  resolve: () => void;
  reject: (error: ReprieveError) => void;
}

/** The guard's process, from the handler's side. */
export class GuardProcess implements Guard {
  readonly #hierarchy: RealHierarchy;
  readonly #instance: Instance;
  readonly #epoch: SharedEpoch;
  readonly #options: Required<Omit<GuardOptions, 'path'>> & { path: string };
  readonly #startOutside: (start: () => ChildProcess) => ChildProcess;
  readonly #guarded = new Map<number, Guarded>();
  events: GuardEvents = { replaced() {}, lost() {}, failed() {} };
  #child: ChildProcess | null = null;
  #channel: Channel | null = null;
  #ready: Waiting | null = null;
  #barriers: Waiting[] = [];
  #seq = 0;
  #askedAt: number | null = null;
  #ended = false;
  /** How much longer than usual it may take to end. */
  #patienceMs = 0;
  #replaced = 0;
  /** Why it took over, once it has. */
  takenOver: string | null = null;
  /** Why there is none any more. */
  #lost: ReprieveError | null = null;
  #starting: Promise<void> | null = null;

  /** @param startOutside starts a program where no watched memcg's limit reaches */
  constructor(
    hierarchy: RealHierarchy,
    instance: Instance,
    epoch: SharedEpoch,
    options: GuardOptions,
    startOutside: (start: () => ChildProcess) => ChildProcess,
  ) {
    this.#startOutside = startOutside;
    this.#hierarchy = hierarchy;
    this.#instance = instance;
    this.#epoch = epoch;
    this.#options = { ...DEFAULT_GUARD, path: guardPath(), ...options };
  }

  get pid(): number | undefined {
    return this.#child?.pid;
  }

  /** The longest that a task waits in a watch with these deadlines. */
  boundOf(deadlines: GuardedDeadlines): Bound {
    return boundOf(deadlines, this.#options);
  }

  /** How often one that died was replaced. */
  get replaced(): number {
    return this.#replaced;
  }

  /** Before something is armed: one that was lost is started once more. @throws ReprieveError ERR_REPRIEVE_GUARD */
  async mustBeThere(): Promise<void> {
    if (this.#lost === null) return;
    this.#starting ??= this.start()
      .then(() => {
        this.#lost = null;
      })
      .finally(() => {
        this.#starting = null;
      });
    await this.#starting;
  }

  /** Starts it, and resolves when it guards. @throws ReprieveError ERR_REPRIEVE_GUARD */
  async start(): Promise<void> {
    const { path, within, silence, killHandler } = this.#options;
    const fail = (why: string, cause?: unknown) =>
      new ReprieveError('ERR_REPRIEVE_GUARD', `The guard ${path} did not start: ${why}`, cause);
    const channel = this.#hierarchy.openChannel(() => this.#receive());
    this.#channel = channel;
    const { directory, base, name } = this.#instance;
    const descriptors = [channel.peer, this.#epoch.words.descriptor, directory.descriptor, base.descriptor];
    let child: ChildProcess;
    try {
      child = this.#startOutside(() =>
        spawn(path, ['watch', String(within), String(silence), killHandler ? '1' : '0', name], {
          stdio: ['ignore', 'ignore', 'ignore', ...descriptors],
          cwd: '/',
          env: {},
          // A session of its own: what the terminal sends to the handler's group is not meant for it.
          detached: true,
        }),
      );
    } catch (error) {
      this.#closeChannel();
      throw fail((error as Error).message, error);
    }
    this.#child = child;
    channel.closePeer();
    let timer: NodeJS.Timeout | undefined;
    try {
      await new Promise<void>((resolve, reject) => {
        this.#ready = { seq: 0, resolve, reject };
        child.once('error', (error) => reject(fail(error.message, error)));
        child.once('exit', (code, signal) => reject(fail(`it ended with ${signal ?? `code ${code}`}`)));
        timer = setTimeout(() => reject(fail(`no word of it within ${START_MS} ms`)), START_MS);
        for (const guarded of this.#guarded.values()) this.#tellAll(guarded);
      });
    } catch (error) {
      child.kill('SIGKILL');
      if (this.#channel === channel) this.#closeChannel();
      throw error;
    } finally {
      clearTimeout(timer);
      this.#ready = null;
      child.removeAllListeners();
      child.on('error', () => {}); // a kill that comes too late
    }
    this.#noteChild(child.pid ?? 0);
    child.once('exit', () => this.#died());
    if (child.exitCode !== null || child.signalCode !== null) this.#died();
    child.unref();
  }

  #noteChild(pid: number): void {
    try {
      this.#instance.noteGuard(pid);
    } catch {
      // it has died again, or the file system is read-only by now: only a guard that is stopped is looked for there
    }
  }

  /** It died without having taken over: another takes its place. */
  #died(): void {
    this.#receive();
    this.#closeChannel();
    if (this.#epoch.revoked) return this.#epoch.tell(); // it may have died before it could
    if (this.#ended) return;
    this.#askedAt = null;
    void this.#replace(performance.now(), MOST_STARTS);
  }

  async #replace(seenAt: number, starts: number): Promise<void> {
    try {
      await this.start();
    } catch (error) {
      if (this.#ended || this.#epoch.revoked) return;
      if (starts > 1) return this.#replace(seenAt, starts - 1); // whatever killed the one before has met this one too
      this.#lost = error as ReprieveError;
      this.#rejectBarriers(this.#lost);
      return this.events.lost(this.#lost);
    }
    this.#replaced++;
    this.#send('heartbeat'); // for whoever waits until everything is taken in
    this.events.replaced({ pid: this.pid ?? 0, unguardedMs: performance.now() - seenAt });
  }

  // --- What it is told ---

  arm(memcg: Memcg, original: boolean, deadlines: GuardedDeadlines): void {
    this.#guard(memcg, memcg, original, deadlines);
  }

  tend(scope: GuardedScope, deadlines: GuardedDeadlines): void {
    this.#guard(scope, null, false, deadlines);
  }

  #guard(scope: GuardedScope, memcg: Memcg | null, original: boolean, deadlines: GuardedDeadlines): void {
    const nothing = { killed: null, plan: [], told: new Map(), open: false, parked: false, missed: false };
    const guarded: Guarded = { scope, memcg, original, deadlines, ...nothing };
    this.#guarded.set(scope.inode, guarded);
    this.#tellGuarded(guarded);
  }

  disarm(scope: GuardedScope): void {
    if (this.#guarded.delete(scope.inode)) this.#send('disarm', scope, {}, [], SEND_MS);
  }

  plan(memcg: Memcg, all: readonly LiveJob[]): void {
    const guarded = this.#guarded.get(memcg.inode);
    if (guarded === undefined) return;
    const jobs = all.filter((job) => job.kind !== 'tree');
    const { plan } = guarded;
    if (plan.length === jobs.length && plan.every((planned, index) => samePlanned(planned, jobs[index]))) return;
    guarded.plan = jobs.map((job) => ({ ...job })); // its settings may be others later
    guarded.told = new Map(jobs.map(({ id, born }) => [id, born]));
    this.#tellPlan(guarded);
  }

  /** On the way to a kill: nothing is made here. */
  lacks(memcg: Memcg, jobs: readonly Job[]): boolean {
    const told = this.#guarded.get(memcg.inode)?.told;
    return (
      told !== undefined && jobs.some((job) => job.kind !== 'tree' && !job.protected && told.get(job.id) !== job.born)
    );
  }

  killed(memcg: Memcg, job: LiveJob): void {
    const guarded = this.#guarded.get(memcg.inode);
    if (guarded === undefined || job.kind === 'tree') return;
    guarded.killed = job;
    this.#tellPlan(guarded);
  }

  opened(scope: GuardedScope): void {
    this.#note(scope, { open: true, parked: false });
  }

  parked(scope: GuardedScope): void {
    this.#note(scope, { open: true, parked: true });
  }

  resolved(scope: GuardedScope): void {
    const guarded = this.#guarded.get(scope.inode);
    const wasKilled = guarded !== undefined && guarded.killed !== null;
    if (wasKilled) guarded.killed = null;
    this.#note(scope, { open: false, parked: false });
    // What runs there again is a job like others.
    if (wasKilled) this.#tellPlan(guarded);
  }

  #note(scope: GuardedScope, state: Pick<Guarded, 'open' | 'parked'>): void {
    const guarded = this.#guarded.get(scope.inode);
    if (guarded !== undefined) this.#tellState(Object.assign(guarded, state));
  }

  #tellState(guarded: Guarded): void {
    const { scope, open, parked } = guarded;
    if (!this.#send(parked ? 'parked' : open ? 'opened' : 'resolved', scope)) guarded.missed = true;
  }

  #tellAll(guarded: Guarded): void {
    this.#tellGuarded(guarded);
    this.#tellPlan(guarded, SEND_MS);
    if (guarded.open) this.#tellState(guarded);
  }

  #tellGuarded({ scope, memcg, original, deadlines }: Guarded): void {
    const fields = { original, respondMs: deadlines.respondWithin, handleMs: deadlines.handleWithin };
    const descriptors = memcg === null ? [] : [directoryOf(memcg)];
    this.#send(memcg === null ? 'tend' : 'arm', scope, fields, descriptors, SEND_MS, encodePath(scope.path));
  }

  #tellPlan(guarded: Guarded, patience = 0): void {
    const { memcg, killed, plan } = guarded;
    if (memcg === null) return; // who dies there is not the guard's to say
    const others = plan.filter((job) => killed === null || identityOf(job) !== identityOf(killed));
    // One that is gone needs no guard, and has no descriptor any more.
    const jobs = [...(killed === null ? [] : [killed]), ...others].filter(isHeld).slice(0, MOST_PLANNED);
    const entries = jobs.map((job) => {
      const { kind, name, born: id, settings } = job;
      const { priority, overPriority, reservation } = settings;
      const pid = job.kind === 'process' ? job.process.pid : 0;
      return { kind, killed: job === killed, pid, id, priority, overPriority, reservation, name };
    });
    const descriptors = jobs.map((job) => (job.kind === 'memcg' ? directoryOf(job.memcg) : pidfdOf(job.process)));
    const fields = { count: entries.length };
    if (!this.#send('plan', memcg, fields, descriptors, patience, encodePlan(entries))) guarded.missed = true;
  }

  /** Once a second: whether it still listens. */
  heartbeat(): void {
    if (this.#channel === null || this.#ready !== null) return;
    this.#receive(); // the answer may be here already
    for (const guarded of this.#guarded.values()) {
      if (!guarded.missed) continue;
      guarded.missed = false;
      this.#tellPlan(guarded);
      this.#tellState(guarded);
    }
    const now = performance.now();
    if (this.#askedAt !== null && now - this.#askedAt > STUCK_MS) {
      this.#child?.kill('SIGKILL');
      return;
    }
    if (this.#askedAt !== null) return;
    this.#askedAt = now;
    this.#send('heartbeat');
  }

  /** Resolves when it has taken in everything that it was told. @throws ReprieveError ERR_REPRIEVE_GUARD */
  async settled(): Promise<void> {
    if (this.#ended) return;
    const timers: NodeJS.Timeout[] = [];
    const answered = new Promise<void>((resolve, reject) => {
      this.#barriers.push({ seq: this.#seq + 1, resolve, reject });
      const ask = () => this.#send('heartbeat', undefined, {}, [], SEND_MS);
      ask();
      // Where it had much to complain of, an answer may have found no room.
      timers.push(setInterval(ask, ASK_AGAIN_MS));
      const late = () =>
        reject(new ReprieveError('ERR_REPRIEVE_GUARD', `The guard has not answered for ${START_MS} ms`));
      timers.push(setTimeout(late, START_MS));
    });
    try {
      await answered;
    } finally {
      for (const timer of timers) clearTimeout(timer);
    }
  }

  /**
   * A guard that is busy, as when a thousand memcgs are armed at once, is given `patience`. One that is gone is replaced,
   * and then told everything again. Never throws.
   * @returns false if there was no room for it
   */
  #send(
    type: Parameters<typeof encodeMessage>[0]['type'],
    scope?: GuardedScope,
    fields: Partial<Parameters<typeof encodeMessage>[0]> = {},
    descriptors: readonly (Directory | Pidfd)[] = [],
    patience = 0,
    tail?: Uint8Array,
  ): boolean {
    if (this.#channel === null) return true;
    const message = encodeMessage({ type, seq: ++this.#seq, inode: scope?.inode ?? 0, ...fields }, tail);
    for (let waited = 0; ; waited++) {
      try {
        this.#channel.send(message, descriptors);
        return true;
      } catch (error) {
        const { code } = error as SystemError;
        if (code === 'EPIPE' || code === 'ECONNRESET') return true; // gone: its exit tells
        // EAGAIN, ETOOMANYREFS; ENOBUFS and ENOMEM where there is no memory for a message.
        if (waited >= patience) break;
        Atomics.wait(NAP, 0, 0, 1);
      }
    }
    if (patience > 0) this.#child?.kill('SIGKILL'); // it does not read: another one will
    return false;
  }

  // --- What it answers ---

  #receive(): void {
    for (;;) {
      const message = this.#channel?.receive() ?? null;
      if (message === null) return;
      if (message.length === 0) {
        this.#closeChannel(); // its exit tells the rest
        return;
      }
      const reply = decodeReply(message);
      if (reply !== null) this.#answered(reply);
    }
  }

  #answered(reply: Reply): void {
    switch (reply.type) {
      case 'ready':
        if (reply.version === PROTOCOL_VERSION) this.#ready?.resolve();
        else this.#ready?.reject(otherVersion(reply.version));
        break;
      case 'alive':
        this.#askedAt = null;
        for (const { seq, resolve } of this.#barriers) if (reply.seq >= seq) resolve();
        this.#barriers = this.#barriers.filter(({ seq }) => reply.seq < seq);
        break;
      case 'failed':
        if (this.#guarded.has(reply.inode)) this.events.failed(reply.inode, failureOf(reply));
        break;
      case 'acting':
        this.takenOver = REASONS[reply.code] ?? 'no reason was given';
        this.#epoch.tell();
        break;
    }
  }

  #rejectBarriers(error: ReprieveError): void {
    for (const { reject } of this.#barriers.splice(0)) reject(error);
  }

  #closeChannel(): void {
    this.#channel?.close();
    this.#channel = null;
  }

  // --- The end ---

  /** True while something is armed that could not be put back, or it has taken over: what is written down is its own then. */
  get isNeeded(): boolean {
    return this.#epoch.revoked ? this.#lives : this.#guarded.size > 0;
  }

  get #lives(): boolean {
    const child = this.#child;
    if (child === null || child.exitCode !== null || child.signalCode !== null) return false;
    if (this.#ended) return true;
    this.#receive(); // while the process exits no event tells of a child, but its end of the channel does
    return this.#channel !== null;
  }

  /** It may go; if not everything is `done`, it does the rest before. Synchronous. */
  dismiss(done: boolean): void {
    if (this.#ended) return;
    this.#ended = true;
    this.#patienceMs = done ? 0 : this.#options.within;
    for (const { resolve } of this.#barriers.splice(0)) resolve();
    this.#send(done ? 'bye' : 'leave');
    this.#closeChannel();
  }

  /** Waits until it is gone. */
  async gone(): Promise<void> {
    const child = this.#child;
    if (child === null || !this.#lives) return;
    child.ref();
    const patienceMs = this.#epoch.revoked ? this.#options.within : this.#patienceMs;
    let timer: NodeJS.Timeout | undefined;
    await new Promise<void>((resolve) => {
      child.once('exit', () => resolve());
      timer = setTimeout(() => {
        if (patienceMs === 0) child.kill('SIGKILL');
        else resolve(); // it waits for somebody to look: there was an alarm
      }, patienceMs + END_MS);
    });
    clearTimeout(timer);
    child.unref();
  }
}

function isHeld(job: PlannedJob): boolean {
  return isOpen(job.kind === 'memcg' ? job.memcg : job.process);
}

function samePlanned(planned: PlannedJob, job: PlannedJob | undefined): boolean {
  return planned.id === job?.id && planned.born === job.born && planned.settings === job.settings;
}

const NAP = new Int32Array(new SharedArrayBuffer(4));

function otherVersion(version: number): ReprieveError {
  return new ReprieveError(
    'ERR_REPRIEVE_GUARD',
    `The guard speaks version ${version} of the protocol; expected ${PROTOCOL_VERSION}: it is of another reprieve`,
  );
}

function failureOf({ code, errno, inode }: Reply): ReprieveError {
  const what = FAILURES[code] ?? `failure ${code}`;
  return new ReprieveError(
    'ERR_REPRIEVE_GUARD',
    `The guard cannot guard the scope with inode ${inode}: ${what}${errno > 0 ? ` (${getSystemErrorName(-errno)})` : ''}`,
  );
}
