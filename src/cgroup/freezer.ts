import { readdirSync, readFileSync } from 'node:fs';
import { fromSystem, type SystemError } from '../errors.js';
import type { ControlFiles } from '../guard/control-files.js';
import type { Epoch } from '../guard/epoch.js';
import type { Entry, FileLedger } from '../guard/ledger.js';
import { type Directory, native } from '../native.js';
import { type CgroupMount, cgroupPathOf } from './mounts.js';

const PROCS = 'cgroup.procs';

/** What the two versions call it. */
const VERSIONS = {
  1: {
    controller: 'freezer',
    hierarchy: 'freezer',
    made: 'freezer',
    file: 'freezer.state',
    frozen: 'FROZEN',
    threads: 'tasks',
  },
  // Where there is no v1 memory hierarchy, this one is the one that cgroups are made in.
  2: {
    controller: '',
    hierarchy: 'unified',
    made: 'memory',
    file: 'cgroup.freeze',
    frozen: '1',
    threads: 'cgroup.threads',
  },
} as const;

/** Where a thread is in the kernel when it takes nothing more: frozen, waiting for memory, stopped, or traced. */
const STANDING = ['__refrigerator', 'mem_cgroup_oom_synchronize', 'do_signal_stop', 'ptrace_stop'];
/**
 * Since Linux 6.1 who sleeps here is frozen where he is (TASK_FREEZABLE, kernel/freezer.c), and not moved to the refrigerator.
 * He sleeps interruptibly else (S), so that D says that he is frozen. And a parent whose vfork(2) has not come back goes to
 * the refrigerator when it has.
 */
const FROZEN_IN_PLACE = [
  'futex_wait_queue',
  'futex_do_wait',
  'hrtimer_nanosleep',
  'do_nanosleep',
  'do_sigtimedwait',
  'sigtimedwait',
  'poll_schedule_timeout',
  'unix_stream_data_wait',
  'unix_stream_read_generic',
  'kernel_clone',
];

/** A thread that still runs. */
export interface Running {
  tid: number;
  name: string;
  /** The kernel's function that it waits in; '' for one that runs. */
  where: string;
}

/** A freezer cgroup that was made for processes that had none of their own. */
export interface MadeGroup {
  readonly path: string;
  /** Where its processes were, and go back to. */
  readonly home: string;
}

/**
 * The v1 freezer hierarchy (Documentation/admin-guide/cgroup-v1/freezer-subsystem.rst), or `cgroup.freeze` of v2
 * (Documentation/admin-guide/cgroup-v2.rst). Paths are below the mount point.
 */
export class Freezer {
  readonly #mount: CgroupMount;
  readonly #files: ControlFiles;
  readonly #ledger: FileLedger;
  readonly #epoch: Epoch;
  readonly #made = new Map<string, Entry>();
  readonly #of: (typeof VERSIONS)[1 | 2];

  constructor(mount: CgroupMount, files: ControlFiles, ledger: FileLedger, epoch: Epoch) {
    this.#mount = mount;
    this.#of = VERSIONS[mount.version];
    this.#files = files;
    this.#ledger = ledger;
    this.#epoch = epoch;
  }

  /** The freezer cgroup of a process; null if it is gone, undefined if it lies outside of what the mount shows. */
  pathOf(pid: number): string | undefined | null {
    try {
      return cgroupPathOf(readFileSync(`/proc/${pid}/cgroup`, 'utf8'), this.#of.controller, this.#mount);
    } catch (error) {
      const { code } = error as SystemError;
      if (code === 'ENOENT' || code === 'ESRCH') return null;
      throw fromSystem(error, `looking for the freezer cgroup of process ${pid}`);
    }
  }

  /** Processes of a freezer cgroup and of all below it: freezing it freezes those as well. */
  processes(path: string): number[] {
    return [...this.#list(path, PROCS), ...this.#below(path).flatMap((name) => this.processes(`${path}/${name}`))];
  }

  #below(path: string): string[] {
    try {
      return readdirSync(this.#point(path), { withFileTypes: true }).flatMap((entry) =>
        entry.isDirectory() ? [entry.name] : [],
      );
    } catch (error) {
      if ((error as SystemError).code === 'ENOENT') return [];
      throw error;
    }
  }

  #list(path: string, file: string): number[] {
    try {
      return readFileSync(`${this.#point(path)}/${file}`, 'utf8')
        .split('\n')
        .filter(Boolean)
        .map(Number);
    } catch (error) {
      const { code } = error as SystemError;
      if (code === 'ENOENT' || code === 'ENODEV') return []; // removed: it was empty
      throw error;
    }
  }

