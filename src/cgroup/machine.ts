import { readdirSync, readFileSync } from 'node:fs';
import type { Clock } from '../clock.js';
import { fromSystem } from '../errors.js';
import { type ControlFile, type Directory, native } from '../native.js';
import { Approach } from '../source/approach.js';
import { openPressure } from '../source/pressure.js';
import type { Marks } from '../source/shortage.js';
import { PAGE } from '../units.js';
import {
  closeAll,
  type Kills,
  type Listener,
  type Memcg,
  type MemoryUse,
  type OomListener,
  type OomState,
} from './cgroup.js';
import { MeminfoFile } from './meminfo.js';
import { PageLists } from './page-lists.js';

/** No memcg that can be watched has the inode of a hierarchy's root. */
const INODE = 1;
/** What all processors together may take from one moment to the next, in bytes a second. */
const FASTEST = 4 * 2 ** 30;
/** A victim has given its memory back so long after it is chosen, in seconds: what is taken meanwhile must be there still. */
const LEAD_S = 0.03;
/** At most this part of all memory. */
const MOST_LEAD = 0.05;
/** Near: so much above where it is out of memory, as a part of all memory. */
const NEAR = 0.05;
/** While it is near that is told again and again, in microseconds, */
const NEAR_AGAIN_US = 150_000;
/** but whoever is told is not to take more than one part in so many of the time. */
const NEAR_SHARE = 10;
/** A stall counts for so long, */
const STALLED_US = 1_000_000;
/** and only while MemAvailable is below so many times its mark: else it is a disk that is slow. */
const STALL_BELOW = 4;
/** What is in use does not fit where this part of all memory was read again within a second or two. */
const THRASHED = 0.01;
/** After so long without any stall, what was read again before does not count. */
const CALM_US = 3_000_000;
/** Any stall of this many milliseconds in a second is worth a look. */
const WORTH_A_LOOK_MS = 50;

/** The last one before Linux 5.9 only (vmstat_text of mm/vmstat.c). */
const VMSTAT_KEYS = ['oom_kill', 'workingset_refault_anon', 'workingset_refault_file', 'workingset_refault'] as const;
const vmstat = new Float64Array(VMSTAT_KEYS.length);

/** The whole machine, which has the shape of a memcg: all its memory is the limit. */
export class Machine implements Memcg {
  readonly path = '/';
  readonly inode = INODE;
  readonly owner = 0;
  readonly parks = false;
  readonly #clock: Clock;
  readonly #marks: Marks;
  readonly #directory: Directory;
  readonly #vmstat: ControlFile;
  readonly #meminfo: MeminfoFile;
  readonly #pageLists: PageLists;
  readonly #near = new Set<() => void>();
  #approach: Approach | null = null;
  #taken = false;
  /** The lead at which a shortage was found, in bytes; 0 while there is none. */
  #feared = 0;
  /** Bytes that processors kept in their lists when it was found short; null where it was not since it came near to that. */
  #keptBefore: number | null = null;
  #stalledUntilUs = 0;
  /** Bytes that were read again so far, at the last two stalls. */
  #readAgain = { before: 0, last: 0, atUs: 0 };
  /** The part of swap that is zram: what is free there holds less than it says, as it is memory itself. */
  #zram = 0;

  /** @throws the system's error */
  constructor(clock: Clock, marks: Marks) {
    this.#clock = clock;
    this.#marks = marks;
    this.#directory = new (native().Directory)('/proc');
    this.#vmstat = this.#directory.openFile('vmstat', 'read');
    this.#meminfo = new MeminfoFile();
    this.#pageLists = new PageLists(this.#directory, this.limit());
    this.#zram = zramPart();
  }

  oomState(): OomState {
    return { killDisabled: this.#taken, underOom: this.isFull() };
  }

  kills(): Kills {
    this.#vmstat.readFields(VMSTAT_KEYS, vmstat);
    const counted = vmstat[0] || 0;
    return { counted, processes: counted }; // how many jobs died whole is not counted here
  }

  usage(): number {
    const { total, available } = this.#meminfo.read();
    return total - available;
  }

  limit(): number {
    return this.#meminfo.read().total;
  }

  /** What is left, in bytes, before memory and swap are used up. */
  #left(): number {
    const { available, swapFree, swapTotal } = this.#meminfo.read();
    const swap = swapFree * (1 - this.#zram / 2) - (swapTotal > 0 ? this.#marks.swapFree : 0);
    return available - this.#marks.available + Math.max(0, swap);
  }

  /** What is left of it before the lead, with what was freed into the lists of processors since it was short. */
  #beyond(left: number, lead: number): number {
    const beyond = left - lead;
    if (this.#keptBefore === null) return beyond;
    if (beyond <= 0) {
      const kept = this.#pageLists.kept();
      this.#keptBefore = Math.min(this.#keptBefore, kept); // the kernel may have emptied them since
      return beyond + kept - this.#keptBefore;
    }
    if (left > NEAR * this.limit()) this.#keptBefore = null;
    return beyond;
  }

  isFull(): boolean {
    // Until memory has come back, or more is left than was feared for: whoever takes it may only be held.
    const rate = this.#approach?.rate ?? 0;
    const left = this.#left();
    const lead = rate === 0 ? 0 : Math.max(this.#feared, this.#lead(rate));
    const isShort = this.#beyond(left, lead) <= 0;
    this.#feared = isShort ? lead : 0;
    if (isShort) {
      this.#keptBefore ??= this.#pageLists.kept();
      return true;
    }
    return this.#stalledUntilUs > this.#clock.nowUs() && this.#isTight();
  }

  #isTight(): boolean {
    return this.#meminfo.read().available < STALL_BELOW * this.#marks.available;
  }

  #bytesReadAgain(): number {
    this.#vmstat.readFields(VMSTAT_KEYS, vmstat);
    return PAGE * ((vmstat[1] || 0) + (vmstat[2] || 0) + (vmstat[3] || 0));
  }

