import { type ChildProcess, execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterAll, afterEach } from 'vitest';
import { type HandlerOptions, OomHandler, type Report, type WatchOptions } from '../../src/index.js';
import { workloadPath } from '../../src/native.js';

export const MiB = 2 ** 20;

/** Layout of the workload's page of live numbers. */
const STATS = { iterations: 2, longestStallUs: 3, bytes: 5, errors: 7, refused: 9 } as const;

export interface Job {
  child: ChildProcess;
  pid: number;
  alive(): boolean;
  /** Resolves when the job's first process is gone. */
  gone: Promise<unknown>;
  stat(name: keyof typeof STATS): number;
  /** Starts what waits at the gate. */
  go(): void;
}

export interface StartOptions {
  /** It waits for `go`. */
  gate?: boolean;
  env?: NodeJS.ProcessEnv;
}

/** The processes, handlers and files of one test, removed after it whatever happens. */
export abstract class Scene {
  readonly name = `reprieve-test-${process.pid}-${Math.random().toString(36).slice(2, 7)}`;
  readonly directory = mkdtempSync(`${tmpdir()}/reprieve-test-`);
  readonly #jobs: Job[] = [];
  readonly #handlers: OomHandler[] = [];
  readonly #mounts: string[] = [];
  readonly #steps: (() => unknown)[] = [];
  readonly reports: Report[] = [];

  /** What a handler is to watch. */
  abstract readonly scope: string;

  /** Directories of the cgroups that a job of that name is in; none where there are only processes. */
  abstract cgroupsOf(below: string): string[];

  /** Words for the workload, so that it is a job of that name. */
  protected wordsOf(below: string): string[] {
    return this.cgroupsOf(below).flatMap((path) => ['--join', path]);
  }

  /** Names under which jobs were started. */
  readonly names: string[] = [];

  /** Removes what the scene has made beside processes and files, when these are gone. */
  protected abstract sweep(): unknown;

  /** What was started, in that order. */
  get jobs(): readonly Job[] {
    return this.#jobs;
  }

  scoreAdj(pid: number): number {
    return Number(readFileSync(`/proc/${pid}/oom_score_adj`, 'utf8'));
  }

  /** Of a process of this test. */
  setScoreAdj(pid: number, value: number): void {
    writeFileSync(`/proc/${pid}/oom_score_adj`, String(value));
  }

  /** Starts a workload in the place of that name; resolves when it is set up. */
  async start(below: string, args: string, options: StartOptions = {}): Promise<Job> {
    this.names.push(below);
    const stats = `${this.directory}/stats-${this.#jobs.length}`;
    writeFileSync(stats, Buffer.alloc(4096));
    const words = [...args.split(' '), ...this.wordsOf(below), '--stats', stats, '--gate'];
    const child = spawn(workloadPath(), words, {
      stdio: ['pipe', 'pipe', 'inherit'],
      env: { ...process.env, ...options.env },
    });
    child.stdin.on('error', () => {}); // gone before the gate was opened
    const gone = once(child, 'exit');
    const job: Job = {
      child,
      pid: child.pid as number,
      alive: () => child.exitCode === null && child.signalCode === null,
      gone,
      stat: (name) => Number(readFileSync(stats).readBigUInt64LE(STATS[name] * 8)),
      go: () => child.stdin.end(),
    };
    this.#jobs.push(job);
    await Promise.race([
      once(child.stdout, 'data'),
      gone.then(() => Promise.reject(new Error(`${args} did not start: ${child.exitCode ?? child.signalCode}`))),
    ]);
    if (!options.gate) job.go();
    return job;
  }

  async handler(options: HandlerOptions = {}): Promise<OomHandler> {
    const handler = await OomHandler.open({ reserve: '1MiB', ...options });
    this.#handlers.push(handler);
    handler.on('report', (report) => this.reports.push(report));
    return handler;
  }

  /** Opens a handler that watches the scope. */
  async watch(options: WatchOptions, scope = this.scope) {
    const handler = await this.handler();
    const watch = await handler.watch(scope, options);
    return { handler, watch };
  }

  /** A tmpfs of the test's own. */
  tmpfs(): string {
    const directory = `${this.directory}/tmpfs-${this.#mounts.length}`;
    mkdirSync(directory);
    execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=512m', 'reprieve-test', directory]);
    this.#mounts.push(directory);
    return directory;
  }

  /** Resolves when `check` holds; fails after `ms`. Generous: only order and bounds are asserted. */
  async until(check: () => boolean, what: string, ms = 20_000): Promise<void> {
    const end = Date.now() + ms;
    while (!check()) {
      if (Date.now() > end) throw new Error(`${what}: not within ${ms} ms`);
      await sleep(5);
    }
  }

  /** Reports of episodes that were acted on: a service that frees its memory can clear one by itself. */
  get acted(): Report[] {
    return this.reports.filter(({ victims, outcome }) => victims.length > 0 || outcome !== 'cleared');
  }

  async report(count = 1): Promise<Report> {
    await this.until(() => this.acted.length >= count, `report ${count}`);
    return this.acted[count - 1] as Report;
  }

  /** Runs `step` when the test is over, before everything else. */
  onClear(step: () => unknown): void {
    this.#steps.push(step);
  }

  async clear(): Promise<void> {
    const failures: unknown[] = [];
    const attempt = async (step: () => unknown) => {
      try {
        await step();
      } catch (error) {
        failures.push(error);
      }
    };
    for (const step of this.#steps.splice(0)) await attempt(step);
    for (const handler of this.#handlers) await attempt(() => handler.close());
    for (const job of this.#jobs) if (job.alive()) job.child.kill('SIGKILL');
    for (const job of this.#jobs) await job.gone;
    for (const directory of this.#mounts) await attempt(() => execFileSync('umount', [directory]));
    await attempt(() => this.sweep());
    rmSync(this.directory, { recursive: true, force: true });
    if (failures.length > 0) throw new AggregateError(failures, 'the test left something behind');
  }
}

/** One scene a test, cleared after it. */
export function useScene<S extends Scene>(make: () => S): () => S {
  const scenes: S[] = [];
  const clear = async () => {
    for (const scene of scenes.splice(0)) await scene.clear();
  };
  afterEach(clear);
  afterAll(clear);
  return () => {
    const scene = make();
    scenes.push(scene);
    return scene;
  };
}
