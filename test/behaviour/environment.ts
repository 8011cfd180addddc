import { execFileSync } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, readdirSync, readFileSync, rmdirSync, rmSync, writeFileSync } from 'node:fs';
import { expect } from 'vitest';
import type { ErrorCode, HandlerOptions, JobSettings, Report, Snapshot, WatchOptions } from '../../src/index.js';
import { CgroupScene } from '../support/cgroup-scene.js';
import { type HandlerProcess, isRunning, startHandler } from '../support/handler-process.js';
import type { Job } from '../support/scene.js';

/** Where the same calls are to do the same. */
export const ENVIRONMENTS = ['v1', 'v2', 'v2-hold', 'system-v1', 'system-v2', 'system-plain'] as const;

export type EnvironmentId = (typeof ENVIRONMENTS)[number];

/** Where a file has a page cache that can be given back: not a tmpfs, as /tmp may be. */
const STORE = '/var/tmp';

/** What makes a handler quick and not what it does, and takes seconds in an emulated machine. */
const EMULATED: HandlerOptions = process.env.REPRIEVE_EMULATED ? { drill: false, lockText: false } : {};

/** Where the kernel makes nobody wait, it kills when that much is taken above the limit. */
const RESERVE = '8MiB';

/** The guard's deadlines of a handler that something happens to. */
const GUARD = { within: 2_000, silence: 300 };

/** One scope, with what is in it, of one test. What differs between the environments is asked of it, and not of their names. */
export abstract class Environment extends CgroupScene {
  /** What reports call the owner of a condition of the scope. */
  abstract readonly owner: string;
  /** A task that needs memory waits while the policy thinks; else it goes on until the kernel kills. */
  abstract readonly holds: boolean;
  /** The kernel's killer may act before we do. */
  readonly mayBeOutrun: boolean = false;
  /** Who waits does so in the kernel, can be seen there, and the guard acts for him. */
  readonly parks: boolean = false;
  /** The error of a scope that would be one, and is not there. */
  readonly missingScope: ErrorCode = 'ERR_REPRIEVE_NOT_A_MEMCG';

  /** Words of a job that takes memory until it is stopped. */
  abstract readonly leak: string;

  /** What belongs to this environment in the options of a watch. */
  protected abstract readonly own: WatchOptions;

  /** Makes the scope, with so many bytes for its jobs until it is out of memory. */
  abstract bound(bytes: number): void | Promise<void>;

  /** Makes a scope of its own below, with a limit, and says what `watch` calls it. */
  abstract boundBelow(below: string, bytes: number): string;

  /** Removes a scope below that nobody is in. */
  removeBelow(below: string): void {
    rmdirSync(this.file(below, ''));
  }

  /** A file of about that size, of which nothing is in memory. */
  largeFile(bytes: number): string {
    if (process.env.REPRIEVE_EMULATED) {
      // All that a guest writes stays in its memory; what it has of the host's files does not.
      writeFileSync('/proc/sys/vm/drop_caches', '3');
      return process.execPath;
    }
    const file = `${STORE}/${this.name}.data`;
    this.onClear(() => rmSync(file, { force: true }));
    execFileSync('dd', [
      'if=/dev/zero',
      `of=${file}`,
      'bs=1M',
      `count=${bytes / 2 ** 20}`,
      'conv=fsync',
      'status=none',
    ]);
    return file;
  }

  /** How many processes of the scope the kernel has killed. */
  abstract kernelKills(): number;

  /** Names of jobs that stand still by our doing. */
  abstract frozen(): string[];

  /** What a handler may change of the scope, and what it is, by name. */
  protected abstract settings(): Record<string, string>;

  /** What a job is called in reports, and by the globs of `jobs`. */
  abstract nameOf(below: string): string;

