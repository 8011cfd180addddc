import type { Hierarchy, Memcg } from '../cgroup/cgroup.js';
import { ReprieveError } from '../errors.js';
import {
  newWindowRecord,
  type OverchargeGround,
  OverchargeWindow,
  sayClosed,
  sayLimit,
  sayOpened,
  type WindowRecord,
} from '../reserve/overcharge.js';
import type { JobGroup, LiveJob } from '../snapshot/jobs.js';

/** What the overcharge windows of a condition need of it. */
interface WindowsSetup {
  hierarchy: Hierarchy;
  owner: Memcg;
  above: readonly Memcg[];
  jobs: readonly JobGroup[];
  /** Null where no window can be opened. */
  overcharge: OverchargeGround | null;
}

/** The one that is being opened, open, or being closed. */
interface Current {
  unwanted: AbortController;
  opened: Promise<OverchargeWindow | null>;
  open: OverchargeWindow | null;
}

/** The overcharge windows of a condition, one after the other. */
export class ConditionWindows {
  readonly #setup: WindowsSetup;
  readonly #sinceUs: () => number;
  readonly #step: (text: string, atUs?: number) => void;
  readonly records: WindowRecord[] = [];
  #current: Current | null = null;
  /** The latest whose limit could not be put back at once; all of one memcg are put back together. */
  #due: WindowRecord | null = null;
  #ended = false;
  #closedUs = Number.NEGATIVE_INFINITY;

  constructor(setup: WindowsSetup, sinceUs: () => number, step: (text: string, atUs?: number) => void) {
    this.#setup = setup;
    this.#sinceUs = sinceUs;
    this.#step = step;
  }

  /** There is one: with frozen jobs and a raised limit the memcg does not show who waits. */
  get any(): boolean {
    return this.#current !== null;
  }

  /** Whether the jobs use all that they may; null if no window is open, and the memcg tells. */
  get isFull(): boolean | null {
    return this.#current?.open?.isFull ?? null;
  }

  /** The limit that the jobs have; null if no window is open. */
  get limitBefore(): number | null {
    return this.#current?.open?.limitBefore ?? null;
  }

  /** Jobs were thawed less than `us` ago, and have not all tried again. */
  closedWithin(us: number): boolean {
    return this.#closedUs > this.#setup.hierarchy.clock.nowUs() - us;
  }

  /**
   * @param whyNot why none may be opened now
   * @param freed called with every part of `bytes` that is free again, also if it fails
   * @throws ReprieveError as `Reserve.overcharge`
   */
  async open(
    bytes: number,
    stopWithin: number,
    whyNot: string | null,
    freed: (bytes: number) => void,
  ): Promise<OverchargeWindow> {
    const { jobs, owner, above, overcharge } = this.#setup;
    const record = newWindowRecord(bytes, this.#sinceUs());
    this.records.push(record);
    const refuse = (why: string) => {
      freed(bytes);
      record.refused = why;
      if (overcharge !== null) overcharge.counters.refused++;
      this.#step(`no overcharge window: ${why}`);
      return new ReprieveError(
        'ERR_REPRIEVE_WINDOW_REFUSED',
        `No overcharge window was opened in ${owner.path}: ${why}`,
      );
    };
    if (overcharge === null) throw refuse('there is no v1 freezer here, or the memcg is not watched itself');
    if (this.#current !== null) throw refuse('there is one already');
    if (this.#ended) throw refuse('the watch is being closed');
    if (whyNot !== null) throw refuse(whyNot);
    const unwanted = new AbortController();
    const opening = OverchargeWindow.open(overcharge, {
      owner,
      above,
      jobs: () => jobs.flatMap((group) => group.live()),
      bytes,
      stopWithin,
      signal: unwanted.signal,
      record,
      sinceUs: this.#sinceUs,
      freed,
      closed: () => this.#closed(record),
    });
    const current: Current = { unwanted, opened: opening.catch(() => null), open: null };
    this.#current = current;
    try {
      current.open = await opening;
    } catch (error) {
      this.#current = null;
      this.#step(`no overcharge window: ${record.refused}`);
      throw error;
    }
    this.#step(sayOpened(record), record.openedUs ?? 0);
    return current.open;
  }

  #closed(record: WindowRecord): void {
    this.#current = null;
    this.#closedUs = this.#setup.hierarchy.clock.nowUs();
    if (record.limit === 'due') this.#due = record;
    if (record.openedUs !== null) this.#step(sayClosed(record));
  }

  /** Looks whether something in it waits for more than there is. */
  check(): void {
    this.#current?.open?.check();
  }

  /** A victim goes alone: frozen it would not die. A window that is still being opened is not any more. */
  thaw(victim: LiveJob): void {
    this.#current?.unwanted.abort();
    this.#current?.open?.thaw(victim);
  }

  /** Closes it, and opens none any more. */
  async end(): Promise<void> {
    this.#ended = true;
    await this.close();
  }

  async close(): Promise<void> {
    this.#current?.unwanted.abort();
    const opened = await this.#current?.opened;
    await opened?.close();
  }

  /** Puts a limit back that was due, now that somebody has died. */
  settleLimit(): void {
    const { overcharge } = this.#setup;
    if (overcharge === null || this.#due === null) return;
    overcharge.limits.settle();
    if (this.#due.limit === 'due') return;
    this.#step(sayLimit(this.#due));
    this.#due = null;
  }
}
