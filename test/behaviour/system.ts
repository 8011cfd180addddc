import { execFileSync } from 'node:child_process';
import { existsSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { findMemoryV1, findUnified, findV1, readCgroupMounts } from '../../src/cgroup/mounts.js';
import { type JobRule, type JobSettings, OomHandler, type WatchOptions } from '../../src/index.js';
import { MiB } from '../support/scene.js';
import { Environment } from './environment.js';
import { makeUnified } from './memcg-v2.js';

/** What a program that watches may take itself. */
const HANDLER_BYTES = 96 * MiB;

const numberIn = (file: string, key: string) =>
  Number(new RegExp(`^${key}:?\\s+(\\d+)`, 'm').exec(readFileSync(file, 'utf8'))?.[1]);

/** What the machine has left when the jobs have taken what was to be theirs. */
const BEYOND_BYTES = 120 * MiB;

const available = () => numberIn('/proc/meminfo', 'MemAvailable') * 1024;

let warm: Promise<void> | undefined;
/** What a handler takes of memory when it is opened for the first time is not to count as the jobs'. */
function warmUp(): Promise<void> {
  warm ??= OomHandler.open({ reserve: 0 }).then((handler) => handler.close());
  return warm;
}

/**
 * The whole machine: out of memory when the jobs have taken what was to be theirs. Everything else on it is protected. The
 * jobs are memcgs, of v1 or of v2, or, in `plain`, processes that rules tell apart.
 */
export class System extends Environment {
  readonly #kind: 'v1' | 'v2' | 'plain';
  protected override readonly point: string;
  readonly #freezer = findV1(readCgroupMounts(), 'freezer')?.point ?? '';
  readonly #killsBefore = numberIn('/proc/vmstat', 'oom_kill');
  #available = 0;
  override readonly scope = 'system';
  override readonly owner = 'system';
  override readonly holds = true;
  override readonly mayBeOutrun = true;
  override readonly leak = 'leak --every 0';

  constructor(kind: 'v1' | 'v2' | 'plain') {
    super();
    this.#kind = kind;
    this.point = (kind === 'v1' ? findMemoryV1(readCgroupMounts()) : findUnified(readCgroupMounts()))?.point ?? '';
  }

  protected override get own(): WatchOptions {
    return { shortage: { available: this.#available, stall: 0 } };
  }

  override make(below = ''): string {
    if (this.#kind === 'v1') return super.make(below);
    if (this.#kind === 'v2') makeUnified(this.point, `${this.path}/${below}`);
    return below;
  }

  /** So near to the end of all memory that the kernel's killer is not far once it is its turn. */
  override async bound(bytes: number): Promise<void> {
    if (!process.env.REPRIEVE_EMULATED) throw new Error('the memory of a machine that others use is not to be filled');
    await warmUp();
    const ballast = '/dev/shm/reprieve-test-ballast';
    this.onClear(() => rmSync(ballast, { force: true }));
    const surplus = available() - bytes - BEYOND_BYTES;
    if (surplus > 0) {
      execFileSync('mount', ['-o', 'remount,size=95%', '/dev/shm']);
      execFileSync('fallocate', ['-l', String(surplus), ballast]);
    }
    this.#available = available() - bytes;
  }

  override boundBelow(): string {
    throw new Error('a machine has one scope system');
  }

  override cgroupsOf(below: string): string[] {
    return this.#kind === 'plain' ? [] : [this.file(below, '')];
  }

  protected override wordsOf(below: string): string[] {
    return this.#kind === 'plain' ? ['--name', this.nameOf(below)] : super.wordsOf(below);
  }

  override nameOf(below: string): string {
    return this.#kind === 'plain' ? (below.split('/')[0] as string) : `${this.name}/${below}`;
  }

  override options(options: WatchOptions): WatchOptions {
    const { jobs = {}, ...rest } = options;
    const rules: JobRule[] = Object.entries(jobs as Record<string, JobSettings>).map(([glob, settings]) => ({
      match: this.#kind === 'plain' ? { comm: this.nameOf(glob) } : { name: this.nameOf(glob) },
      ...settings,
    }));
    const names = [...new Set(this.names.map((below) => below.split('/')[0] as string))];
    for (const name of names)
      rules.push({ match: this.#kind === 'plain' ? { comm: name } : { name: this.nameOf(name) } });
    return { ...this.own, ...rest, jobs: [...rules, { match: { name: '**' }, protected: true }] };
  }

  override startHandler(...[options, body, open]: Parameters<Environment['startHandler']>) {
    this.#available -= HANDLER_BYTES;
    return super.startHandler(options, body, open);
  }

  override pids(below = ''): number[] {
    if (this.#kind !== 'plain') return super.pids(below);
    return readdirSync('/proc')
      .map(Number)
      .filter((pid) => {
        const file = `/proc/${pid}/comm`;
        return pid > 0 && existsSync(file) && readFileSync(file, 'utf8').trim() === this.nameOf(below);
      });
  }

  override kernelKills(): number {
    // Who is chosen in a job that dies whole is counted twice.
    const whole = this.#kind === 'v2' ? this.field('', 'memory.events', 'oom_group_kill') : 0;
    return numberIn('/proc/vmstat', 'oom_kill') - this.#killsBefore - whole;
  }

  override frozen(): string[] {
    if (this.#kind === 'plain') {
      const stopped = ({ pid }: { pid: number }) => /^State:\s*T/m.test(readFileSync(`/proc/${pid}/status`, 'utf8'));
      return this.jobs.filter((job) => job.alive() && stopped(job)).map(({ pid }) => String(pid));
    }
    return this.below().filter((below) => {
      if (this.#kind === 'v2') return this.readIfThere(below, 'cgroup.freeze').trim() === '1';
      const file = `${this.#freezer}${this.path}${below}/freezer.state`;
      return existsSync(file) && readFileSync(file, 'utf8').trim() !== 'THAWED';
    });
  }

  protected override settings(): Record<string, string> {
    if (this.#kind === 'plain') return {};
    const files =
      this.#kind === 'v1'
        ? ['memory.oom_control', 'memory.limit_in_bytes']
        : ['memory.high', 'memory.max', 'memory.oom.group'];
    // Of v1's memory.oom_control what follows the first line is no setting, but counted.
    const setting = (below: string, name: string) => this.readIfThere(below, name).split('\n')[0] ?? '';
    return Object.fromEntries(
      this.below().flatMap((below) => files.map((name) => [`${name} of ${below}`, setting(below, name)])),
    );
  }

  protected override release(directory: string): void {
    if (this.#kind === 'v2') writeFileSync(`${directory}/cgroup.freeze`, '0');
  }
}
