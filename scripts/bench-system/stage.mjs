// The machine of one run, inside the guest: the jobs in their cgroups, the handler in its own, and a clean state before.
import { spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import {
  closeSync,
  existsSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  rmdirSync,
  writeFileSync,
} from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { HANDLER_CGROUP, HIERARCHY, SCOPE } from './scenario.mjs';

const STATS_BYTES = 4096;
const CLEAN_WITHIN_MS = 15_000;
/** What may be missing of the memory that was available at the start: Node and caches of the kernel grow. Each run tells what it began with. */
const CLEAN_SLACK_KIB = 40 << 10;
const READY_WITHIN_MS = 180_000;

/** In KiB. */
export function meminfo(name) {
  return Number(readFileSync('/proc/meminfo', 'utf8').match(new RegExp(`^${name}: *(\\d+)`, 'm'))[1]);
}

/** One number of a file of `name value` lines. */
export function numberIn(file, name) {
  return Number(readFileSync(file, 'utf8').match(new RegExp(`^${name} (\\d+)`, 'm'))?.[1] ?? 0);
}

function run(command, ...words) {
  const { status, error, stderr } = spawnSync(command, words, { encoding: 'utf8' });
  if (status !== 0) throw new Error(`${command} ${words.join(' ')}: ${error?.message ?? stderr}`);
}

/** Resolves when it is true, looked at every 50 ms. */
async function until(condition, ms, what) {
  for (const end = performance.now() + ms; !condition(); ) {
    if (performance.now() > end) throw new Error(`${what()} within ${ms} ms`);
    await sleep(50);
  }
}

export class Stage {
  oomScoreAdj = 0; // of the leaking job
  #children = new Map();
  #files;
  #programs;
  #available;
  #swap;

  constructor({ programs, files }) {
    this.#programs = programs;
    this.#files = files;
    mkdirSync(files, { recursive: true });
    this.#swap = readFileSync('/proc/swaps', 'utf8').match(/^\/\S+/gm) ?? [];
  }

  cgroup(job) {
    return join(HIERARCHY, SCOPE, job);
  }

  statsFile(job) {
    return join(this.#files, job);
  }

  write(job, file, text) {
    writeFileSync(join(this.cgroup(job), file), text);
  }

  setAttribute(job, name, value) {
    run('setfattr', '-n', name, '-v', value, this.cgroup(job));
  }

  /** Ends what is left of the run before, and waits until its memory is back. */
  async clean() {
    for (const path of this.#all()) await this.#remove(path);
    this.#children.clear();
    this.oomScoreAdj = 0;
    for (const device of this.#swap) {
      run('swapoff', device);
      run('swapon', device);
    }
    run('sync');
    const available = () => {
      writeFileSync('/proc/sys/vm/drop_caches', '3');
      return meminfo('MemAvailable');
    };
    this.#available ??= available();
    const missing = () => this.#available - available();
    await until(
      () => missing() < CLEAN_SLACK_KIB,
      CLEAN_WITHIN_MS,
      () => `${missing()} KiB of memory were not back`,
    );
  }

  /** Kills everything; the machine is about to end. */
  close() {
    for (const path of this.#all()) writeFileSync(join(path, 'cgroup.kill'), '1');
  }

  #all() {
    return [join(HIERARCHY, SCOPE), ...this.#handlerCgroups()].filter((path) => existsSync(path));
  }

  /** Where it was started, and where it may have moved itself. */
  #handlerCgroups() {
    const own = readdirSync(HIERARCHY).filter((name) => name.startsWith('reprieve-handler-'));
    return [HANDLER_CGROUP, ...own].map((name) => join(HIERARCHY, name));
  }

  async #remove(path) {
    writeFileSync(join(path, 'cgroup.kill'), '1');
    await until(
      () => numberIn(join(path, 'cgroup.events'), 'populated') === 0,
      CLEAN_WITHIN_MS,
      () => `${path} was not empty`,
    );
    for (const entry of readdirSync(path, { withFileTypes: true }))
      if (entry.isDirectory()) rmdirSync(join(path, entry.name));
    rmdirSync(path);
  }

  makeCgroups(jobs) {
    mkdirSync(join(HIERARCHY, SCOPE));
    writeFileSync(join(HIERARCHY, SCOPE, 'cgroup.subtree_control'), '+memory');
    for (const job of jobs) mkdirSync(this.cgroup(job));
    mkdirSync(join(HIERARCHY, HANDLER_CGROUP));
  }

  /** Starts a program in a cgroup, with nothing of this process's that a handler would see: its score, its group. */
  #spawn(cgroup, oomScoreAdj, words, stdio) {
    const script = `echo ${oomScoreAdj} > /proc/self/oom_score_adj; echo 0 > ${cgroup}/cgroup.procs; exec "$@"`;
    return spawn('sh', ['-c', script, 'sh', ...words], { stdio, detached: true });
  }

  /** Starts a job and waits until it is set up; its gate is its stdin. */
  async startJob({ name, words }) {
    writeFileSync(this.statsFile(name), Buffer.alloc(STATS_BYTES));
    const all = [this.#programs.workload, ...words, '--stats', this.statsFile(name)];
    const child = this.#spawn(this.cgroup(name), name === 'leak' ? this.oomScoreAdj : 0, all, [
      'pipe',
      'pipe',
      'inherit',
    ]);
    child.stdin.on('error', () => {}); // a job that is gone needs no gate
    const job = { child, ended: null };
    child.once('exit', (code, signal) => {
      job.ended = signal ?? code;
    });
    this.#children.set(name, job);
    await Promise.race([once(child.stdout, 'data'), this.#refuse(child, name)]);
    return child;
  }

  openGate(name) {
    this.#children.get(name).child.stdin.end('\n');
  }

  async startHandler({ words, ready }) {
    const log = join(this.#files, 'handler.log');
    const fd = openSync(log, 'w'); // no pipe: who watches should not have to wait for who reads
    const child = this.#spawn(join(HIERARCHY, HANDLER_CGROUP), 0, words, ['ignore', fd, fd]);
    closeSync(fd);
    const look = () => ready.test(readFileSync(log, 'utf8'));
    await Promise.race([
      until(look, READY_WITHIN_MS, () => `${words[0]} was not ready`),
      this.#refuse(child, words[0], log),
    ]);
  }

  handlerLog() {
    const log = join(this.#files, 'handler.log');
    return existsSync(log) ? readFileSync(log, 'utf8') : '';
  }

  /** Of all processes of the handler: resident KiB, and microseconds of processor time so far. */
  handlerUse() {
    const cgroups = this.#handlerCgroups();
    const pids = cgroups.flatMap((path) =>
      readFileSync(join(path, 'cgroup.procs'), 'utf8').split('\n').filter(Boolean),
    );
    const resident = (pid) => Number(readFileSync(`/proc/${pid}/status`, 'utf8').match(/^VmRSS:\s*(\d+)/m)?.[1] ?? 0);
    return {
      rssKiB: pids.reduce((sum, pid) => sum + resident(pid), 0),
      cpuUs: cgroups.reduce((sum, path) => sum + numberIn(join(path, 'cpu.stat'), 'usage_usec'), 0),
    };
  }

  startSampler(words) {
    return spawn(this.#programs.sampler, words, { stdio: ['ignore', 'pipe', 'inherit'] });
  }

  /** How each job's first process ended (signal, exit code, null while it lives), and what the kernel killed of it. */
  ends() {
    return Object.fromEntries(
      [...this.#children].map(([name, { ended }]) => [
        name,
        { ended, kernelKills: numberIn(join(this.cgroup(name), 'memory.events'), 'oom_kill') },
      ]),
    );
  }

  async #refuse(child, name, log) {
    const [code, signal] = await once(child, 'exit');
    throw new Error(
      `${name} ended at once (${signal ?? code})${log ? `: ${readFileSync(log, 'utf8').slice(-500)}` : ''}`,
    );
  }
}
