import { closeAll, type Hierarchy, type Memcg, openDescendants } from '../cgroup/cgroup.js';
import { isVanished, messageOf } from '../errors.js';
import type { Decision } from '../policy/decision.js';
import { explain } from '../policy/lowest-priority.js';
import type { Outcome, Report } from '../report/report.js';
import type { ReserveCounters } from '../reserve/account.js';
import type { JobGroup } from '../snapshot/jobs.js';
import type { Snapshot } from '../snapshot/snapshot.js';
import { shownPath } from '../source/scope.js';
import { withReason } from './answer.js';
import { NOBODY_KILLED, type Toll } from './toll.js';

/** Threads listed as waiting, at most. */
const MOST_WAITERS = 200;

/** What the story of a condition is about. */
interface StorySetup {
  hierarchy: Hierarchy;
  owner: Memcg;
  scopes: string[];
  jobs: readonly JobGroup[];
  reserve: { counters(): ReserveCounters };
  toll: Toll;
}

/** What happened in a condition, as it goes on; in the end its report. Times are microseconds from the event. */
export class Story {
  readonly #setup: StorySetup;
  readonly #openedUs: number;
  readonly #rung: () => string;
  /** What is to be put into words when there is time for it. */
  readonly #words: (() => void)[] = [];
  readonly report: Report;

  /**
   * @param openedUs when the condition opened, on the hierarchy's clock
   * @param rung names whose turn it is
   * @param kept lists that others write to
   */
  constructor(
    id: string,
    setup: StorySetup,
    openedUs: number,
    rung: () => string,
    kept: Pick<Report, 'victims' | 'windows'>,
  ) {
    this.#setup = setup;
    this.#openedUs = openedUs;
    this.#rung = rung;
    this.report = {
      version: 1,
      id,
      owner: shownPath(setup.owner.path),
      scopes: setup.scopes,
      openedAt: '',
      outcome: 'cleared',
      timings: { snapshotUs: null, decidedUs: null, killedUs: null, deadUs: null, clearedUs: null, endedUs: 0 },
      ...NOBODY_KILLED,
      snapshot: null,
      decisions: [],
      explanation: [],
      victims: kept.victims,
      kernelVictims: [],
      waiters: [],
      steps: [],
      pokes: 0,
      reserve: setup.reserve.counters(),
      windows: kept.windows,
    };
  }

  sinceUs(): number {
    return this.#setup.hierarchy.clock.nowUs() - this.#openedUs;
  }

  step(text: string, atUs = this.sinceUs(), rung = this.#rung()): void {
    this.report.steps.push({ atUs, rung, text });
  }

  /** Says something when there is time for it: a victim needs the CPU more than we do. */
  later(say: () => void): void {
    this.#words.push(say);
  }

  speak(): void {
    for (const word of this.#words.splice(0)) word();
  }

  /** Says when it opened, once there is time for it. */
  opened(): void {
    this.report.openedAt = new Date(Date.now() - this.sinceUs() / 1000).toISOString();
  }

  /** The first snapshot is the report's. */
  keep(snapshot: Snapshot): Snapshot {
    if (this.report.snapshot === null) {
      this.report.snapshot = snapshot;
      this.report.timings.snapshotUs = this.sinceUs();
    }
    return snapshot;
  }

  decided(decision: Decision): void {
    const atUs = this.sinceUs();
    const rung = this.#rung();
    this.report.timings.decidedUs ??= atUs;
    this.later(() => this.report.decisions.push({ ...withReason(decision), rung, atUs }));
  }

  /** The first SIGKILL was sent. */
  killed(atUs: number): void {
    if (this.report.timings.killedUs !== null) return;
    this.#setup.toll.killed();
    this.report.timings.killedUs = atUs;
  }

  /** Who waits: seen while an answer is awaited, or before a hand-over; after a kill they run again at once. */
  noteWaiters(): void {
    if (this.report.waiters.length > 0) return;
    const { hierarchy, jobs, owner } = this.#setup;
    const note = (job: string, memcg: Memcg) => {
      const left = MOST_WAITERS - this.report.waiters.length;
      for (const waiter of hierarchy.listWaiters(memcg, left)) this.report.waiters.push({ job, ...waiter });
    };
    try {
      note(shownPath(owner.path), owner);
      for (const job of jobs.flatMap((group) => group.live())) {
        if (job.kind !== 'memcg') continue;
        const below = openDescendants(job.memcg);
        for (const memcg of [job.memcg, ...below]) note(job.name, memcg);
        closeAll(below);
      }
    } catch (error) {
      if (!isVanished(error)) throw error; // only for the report; the next look finds out
    }
  }

  end(outcome: Outcome, kernelVictims: Report['kernelVictims']): Report {
    const { report } = this;
    this.speak();
    report.steps.sort((a, b) => a.atUs - b.atUs);
    report.reserve = this.#setup.reserve.counters();
    report.outcome = outcome;
    Object.assign(report, this.#setup.toll.figures(report.timings.killedUs));
    report.timings.endedUs = this.sinceUs();
    report.openedAt ||= new Date().toISOString();
    try {
      if (report.snapshot !== null) report.explanation = explain(report.snapshot, report.victims[0]);
    } catch (error) {
      this.step(`explaining failed: ${messageOf(error)}`); // a policy may have changed the snapshot
    }
    report.kernelVictims = kernelVictims;
    for (const { job, processes } of kernelVictims) this.step(`the kernel killed ${count(processes)} of ${job}`);
    return report;
  }
}

export function count(processes: number): string {
  return processes === 1 ? '1 process' : `${processes} processes`;
}
