// Where the episodes of one contender take place: a memcg with a limit, below it one for the service and one for the
// leak, and the observer that looks on.
import { spawnSync } from 'node:child_process';
import { closeSync, mkdirSync, openSync, readFileSync, rmdirSync, writeFileSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { Program } from './program.mjs';

const JOBS = ['service', 'leak'];
/** Memory counts as back when the usage is below this part of the limit. */
const BACK = 0.95;
/** The workload's page of live numbers, 64 bit little-endian words (`reprieve-workload --help`). */
const STATS_BYTES = 4096;
const TOUCH_BEGAN = 6;
/** Nobody outlives the benchmark for long. */
const JOB_TIMEOUT = '20s';

export class Stage {
  #point;
  #workload;
  #files;
  #observer = null;
  #running = [];

  /**
   * @param point where the memory hierarchy is mounted
   * @param path of the memcg to make there
   * @param files a folder for its files, best on tmpfs
   */
  constructor({ point, path, files, workload }) {
    this.path = path;
    this.#point = point;
    this.#files = files;
    this.#workload = workload;
  }

  get memcg() {
    return `${this.#point}${this.path}`;
  }

  jobMemcg(job) {
    return `${this.memcg}/${job}`;
  }

  #statsOf(job) {
    return `${this.#files}/${job}`;
  }

  /** Makes everything; what was made before it threw is removed by `close`. */
  async open(limit, observer) {
    mkdirSync(this.memcg);
    writeFileSync(`${this.memcg}/memory.limit_in_bytes`, String(limit));
    writeFileSync(`${this.memcg}/memory.swappiness`, '0'); // inherited below
    mkdirSync(this.#files);
    for (const job of JOBS) {
      mkdirSync(this.jobMemcg(job));
      writeFileSync(this.#statsOf(job), Buffer.alloc(STATS_BYTES));
    }
    const fifo = `${this.#files}/leak-lives`;
    if (spawnSync('mkfifo', [fifo]).status !== 0) throw new Error(`mkfifo ${fifo} failed`);
    this.#observer = new Program(observer, [this.memcg, String(Math.floor(limit * BACK)), fifo]);
    await this.#observer.line();
  }

  /** Starts a job in its memcg; it is set up and waits at its gate when it has said a line. */
  start(job, args) {
    const common = ['--gate', '--join', this.jobMemcg(job), '--stats', this.#statsOf(job), '--timeout', JOB_TIMEOUT];
    // The write end of the FIFO goes to the leak and all its processes: when the last is gone the observer is told.
    const fifo = job === 'leak' ? openSync(`${this.#files}/leak-lives`, 'w') : null;
    const program = new Program(this.#workload, [...args, ...common], fifo === null ? [] : [fifo]);
    if (fifo !== null) closeSync(fifo);
    this.#running.push(program);
    return program;
  }

  /** Ends the jobs that still run. */
  async clear() {
    await Promise.all(this.#running.splice(0).map((program) => program.end('SIGKILL')));
  }

  /** What the observer has seen since it was asked before; null for what did not happen. */
  async observed() {
    this.#observer.say('');
    const account = JSON.parse(await this.#observer.line());
    return Object.fromEntries(Object.entries(account).map(([name, atUs]) => [name, atUs || null]));
  }

  /** When the latest touch of the leak's began. */
  leakTouchBeganAtUs() {
    return Number(readFileSync(this.#statsOf('leak')).readBigUInt64LE(TOUCH_BEGAN * 8));
  }

  /** Leaves nothing behind, whatever came before. */
  async close() {
    await this.clear();
    await this.#observer?.end();
    attempt(() => writeFileSync(`${this.memcg}/memory.oom_control`, '0'));
    for (const memcg of [...JOBS.map((job) => this.jobMemcg(job)), this.memcg]) {
      // A memcg is busy until its last process is reaped.
      for (let tries = 0; tries < 100 && !attempt(() => rmdirSync(memcg)); tries++) await sleep(20);
    }
  }
}

/** True if it worked, or there is nothing to do it to. */
function attempt(run) {
  try {
    run();
    return true;
  } catch (error) {
    return error.code === 'ENOENT';
  }
}
