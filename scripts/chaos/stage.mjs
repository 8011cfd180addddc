// Where an episode takes place: a memcg with a limit, its jobs and their freezer cgroups, the folder for the handler's
// state, a bystander outside; and what others do to them. It knows how everything was, and leaves nothing.
import { spawnSync } from 'node:child_process';
import {
  closeSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  rmdirSync,
  rmSync,
  statSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { Child } from './child.mjs';
import { BOMB_PIDS } from './scenario.mjs';

export const PREFIX = 'reprieve-test-chaos-';
/** Nobody outlives an episode for long, whatever becomes of the runner. */
const JOB_TIMEOUT = '30s';
/** As it is in the beginning, and as it must be in the end. */
const CONTROL_FILES = [
  'memory.limit_in_bytes',
  'memory.memsw.limit_in_bytes',
  'memory.soft_limit_in_bytes',
  'memory.swappiness',
  'memory.oom_control',
];
const STATE_BYTES = 256 << 10;
/** A child that is born into a full memcg dies of it where the C library uses restartable sequences. */
const NO_RSEQ = { GLIBC_TUNABLES: 'glibc.pthread.rseq=0' };

export class Stage {
  /** Jobs by name: `{ child, priority, protected, scoreAdj, exemptUs, addedUs, born }`. */
  jobs = new Map();
  /** Others, outside of the memcg: they must live, and keep their score. */
  innocents = [];
  /** Expected values, by file; `null` for one that is gone by somebody else's hand. */
  #before = new Map();
  #points;
  #workload;
  #mounted = false;
  #removed = false;
  #filler = null;

  constructor(scenario, { points, workload, folder, runner = process.pid }) {
    this.scenario = scenario;
    this.name = `${PREFIX}${runner}-${scenario.episode}`;
    this.#points = points;
    this.#workload = workload;
    this.folder = `${folder}/${scenario.episode}`;
    this.state = `${this.folder}/state`;
  }

  get path() {
    return `/${this.name}`;
  }

  get memcg() {
    return this.#points.memory + this.path;
  }

  /** A cgroup that holds the handler and all that it starts, whatever becomes of them. */
  get handlerGroup() {
    return `${this.#points.pids}${this.path}-handler`;
  }

  get #bombGroup() {
    return `${this.#points.pids}${this.path}-bomb`;
  }

  #freezer(job = '') {
    return `${this.#points.freezer}${this.path}${job && `/${job}`}`;
  }

  /** Names of the jobs' freezer cgroups: two may share one, and some have none. */
  #freezers() {
    const names = [...this.scenario.jobs, this.scenario.late].map(({ freezer }) => freezer);
    return new Set(names.filter((name) => name !== null));
  }

  #groupOf(job) {
    return this.scenario.flat ? this.memcg : `${this.memcg}/${job}`;
  }

  /** Makes the cgroups, and starts the jobs: they wait at their gates. */
  async open() {
    const { limit, memsw, jobs, late, scenes } = this.scenario;
    mkdirSync(this.state, { recursive: true });
    if (scenes.includes('mount')) this.#mountState();
    mkdirSync(this.memcg);
    writeFileSync(`${this.memcg}/memory.limit_in_bytes`, String(limit));
    if (memsw) write(`${this.memcg}/memory.memsw.limit_in_bytes`, String(limit)); // not where swap is not counted
    writeFileSync(`${this.memcg}/memory.swappiness`, '0'); // inherited below
    mkdirSync(this.#freezer());
    mkdirSync(this.handlerGroup);
    for (const name of this.#freezers()) mkdirSync(this.#freezer(name));
    for (const { name } of [...jobs, late]) {
      if (!this.scenario.flat && name !== late.name) mkdirSync(this.#groupOf(name));
    }
    if (jobs.some(({ kind }) => kind === 'bomb')) {
      mkdirSync(this.#bombGroup);
      writeFileSync(`${this.#bombGroup}/pids.max`, String(BOMB_PIDS));
    }
    this.#remember();
    this.#innocent();
    await Promise.all(jobs.map((job) => this.#start(job)));
    for (const job of this.jobs.values()) job.home = freezerOf(job.child.pid);
    for (const { kind, freezer } of jobs)
      if (kind === 'frozen') writeFileSync(`${this.#freezer(freezer)}/freezer.state`, 'FROZEN');
  }

  /** Starts a job and waits until it stands at its gate. */
  async #start(job, born = 0) {
    const joins = [this.#groupOf(job.name)];
    if (job.freezer !== null) joins.push(this.#freezer(job.freezer));
    if (job.kind === 'bomb') joins.push(this.#bombGroup);
    const words = [...job.words, ...joins.flatMap((path) => ['--join', path])];
    const child = new Child(this.#workload, [...words, '--name', job.name, '--gate', '--timeout', JOB_TIMEOUT], {
      env: { ...process.env, ...NO_RSEQ },
    });
    const known = { ...job, scoreAdj: job.scoreAdj ?? 0, child, exemptUs: null, born };
    const key = this.jobs.has(job.name) ? `${job.name}#${child.pid}` : job.name;
    this.jobs.set(key, known);
    // A job that is added to a full memcg does not get as far as its gate.
    const line = await Promise.race([child.line(), sleep(born === 0 ? 5_000 : 100, 'late', { ref: false })]);
    if (line !== 'ready' && born === 0) throw new Error(`${job.name} did not start: ${child.complaints || line}`);
    if (known.scoreAdj !== 0) writeFileSync(`/proc/${child.pid}/oom_score_adj`, String(known.scoreAdj));
    return known;
  }

  /** Opens the gates of the jobs of a kind, or of all others. */
  go(leaks) {
    for (const { kind, child } of this.jobs.values()) {
      if ((kind === 'leak' || kind === 'bomb') === leaks) child.endInput();
    }
  }

  #innocent(scoreAdj = 0) {
    const words = ['hold', '--bytes', '64KiB', '--timeout', JOB_TIMEOUT];
    const child = new Child(this.#workload, words);
    if (scoreAdj !== 0) writeFileSync(`/proc/${child.pid}/oom_score_adj`, String(scoreAdj));
    this.innocents.push({ child, scoreAdj });
    return child;
  }

  // --- Control files ---

  #remember() {
    const groups = this.scenario.flat ? [''] : ['', ...this.scenario.jobs.map(({ name }) => `/${name}`)];
    for (const group of groups) this.#rememberGroup(`${this.memcg}${group}`);
    for (const name of ['', ...this.#freezers()])
      this.#before.set(`${this.#freezer(name)}/freezer.state`, name === 'frozen' ? 'FROZEN' : 'THAWED');
  }

  #rememberGroup(group) {
    for (const file of CONTROL_FILES.map((name) => `${group}/${name}`)) {
      const value = readValue(file);
      if (value !== null) this.#before.set(file, value);
    }
  }

  /** What is not as it was, in words. */
  changedFiles() {
    return [...this.#before].flatMap(([file, value]) => {
      const now = readValue(file);
      if (now === value) return [];
      if (now === null && this.#removed) return [];
      return [`${file.slice(this.#points.memory.lastIndexOf('/'))} is ${now}, was ${value}`];
    });
  }

  /** Jobs' living processes whose score is not what it was. */
  changedScores(processes) {
    return processes.flatMap(({ pid, job }) => {
      const was = this.jobs.get(job)?.scoreAdj ?? 0;
      const now = readValue(`/proc/${pid}/oom_score_adj`);
      return now === null || Number(now) === was ? [] : [`oom_score_adj of ${job} (${pid}) is ${now}, was ${was}`];
    });
  }

  /** Jobs' living processes that are not in the freezer cgroup that they were in. */
  strayed(processes) {
    return processes.flatMap(({ pid, job }) => {
      const was = this.jobs.get(job)?.home ?? null;
      const now = freezerOf(pid);
      const strays = was === null ? /\/reprieve-frozen-/.test(now) : now !== null && now !== was;
      return strays ? [`${job} (${pid}) is in the freezer cgroup ${now}, was in ${was}`] : [];
    });
  }

  /** What happened to those who have nothing to do with it. */
  harmedInnocents() {
    return this.innocents.flatMap(({ child, scoreAdj }) => {
      if (child.ended !== null)
        return [`a process outside of the memcg is dead: ${child.ended.signal ?? child.ended.code}`];
      const now = Number(readValue(`/proc/${child.pid}/oom_score_adj`));
      return now === scoreAdj ? [] : [`oom_score_adj of a process outside is ${now}, was ${scoreAdj}`];
    });
  }

  // --- What others do ---

  /** Somebody kills all jobs, and removes the memcg. */
  async removeMemcg(remade) {
    this.#removed = true;
    for (const job of this.jobs.values()) job.exemptUs ??= nowUs();
    const end = performance.now() + 1_000;
    while (!removeGroup(this.memcg) && performance.now() < end) await sleep(5);
    if (!remade || !makeGroup(this.memcg)) return;
    // Another's, who wants the kernel's killer off there.
    write(`${this.memcg}/memory.oom_control`, '1');
    this.#rememberGroup(this.memcg);
  }

  changeLimit(by) {
    const file = `${this.memcg}/memory.limit_in_bytes`;
    const value = String(this.scenario.limit + by);
    if (!write(file, value)) return; // refused below what is in use
    this.#before.set(file, value);
    // In a window, whose limit of memory and swap was raised: what that was does not go with this one (EINVAL).
    if (this.scenario.memsw && by > 0) this.#before.set(`${this.memcg}/memory.memsw.limit_in_bytes`, value);
  }

  /** Somebody gives the memcg to the kernel. */
  writeKiller() {
    write(`${this.memcg}/memory.oom_control`, '0');
    this.killerWrittenUs = nowUs();
  }

  async addJob() {
    if (this.#removed || this.jobs.has(this.scenario.late.name)) return;
    const group = this.#groupOf(this.scenario.late.name);
    if (!this.scenario.flat && makeGroup(group)) {
      this.#rememberGroup(group);
      // It is born with what the memcg above has for the moment.
      this.#before.set(`${group}/memory.oom_control`, 'oom_kill_disable 0');
    }
    const job = await this.#start(this.scenario.late, nowUs());
    job.child.endInput();
  }

  /** A job ends by itself; where it has a memcg, another may be made in its place, which is another job. */
  async endJob(which, remade) {
    const names = [...this.jobs.keys()].filter((name) => ['service', 'holder'].includes(this.jobs.get(name).kind));
    const job = this.jobs.get(names[Math.floor(which * names.length)]);
    if (job === undefined || job.exemptUs !== null) return;
    job.exemptUs = nowUs();
    job.child.kill('SIGTERM');
    await Promise.race([job.child.gone, sleep(300, undefined, { ref: false })]);
    if (!remade || this.scenario.flat || this.#removed || job.child.ended === null) return;
    const group = this.#groupOf(job.name);
    if (!attempt(() => rmdirSync(group)) || !(await this.#makeAnew(group))) return;
    const { child, exemptUs, born, ...settings } = job;
    (await this.#start(settings, nowUs())).child.endInput();
  }

  /** Where it cannot be made anew, nothing is expected of it. */
  async #makeAnew(group) {
    for (let tries = 0; tries < 50; tries++) {
      if (makeGroup(group)) return true;
      await sleep(2);
    }
    for (const file of this.#before.keys()) if (file.startsWith(`${group}/`)) this.#before.delete(file);
    return false;
  }

  /**
   * Gives the numbers of jobs that died to others, who say of themselves what a raised process would: only its start time
   * tells one from the other.
   */
  async reusePids() {
    const dead = [...this.jobs.values()].filter(({ child }) => child.pid !== undefined);
    const end = performance.now() + 200;
    while (dead.every(({ child }) => child.ended === null) && performance.now() < end) await sleep(1);
    for (const { child } of dead.filter(({ child }) => child.ended !== null)) {
      for (let tries = 0; tries < 20; tries++) {
        if (!write('/proc/sys/kernel/ns_last_pid', String(child.pid - 1))) return;
        const other = this.#innocent(1000);
        if (other.pid === child.pid) break;
        this.innocents.pop();
        other.kill('SIGKILL');
      }
    }
  }

  #mountState() {
    run('mount', ['-t', 'tmpfs', '-o', `size=${STATE_BYTES}`, 'reprieve-test', this.state]);
    this.#mounted = true;
  }

  fillState() {
    this.#filler ??= openSync(`${this.state}/filler`, 'w');
    for (const size of [16384, 1024, 1]) while (attempt(() => writeSync(this.#filler, Buffer.alloc(size)) === size));
  }

  lockState() {
    run('mount', ['-o', 'remount,ro', this.state]);
  }

  /** There is room again, as after an administrator had a look. */
  healState() {
    if (!this.#mounted) return;
    if (this.#filler !== null) closeSync(this.#filler);
    this.#filler = null;
    attempt(() => run('mount', ['-o', 'remount,rw', this.state]));
    rmSync(`${this.state}/filler`, { force: true });
  }

  /** Files in the handler's folder, but for the guards' records. */
  leftFiles() {
    return readdirSync(this.state).filter((name) => name !== 'records' && name !== 'filler');
  }

  /** What the guards wrote down. */
  records() {
    const folder = `${this.state}/records`;
    return namesIn(folder).map((name) => readValue(`${folder}/${name}`) ?? '');
  }

  /** Cgroups that handlers of these numbers made and left: for themselves, for windows, for whom they froze. */
  madeGroups(pids) {
    const { memory, freezer } = this.#points;
    const isTheirs = (name) =>
      pids.some((pid) => new RegExp(`^reprieve-(handler|window|frozen)-${pid}(-|$)`).test(name));
    const freezers = [...this.#freezers()].map((name) => this.#freezer(name));
    const places = [memory, this.memcg, `${freezer}${freezerOf(process.pid)}`, this.#freezer(), ...freezers];
    return [...new Set(places)].flatMap((place) => namesIn(place, true).filter(isTheirs));
  }

  // --- The end ---

  /** Leaves nothing, whatever came before. Throws if something is left. */
  async close() {
    for (const { child } of [...this.jobs.values(), ...this.innocents]) child.kill('SIGKILL');
    const groups = [
      ...namesIn(this.#freezer()).map((name) => this.#freezer(name)),
      this.#freezer(),
      this.memcg,
      this.handlerGroup,
      this.#bombGroup,
    ];
    await sweep(groups);
    for (const { child } of [...this.jobs.values(), ...this.innocents]) {
      await child.gone;
      child.release();
    }
    this.healState();
    if (this.#mounted) run('umount', [this.state]);
    rmSync(this.folder, { recursive: true, force: true });
  }
}

export const nowUs = () => Number(process.hrtime.bigint() / 1000n);

/** Kills what is in cgroups of this run and removes them. */
export async function sweep(groups) {
  const left = new Set(groups);
  for (let tries = 0; left.size > 0; tries++) {
    for (const group of left) if (removeGroup(group)) left.delete(group);
    if (tries > 400) throw new Error(`cannot remove ${[...left].join(', ')}`);
    if (left.size > 0) await sleep(5);
  }
}

/** True when it is gone. Whatever is in there was started by this run: it is killed. */
function removeGroup(group) {
  for (const name of namesIn(group, true)) removeGroup(`${group}/${name}`);
  if (!statSyncOr(group)) return true;
  write(`${group}/freezer.state`, 'THAWED');
  write(`${group}/memory.oom_control`, '0');
  for (const pid of (readValue(`${group}/cgroup.procs`) ?? '').split('\n').filter(Boolean)) {
    attempt(() => process.kill(Number(pid), 'SIGKILL'));
    attempt(() => process.kill(Number(pid), 'SIGCONT'));
  }
  return attempt(() => rmdirSync(group));
}

function namesIn(directory, directories = false) {
  try {
    const entries = readdirSync(directory, { withFileTypes: true });
    return entries.filter((entry) => !directories || entry.isDirectory()).map(({ name }) => name);
  } catch {
    return [];
  }
}

/** Text of a control file, or the field that counts; null if it is gone. */
function readValue(file) {
  try {
    const text = readFileSync(file, 'utf8').trim();
    return file.endsWith('memory.oom_control') ? /oom_kill_disable \d/.exec(text)[0] : text;
  } catch {
    return null;
  }
}

/** Path of a process's freezer cgroup; null if it is gone. */
function freezerOf(pid) {
  return /:freezer:(.*)$/m.exec(readValue(`/proc/${pid}/cgroup`) ?? '')?.[1] ?? null;
}

function statSyncOr(file) {
  return statSync(file, { throwIfNoEntry: false }) !== undefined;
}

function makeGroup(group) {
  return attempt(() => mkdirSync(group));
}

function write(file, text) {
  // Never made anew: on a cgroup file system a file that is not there must not be.
  return attempt(() => writeFileSync(file, text, { flag: 'r+' }));
}

function attempt(step) {
  try {
    return step() !== false;
  } catch {
    return false;
  }
}

function run(program, words) {
  const { status, stderr } = spawnSync(program, words, { encoding: 'utf8' });
  if (status !== 0) throw new Error(`${program} ${words.join(' ')}: ${stderr}`);
}