  #point(path: string): string {
    return `${this.#mount.point}${path === '/' ? '' : path}`;
  }

  /** THAWED, FREEZING until all of its processes have stopped, or FROZEN, whoever froze it or one above it. */
  state(path: string): string {
    if (path === '/') return 'THAWED'; // the root has no such file
    try {
      const { file, frozen } = this.#of;
      const state = readFileSync(`${this.#point(path)}/${file}`, 'utf8').trim();
      if (this.#mount.version === 1) return state;
      if (/^frozen 1$/m.test(readFileSync(`${this.#point(path)}/cgroup.events`, 'utf8'))) return 'FROZEN';
      return state === frozen ? 'FREEZING' : 'THAWED';
    } catch (error) {
      if ((error as SystemError).code === 'ENOENT') return 'THAWED'; // it was removed
      throw error;
    }
  }

  /** Threads of a freezing cgroup that may still take memory; none once it is FROZEN. At most `most`. */
  running(path: string, most: number): Running[] {
    const running: Running[] = [];
    if (this.state(path) === 'FROZEN') return running;
    for (const tid of this.#list(path, this.#of.threads)) {
      if (running.length >= most) break;
      try {
        const where = readFileSync(`/proc/${tid}/wchan`, 'utf8');
        if (STANDING.some((name) => where.startsWith(name))) continue;
        if (FROZEN_IN_PLACE.some((name) => where.startsWith(name)) && isUninterruptible(tid)) continue;
        const name = readFileSync(`/proc/${tid}/comm`, 'utf8').trim();
        running.push({ tid, name, where: where === '0' ? '' : where });
      } catch {
        // it is gone
      }
    }
    for (const name of this.#below(path)) running.push(...this.running(`${path}/${name}`, most - running.length));
    return running;
  }

  /** Begins to freeze; a thread in the middle of a long system call stops at its end. */
  freeze(path: string): void {
    this.#files.change(this.#of.hierarchy, path, this.#of.file, this.#of.frozen);
  }

  thaw(path: string): void {
    this.#files.putBack(this.#of.hierarchy, path, this.#of.file);
  }

  /** Makes a cgroup below `home` for processes that are there, written down first. */
  make(home: string, name: string): MadeGroup {
    const path = home === '/' ? `/${name}` : `${home}/${name}`;
    this.#epoch.permit();
    // Its inode is known only once it is there.
    let entry = this.#ledger.made({ path, inode: 0 }, home, this.#of.made);
    const above = this.#open(home);
    try {
      above.makeDirectory(name);
      const made = above.openBeneath(name);
      const { inode } = made;
      made.close();
      const known = this.#ledger.made({ path, inode }, home, this.#of.made);
      entry.clear();
      entry = known;
    } finally {
      above.close();
      this.#made.set(path, entry);
    }
    return { path, home };
  }

  /** Moves a process; false if it is gone. Into a frozen cgroup it freezes, out of it it thaws. */
  move(pid: number, path: string): boolean {
    this.#epoch.permit();
    const directory = this.#open(path);
    try {
      directory.writeFile(PROCS, String(pid));
      return true;
    } catch (error) {
      if ((error as SystemError).code === 'ESRCH') return false;
      throw error;
    } finally {
      directory.close();
    }
  }

  /** Moves who is in it back, and removes it; false if somebody is in it still. */
  unmake({ path, home }: MadeGroup): boolean {
    for (const pid of this.#list(path, PROCS)) this.move(pid, this.#isThere(home) ? home : '/');
    const slash = path.lastIndexOf('/');
    try {
      const above = this.#open(path.slice(0, slash) || '/');
      try {
        above.removeDirectory(path.slice(slash + 1));
      } finally {
        above.close();
      }
    } catch (error) {
      const { code } = error as SystemError;
      if (code === 'EBUSY') return false; // it forked, or a zombie is there still
      if (code !== 'ENOENT') throw error;
    }
    this.#made.get(path)?.clear();
    this.#made.delete(path);
    return true;
  }

  /**
   * True for a process whose first thread has ended while others go on: it stays where it was when they are moved
   * (proc_pid_stat(5): state Z, with more than one in /proc/PID/task).
   */
  isHeadless(pid: number): boolean {
    try {
      return readdirSync(`/proc/${pid}/task`).length > 1 && stateOf(pid) === 'Z';
    } catch {
      return false; // it is gone
    }
  }

  #isThere(path: string): boolean {
    try {
      this.#open(path).close();
      return true;
    } catch {
      return false;
    }
  }

  #open(path: string): Directory {
    return new (native().Directory)(this.#point(path));
  }
}

function isUninterruptible(tid: number): boolean {
  return stateOf(tid) === 'D';
}

/** Field 3 of proc_pid_stat(5). */
function stateOf(tid: number): string {
  const stat = readFileSync(`/proc/${tid}/stat`, 'utf8');
  return stat.charAt(stat.lastIndexOf(')') + 2);
}
