import { readdirSync, readFileSync } from 'node:fs';
import { fromSystem, ReprieveError, type SystemError } from '../errors.js';
import type { Epoch } from '../guard/epoch.js';
import type { ControlFile, Directory, NativeBinding, Pidfd } from '../native.js';
import type { MemoryUse, Process, Waiter } from './cgroup.js';

export interface RealProcess extends Process {
  readonly pidfd: Pidfd;
  readonly closed: boolean;
}

/** Fields of /proc/PID/status (proc_pid_status(5)). Reading them never waits for the process's memory. */
const STATUS_KEYS = ['RssAnon:', 'VmSwap:', 'RssShmem:', 'RssFile:'] as const;
const statusFields = new Float64Array(STATUS_KEYS.length);

/** Opens a process by its number; null if it is gone. */
export function openProcess(native: NativeBinding, pid: number, epoch: Epoch): RealProcess | null {
  let directory: Directory | undefined;
  let pidfd: Pidfd | undefined;
  try {
    directory = new native.Directory(`/proc/${pid}`);
    pidfd = new native.Pidfd(pid);
    // The directory still answers after the pidfd was opened, so the number was not reused between: both mean the same.
    const stat = directory.readFile('stat');
    const afterName = stat.lastIndexOf(')');
    const name = stat.slice(stat.indexOf('(') + 1, afterName);
    const started = Number(stat.slice(afterName + 2).split(' ')[19]);
    return new OpenProcess(pid, name, started, directory, pidfd, epoch);
  } catch (error) {
    directory?.close();
    pidfd?.close();
    const { code } = error as SystemError;
    if (code === 'ENOENT' || code === 'ESRCH' || code === 'EINVAL') return null;
    throw fromSystem(error, `opening process ${pid}`);
  }
}

class OpenProcess implements RealProcess {
  #status: ControlFile | undefined;
  closed = false;

  constructor(
    readonly pid: number,
    readonly name: string,
    readonly started: number,
    private readonly directory: Directory,
    readonly pidfd: Pidfd,
    private readonly epoch: Epoch,
  ) {}

  memory(): MemoryUse {
    return this.#doing('reading the memory', () => {
      this.#status ??= this.directory.openFile('status', 'read');
      this.#status.readFields(STATUS_KEYS, statusFields);
      const [anon, swap, shmem, file] = statusFields;
      return { anon: anon || 0, swap: swap || 0, shmem: shmem || 0, file: file || 0 };
    });
  }

  scoreAdj(): number {
    return this.#doing('reading oom_score_adj', () => Number.parseInt(this.directory.readFile('oom_score_adj'), 10));
  }

  setScoreAdj(value: number): void {
    this.epoch.permit();
    this.#doing(`writing oom_score_adj=${value}`, () => this.directory.writeFile('oom_score_adj', String(value)));
  }

  #doing<T>(what: string, run: () => T): T {
    try {
      return run();
    } catch (error) {
      const { code } = error as SystemError;
      if (code === 'ESRCH' || code === 'ENOENT') {
        throw new ReprieveError('ERR_REPRIEVE_VANISHED', `${what} of process ${this.pid}: it is gone`, error);
      }
      throw fromSystem(error, `${what} of process ${this.pid}`);
    }
  }

  close(): void {
    this.closed = true;
    this.#status?.close();
    this.directory.close();
    this.pidfd.close();
  }
}

/** Where the kernel parks a task whose memcg is out of memory and whose OOM killer is switched off. */
const PARKED = 'mem_cgroup_oom_synchronize';

/** Threads of these processes that are parked (proc_pid_wchan(5)); readable while they are. */
export function listWaiters(pids: readonly number[], most: number): Waiter[] {
  const waiters: Waiter[] = [];
  for (const pid of pids) {
    let tids: string[];
    try {
      tids = readdirSync(`/proc/${pid}/task`);
    } catch {
      continue; // gone
    }
    for (const tid of tids) {
      if (waiters.length >= most) return waiters;
      try {
        if (!readFileSync(`/proc/${pid}/task/${tid}/wchan`, 'utf8').includes(PARKED)) continue;
        const name = readFileSync(`/proc/${pid}/task/${tid}/comm`, 'utf8').trim();
        waiters.push({ pid, tid: Number(tid), name });
      } catch {
        // the thread is gone
      }
    }
  }
  return waiters;
}