  #noteReadAgain(): void {
    const atUs = this.#clock.nowUs();
    const bytes = this.#bytesReadAgain();
    const isCalm = atUs - this.#readAgain.atUs > CALM_US;
    this.#readAgain = { before: isCalm ? bytes : this.#readAgain.last, last: bytes, atUs };
  }

  /** Tasks stand still as well while much is written to swap, which is what it is for. */
  #isThrashing(): boolean {
    return this.#bytesReadAgain() - this.#readAgain.before >= THRASHED * this.limit();
  }

  /** What will be taken until a victim that is chosen now is dead. */
  #lead(rate: number): number {
    return Math.min(MOST_LEAD * this.limit(), rate * LEAD_S);
  }

  /** Signals when memory is used up: found by looking, the more often the nearer it is, and by stalls. */
  listen(signal: (atUs: number) => void): OomListener {
    let nearAgainUs = 0;
    const approach = new Approach(this.#clock, {
      left: () => this.#left(),
      fastest: FASTEST,
      lead: (rate) => this.#lead(rate),
      beyond: (left, lead) => this.#beyond(left, lead),
      looked: (left, _, beyond) => {
        const beganUs = this.#clock.nowUs();
        if (beyond <= 0) return signal(beganUs);
        if (left > NEAR * this.limit()) nearAgainUs = 0;
        else if (beganUs >= nearAgainUs) {
          for (const near of this.#near) near();
          const endUs = this.#clock.nowUs();
          nearAgainUs = endUs + Math.max(NEAR_AGAIN_US, (endUs - beganUs) * NEAR_SHARE);
        }
      },
    });
    this.#approach = approach;
    const listeners: Listener[] = [approach];
    const directory = new (native().Directory)('/proc/pressure');
    try {
      const look = () => {
        this.#noteReadAgain();
        approach.look();
      };
      listeners.push(openPressure(directory, 'memory', 'some', WORTH_A_LOOK_MS, look));
      if (this.#marks.stallMs > 0) {
        listeners.push(
          openPressure(directory, 'memory', 'full', this.#marks.stallMs, (atUs) => {
            if (!this.#isThrashing()) return;
            this.#stalledUntilUs = this.#clock.nowUs() + STALLED_US;
            if (this.#isTight()) signal(atUs);
          }),
        );
      }
    } catch (error) {
      closeAll(listeners);
      throw error;
    } finally {
      directory.close();
    }
    return {
      close: () => closeAll(listeners),
      trigger: () => setImmediate(() => signal(this.#clock.nowUs())),
    };
  }

  listenNear(near: () => void): Listener {
    this.#near.add(near);
    return { close: () => this.#near.delete(near) };
  }

  memory(): MemoryUse {
    throw new Error('the memory of the machine is not told apart');
  }

  /** The kernel's killer cannot be switched off: it stays beneath as the net. */
  setKillDisabled(disabled: boolean): void {
    this.#taken = disabled;
  }

  isArmed(): boolean {
    this.#zram = zramPart();
    return this.#taken;
  }

  attribute(): string | null {
    return null;
  }

  /** By a lock on a directory of /proc that all handlers see. */
  claim(): boolean {
    return this.#directory.claim();
  }

  unclaim(): void {
    this.#directory.unclaim();
  }

  /** Its jobs are found by other means. */
  children(): string[] {
    return [];
  }

  child(name: string): Memcg {
    throw new Error(`the machine has no memcg ${name} of its own`);
  }

  pids(): number[] {
    try {
      return readdirSync('/proc').map(Number).filter(Number.isInteger);
    } catch (error) {
      throw fromSystem(error, 'listing the processes');
    }
  }

  kernelReserve(): null {
    return null;
  }

  close(): void {
    this.#vmstat.close();
    this.#meminfo.close();
    this.#pageLists.close();
    this.#directory.close();
  }
}

/** The part of all swap that lies on zram devices (proc_swaps(5)). */
export function zramPart(): number {
  let [all, zram] = [0, 0];
  for (const line of readFileSync('/proc/swaps', 'utf8').split('\n').slice(1)) {
    const [name = '', , size] = line.split(/\s+/);
    all += Number(size ?? 0);
    if (name.startsWith('/dev/zram')) zram += Number(size ?? 0);
  }
  return all === 0 ? 0 : zram / all;
}
