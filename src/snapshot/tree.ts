import type { MemoryUse, Process } from '../cgroup/cgroup.js';
import { isVanished } from '../errors.js';
import { groupOf, type ProcessFacts } from './processes.js';

/** A process of a tree, as it was when it was last looked at. */
export interface Member {
  readonly process: Process;
  readonly facts: ProcessFacts;
}

/**
 * A job that is held together by descent or by what its processes have in common, where no memcg of their own does that.
 * A member is known by descriptor and start time, and stays one whoever adopts it.
 */
export class ProcessTree {
  readonly #members = new Map<number, Member>();
  /** Living processes that were born of a member and belong to another job: by number, when they were born. */
  readonly #begotten = new Map<number, number>();
  /** Sessions and process groups that a member began. Their number is nobody else's while one of their processes lives. */
  readonly #began = new Set<number>();
  readonly #scan: () => void;
  #hunt: { since: number; groups: Set<number> } | null = null;

  /** @param scan looks for processes that are new, and puts those of this tree into it */
  constructor(scan: () => void) {
    this.#scan = scan;
  }

  /** Living processes, as of the last look. */
  members(): Process[] {
    return [...this.#members.values()].map(({ process }) => process);
  }

  pids(): number[] {
    return [...this.#members.keys()];
  }

  get size(): number {
    return this.#members.size;
  }

  /**
   * The sum over the members, from /proc/PID/status, which never waits for their memory. A page that several of them
   * share is counted in each, so what `shmem`, `file` and forked `anon` come to may be more than is there.
   */
  memory(): MemoryUse {
    const sum = { anon: 0, swap: 0, shmem: 0, file: 0 };
    for (const { process } of this.#members.values()) {
      try {
        const { anon, swap, shmem, file } = process.memory();
        sum.anon += anon;
        sum.swap += swap;
        sum.shmem += shmem;
        sum.file += file;
      } catch (error) {
        if (!isVanished(error)) throw error;
      }
    }
    return sum;
  }

  /** Processes in which what was written to a member may have been inherited, now: the members, and what is born of them. */
  kin(): number[] {
    this.#scan();
    return [...this.#members.keys(), ...this.#begotten.keys()];
  }

  /** Whether what was written to a member may have been inherited by that process. */
  isKin(pid: number, started: number): boolean {
    return this.#members.get(pid)?.facts.started === started || this.#begotten.get(pid) === started;
  }

  // --- Killing ---

  /**
   * Looks for members that were forked since. From the first call until `rest`, who was born after that call and is in a
   * member's process group under a parent that is not, is one: its parent, unseen itself or just killed, is gone.
   * @param since the start time of a process that is born now
   */
  hunt(since: number): void {
    if (this.#hunt === null) {
      const groups = [...this.#members.values()].map(({ facts }) => facts.group);
      this.#hunt = { since, groups: new Set(groups) };
    }
    this.#scan();
  }

  /** It is dead, or nobody waits any more until it is. */
  rest(): void {
    this.#hunt = null;
  }

  get isHunted(): boolean {
    return this.#hunt !== null;
  }

  // --- For whoever looks for processes ---

  add(member: Member): void {
    const { pid, group, session } = member.facts;
    this.#members.set(pid, member);
    this.#begotten.delete(pid);
    if (group === pid || session === pid) this.#began.add(pid);
    this.#hunt?.groups.add(group);
  }

  /** A member is gone, or another job's. */
  remove(pid: number): void {
    this.#members.delete(pid);
  }

  bore(pid: number, started: number): void {
    this.#begotten.set(pid, started);
  }

  /**
   * Lets go of what is gone: a number may be another's then.
   * @param alive the processes that live
   * @param used sessions and process groups that have a living process
   */
  forget(alive: Pick<ReadonlyMap<number, unknown>, 'has'>, used: ReadonlySet<number>): void {
    for (const pid of this.#begotten.keys()) if (!alive.has(pid)) this.#begotten.delete(pid);
    for (const number of this.#began) if (!used.has(number)) this.#began.delete(number);
  }

  /** Whether a process whose parent is not known is in something that a member began. */
  began({ session, group }: ProcessFacts): boolean {
    return this.#began.has(session) || this.#began.has(group);
  }

  /** Whether a newcomer is one that is hunted. */
  isPrey({ started, group, parent }: ProcessFacts): boolean {
    if (this.#hunt === null || started < this.#hunt.since || !this.#hunt.groups.has(group)) return false;
    return groupOf(parent) !== group;
  }
}
