import { type ChildProcess, execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmdirSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterAll, afterEach, describe } from 'vitest';
import { findMemoryV1, readCgroupMounts } from '../../src/cgroup/mounts.js';
import { type HandlerOptions, OomHandler, type Report, type WatchOptions } from '../../src/index.js';
import { workloadPath } from '../../src/native.js';

export const MiB = 2 ** 20;

const mount = findMemoryV1(readCgroupMounts());
const point = mount?.point ?? '';

/** Why tests on real memcgs cannot run here; null if they can. */
const hostSkip = mount === undefined ? 'no cgroup v1 memory hierarchy' : process.geteuid?.() !== 0 ? 'not root' : null;

/** Tests on real memcgs: skipped with the reason where there are none, unless REPRIEVE_REQUIRE asks for them. */
export function describeHost(name: string, tests: () => void): void {
  const required = (process.env.REPRIEVE_REQUIRE ?? '').split(',').includes('host');
  if (hostSkip !== null && required) throw new Error(`REPRIEVE_REQUIRE asks for host tests: ${hostSkip}`);
  describe.skipIf(hostSkip !== null)(hostSkip === null ? name : `${name} [skipped: ${hostSkip}]`, tests);
}

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

/** The memcgs, processes, handlers and files of one test, removed after it whatever happens. */
export class Host {
  readonly name = `reprieve-test-${process.pid}-${Math.random().toString(36).slice(2, 7)}`;
  readonly directory = mkdtempSync(`${tmpdir()}/reprieve-test-`);
  readonly #jobs: Job[] = [];
  readonly #handlers: OomHandler[] = [];
  readonly #mounts: string[] = [];
  readonly #steps: (() => unknown)[] = [];
  readonly reports: Report[] = [];

  /** The scope's path below the hierarchy. */
  get path(): string {
    return `/${this.name}`;
  }

  get scope(): string {
    return `memcg:${this.path}`;
  }

  /** Makes the scope, or a memcg below it. */
  make(below = '', limit?: number): string {
    mkdirSync(this.file(below, ''), { recursive: true });
    if (limit !== undefined) this.write(below, 'memory.limit_in_bytes', limit);
    return `${this.path}${below === '' ? '' : `/${below}`}`;
  }

  file(below: string, name: string): string {
    return `${point}${this.path}/${below}/${name}`;
  }

  read(below: string, name: string): string {
    return readFileSync(this.file(below, name), 'utf8');
  }

  write(below: string, name: string, value: string | number): void {
    writeFileSync(this.file(below, name), String(value));
  }

  field(below: string, name: string, key: string): number {
    return Number(new RegExp(`^${key} (\\d+)$`, 'm').exec(this.read(below, name))?.[1]);
  }

  pids(below = ''): number[] {
    return this.read(below, 'cgroup.procs').split('\n').filter(Boolean).map(Number);
  }

  scoreAdj(pid: number): number {
    return Number(readFileSync(`/proc/${pid}/oom_score_adj`, 'utf8'));
  }

  /** Of a process of this test. */
  setScoreAdj(pid: number, value: number): void {
    writeFileSync(`/proc/${pid}/oom_score_adj`, String(value));
  }

  /** Starts a workload in a memcg below the scope; resolves when it is set up. With `gate` it waits for `go`. */
  async start(below: string, args: string, options: { gate?: boolean; env?: NodeJS.ProcessEnv } = {}): Promise<Job> {
    const stats = `${this.directory}/stats-${this.#jobs.length}`;
    writeFileSync(stats, Buffer.alloc(4096));
    const words = [...args.split(' '), '--join', this.file(below, ''), '--stats', stats, '--gate'];
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
    await attempt(() => this.#remove(`${point}${this.path}`));
    rmSync(this.directory, { recursive: true, force: true });
    if (failures.length > 0) throw new AggregateError(failures, 'the test left something behind');
  }

  /** Kills what is left in a memcg of this test, and removes it. */
  async #remove(directory: string): Promise<void> {
    let names: string[];
    try {
      names = readdirSync(directory, { withFileTypes: true }).flatMap((entry) =>
        entry.isDirectory() ? [entry.name] : [],
      );
    } catch {
      return; // never made, or removed by the test
    }
    for (const name of names) await this.#remove(`${directory}/${name}`);
    writeFileSync(`${directory}/memory.oom_control`, '0');
    await this.until(() => {
      for (const pid of readFileSync(`${directory}/cgroup.procs`, 'utf8').split('\n').filter(Boolean)) {
        try {
          process.kill(Number(pid), 'SIGKILL'); // a child of a job of this test: nobody else is in its memcg
        } catch {
          // gone meanwhile
        }
      }
      try {
        rmdirSync(directory);
        return true;
      } catch {
        return false;
      }
    }, `removing ${directory}`);
  }
}

/** One host a test, cleared after it. */
export function useHost(): () => Host {
  const hosts: Host[] = [];
  const clear = async () => {
    for (const host of hosts.splice(0)) await host.clear();
  };
  afterEach(clear);
  afterAll(clear);
  return () => {
    const host = new Host();
    hosts.push(host);
    return host;
  };
}
