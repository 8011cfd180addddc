import { closeAll, type Hierarchy, type Killing, type Memcg, openDescendants } from '../cgroup/cgroup.js';
import { isVanished } from '../errors.js';
import type { Victim } from '../report/report.js';
import { identityOf, type LiveJob, type MemcgJob, type TreeJob } from '../snapshot/jobs.js';
import type { ProcessTree } from '../snapshot/tree.js';
import { formatBytes } from '../units.js';

/** A victim that still lives after this long is helped by process_mrelease(2). */
const SLOW_DEATH_US = 50_000;
/** How long one turn of the event loop may go on killing what a victim forks. */
const ROUNDS_US = 2_000;
/** Less than this that stays charged to a dead job is the kernel's own. */
const WORTH_SAYING = 2 ** 20;

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

interface Dying {
  job: LiveJob;
  killing: Killing;
  /** The job's memcg and those below it; empty for processes. */
  targets: Memcg[];
  /** The start time of a process that was born when it was killed. */
  bornSince: number;
  usageBefore: number;
  record: Victim;
  settled: ((result: KillResult) => void) | null;
  helped: boolean;
}

/** The jobs that are killed in one condition, each followed until all of it is dead. */
export class Victims {
  readonly #hierarchy: Hierarchy;
  readonly #openedUs: number;
  readonly #exited: () => unknown;
  readonly #step: (text: string, atUs: number) => void;
  readonly #killed = new Set<string>();
  #dying: Dying[] = [];
  #lastDeathUs: number | null = null;
  readonly records: Victim[] = [];

  /**
   * @param openedUs when the condition opened: times of the records count from there
   * @param exited called when all processes of a victim that were signalled are gone
   * @param step takes a line for the report
   */
  constructor(
    hierarchy: Hierarchy,
    openedUs: number,
    exited: () => unknown,
    step: (text: string, atUs: number) => void,
  ) {
    this.#hierarchy = hierarchy;
    this.#openedUs = openedUs;
    this.#exited = exited;
    this.#step = step;
  }

  /** Identities of all that were killed. */
  get killed(): ReadonlySet<string> {
    return this.#killed;
  }

  /** Names of those that are not all dead. */
  get dying(): string[] {
    return this.#dying.map(({ job }) => job.name);
  }

  /** When the last of them was seen dead, in the clock's microseconds. */
  get lastDeathUs(): number | null {
    return this.#lastDeathUs;
  }

  /** True if one that is not dead was killed less than `us` ago. */
  isDyingFor(us: number): boolean {
    return this.#dying.some(({ record }) => this.#sinceUs() - record.killedUs < us);
  }