  /**
   * Makes the scope with jobs of these names in it. Those that hold or work have what they want and go on; the others, which
   * are to bring the scope out of memory, wait at the gate.
   */
  async stage<Name extends string>(bytes: number, jobs: Record<Name, string>): Promise<Record<Name, Job>> {
    await this.bound(bytes);
    const started: Record<string, Job> = {};
    for (const [below, words] of Object.entries<string>(jobs)) {
      this.make(below);
      const job = await this.start(below, words, { gate: true });
      const told = words.startsWith('hold') ? once(job.child.stdout as NodeJS.ReadableStream, 'data') : undefined;
      if (/^(hold|work)/.test(words)) job.go();
      await told;
      started[below] = job;
    }
    return started as Record<Name, Job>;
  }

  /** Options of a watch, for jobs by the names that they were started with. */
  options(options: WatchOptions): WatchOptions {
    const { jobs = {}, ...rest } = options;
    const named = Object.entries(jobs as Record<string, JobSettings>).map(([glob, settings]) => [
      this.nameOf(glob),
      settings,
    ]);
    return { ...this.own, ...rest, jobs: Object.fromEntries(named) };
  }

  override handler(options: HandlerOptions = {}) {
    return super.handler({ reserve: RESERVE, ...EMULATED, ...options });
  }

  override watch(options: WatchOptions, scope = this.scope) {
    return super.watch(this.options(options), scope);
  }

  /** A handler in a process of its own that watches the scope; `body` may set `policy`. */
  startHandler(options: WatchOptions, body = '', open: HandlerOptions = {}): Promise<HandlerProcess> {
    const state = `${this.directory}/state`;
    const text = `options = ${JSON.stringify(this.options(options))}; ${body}`;
    return startHandler(this, { reserve: RESERVE, guard: GUARD, stateDirectory: state, ...EMULATED, ...open }, text);
  }

  /** The job of that name in a snapshot: its id. */
  idIn(snapshot: Snapshot, below: string): string {
    return snapshot.jobs.find(({ name }) => name === this.nameOf(below))?.id ?? `no job ${below}`;
  }

  /** Names of the jobs that died, by us; by the kernel too where it makes nobody wait, and may be quicker. */
  dead(report: Report): string[] {
    const byKernel = this.kernelVictims(report);
    if (this.holds) expect(byKernel).toEqual([]);
    return [...new Set([...this.victims(report), ...byKernel])];
  }

  /** Names of the jobs that we killed, of the kinds that the test has started. */
  victims(report: Report): string[] {
    return report.victims.map(({ name }) => this.given(name));
  }

  /** The same of those that the kernel killed. */
  kernelVictims(report: Report): string[] {
    return report.kernelVictims.map(({ job }) => this.given(job));
  }

  /** What the test calls a job. */
  given(name: string): string {
    const prefix = this.nameOf('');
    return name.startsWith(prefix) ? name.slice(prefix.length) : name;
  }

  /** What could be changed, and the `oom_score_adj` of all that lives. */
  #look(): Record<string, string> {
    const scores = this.jobs
      .filter((job) => job.alive())
      .map(({ pid }) => [`oom_score_adj of ${pid}`, String(this.scoreAdj(pid))]);
    return { ...this.settings(), ...Object.fromEntries(scores) };
  }

  /** Remembers how everything is; what it returns resolves when it is so again, as far as it is still there. */
  remember(): (handler?: HandlerProcess) => Promise<void> {
    const before = this.#look();
    return async (handler) => {
      if (handler !== undefined) {
        await this.until(() => !isRunning(handler.guardPid), 'the guard is gone');
        expect(readdirSync(`${this.directory}/state`)).toEqual(['records']);
        expect(existsSync(`${this.point}/reprieve-handler-${handler.pid}`)).toBe(false);
      }
      const now = this.#look();
      const kept = Object.keys(now).filter((name) => name in before);
      expect(Object.fromEntries(kept.map((name) => [name, now[name]]))).toEqual(
        Object.fromEntries(kept.map((name) => [name, before[name]])),
      );
      expect(this.frozen()).toEqual([]);
    };
  }

  /** What the guard has written down of its taking over. */
  async record(): Promise<string> {
    const records = `${this.directory}/state/records`;
    await this.until(() => existsSync(records) && readdirSync(records).length > 0, 'there is a record');
    const [name] = readdirSync(records);
    return readFileSync(`${records}/${name}`, 'utf8').replaceAll('\0', '');
  }
}