  #sinceUs(): number {
    return this.#hierarchy.clock.nowUs() - this.#openedUs;
  }

  /**
   * Sends SIGKILL to every process of a job.
   * @param dies memory that should come back, in bytes
   * @param settled called once when it is dead, or `settle` says that nobody waits for that any more
   */
  kill(job: LiveJob, dies: number, rung: string, settled: Dying['settled']): Victim {
    // Of many processes only the last exit is worth a look.
    const killing = this.#hierarchy.startKilling(() => {
      if (killing.alive() === 0) this.#exited();
    });
    const targets: Memcg[] = [];
    const bornSince = this.#hierarchy.startTime() - 1;
    let usageBefore = dies;
    try {
      if (job.kind === 'process') {
        killing.signal(job.process);
      } else if (job.kind === 'tree') {
        signalAll(killing, job.tree);
      } else {
        targets.push(job.memcg, ...openDescendants(job.memcg));
        usageBefore = job.memcg.usage();
        killing.round(targets);
      }
    } catch (error) {
      killing.close();
      closeAll(targets.slice(1));
      throw error;
    }
    const killedUs = this.#sinceUs();
    const { id, name } = job;
    const pids = [...killing.pids];
    const record: Victim = { job: id, name, rung, because: '', pids, killedUs, deadUs: null, freed: null, left: null };
    this.#killed.add(identityOf(job));
    this.records.push(record);
    this.#dying.push({ job, killing, targets, bornSince, usageBefore, record, settled, helped: false });
    return record;
  }

  /** Looks who is dead, and kills what was forked since. True if there was such: then look again at once. */
  check(): boolean {
    let forking = false;
    for (const dying of [...this.#dying]) {
      const { job, killing, record } = dying;
      const isSlow = this.#sinceUs() - record.killedUs > SLOW_DEATH_US;
      const hasNew = job.kind !== 'process' && (isSlow || killing.needsRounds) && this.#killForked(dying, job);
      if (hasNew) forking = true;
      else if (killing.alive() === 0 && killing.unreachable === 0) this.#dead(dying);
      else if (!dying.helped && isSlow) {
        dying.helped = true;
        const [reaped] = killing.release();
        if (reaped > 0)
          this.#step(`${job.name} is slow to die: its memory was reaped (process_mrelease)`, this.#sinceUs());
      }
    }
    return forking;
  }

  /** A few rounds over the job's processes, as there is no cgroup.kill. True if the last one still found new ones. */
  #killForked(dying: Dying, job: MemcgJob | TreeJob): boolean {
    const { clock } = this.#hierarchy;
    const stop = clock.nowUs() + ROUNDS_US;
    let signalled = 0;
    do {
      if (job.kind === 'tree') {
        job.tree.hunt(dying.bornSince);
        signalled = signalAll(dying.killing, job.tree);
      } else {
        closeAll(dying.targets.splice(1));
        dying.targets.push(...openDescendants(job.memcg));
        signalled = dying.killing.round(dying.targets);
      }
    } while (signalled > 0 && clock.nowUs() < stop);
    return signalled > 0;
  }

  #dead(dying: Dying): void {
    const { job, record, usageBefore } = dying;
    const left = leftOf(job);
    record.deadUs = this.#sinceUs();
    record.left = left;
    record.freed = Math.max(0, usageBefore - (left ?? 0));
    this.#lastDeathUs = this.#hierarchy.clock.nowUs();
    const back = formatBytes(record.freed);
    const stays =
      left !== null && left >= WORTH_SAYING ? `; ${formatBytes(left)} stay charged (tmpfs or page cache)` : '';
    this.#step(
      record.freed < (left ?? 0) / 2
        ? `${job.name} is dead, but its death brought back only ${back}${stays}`
        : `${job.name} is dead: ${back} came back${stays}`,
      record.deadUs,
    );
    this.#settleOne(dying, true);
    this.#forget(dying);
  }

  /** Nobody waits any more for those that are dying. */
  settle(): void {
    for (const dying of this.#dying) this.#settleOne(dying, false);
  }

  #settleOne(dying: Dying, dead: boolean): void {
    const { killing, record, settled } = dying;
    record.pids = [...killing.pids];
    dying.settled = null;
    settled?.({ job: record.job, processes: record.pids.length, dead, freed: record.freed });
  }

  #forget(dying: Dying): void {
    this.#dying = this.#dying.filter((other) => other !== dying);
    dying.killing.close();
    if (dying.job.kind === 'tree') dying.job.tree.rest();
    closeAll(dying.targets.splice(1)); // the first belongs to the jobs
  }

  close(): void {
    this.settle();
    for (const dying of this.#dying) this.#forget(dying);
  }
}

/** One round of SIGKILL over the members; how many had not had it yet. */
function signalAll(killing: Killing, tree: ProcessTree): number {
  return tree.members().reduce((count, process) => count + killing.signal(process), 0);
}

/** What is still charged to a dead job; null for processes, or if the memcg is gone. */
function leftOf(job: LiveJob): number | null {
  if (job.kind !== 'memcg') return null;
  try {
    return job.memcg.usage();
  } catch (error) {
    if (isVanished(error)) return null;
    throw error;
  }
}
