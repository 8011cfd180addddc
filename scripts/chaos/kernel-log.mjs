// Whom the kernel's own killer took, from its log.
import { closeSync, constants, openSync, readSync } from 'node:fs';

export class KernelLog {
  #file = openSync('/dev/kmsg', constants.O_RDONLY | constants.O_NONBLOCK);
  #lines = [];

  constructor() {
    this.read();
    this.#lines = []; // what was before
  }

  /** Keeps what has come: often enough that nothing is overwritten before, as the kernel lists all tasks at each kill. */
  read() {
    const record = Buffer.alloc(8192);
    for (;;) {
      try {
        const length = readSync(this.#file, record);
        const [line] = record.toString('utf8', 0, length).split('\n');
        this.#lines.push(line.replace(/^[^;]*;/, ''));
      } catch (error) {
        if (error.code === 'EPIPE') throw new Error('lines of the kernel log were overwritten before they were read');
        if (error.code === 'EAGAIN') return;
        throw error;
      }
    }
  }

  /** Processes that it killed for a memcg since the last call: their `oom_score_adj` then, by number. */
  kills() {
    this.read();
    const kills = new Map();
    for (const line of this.#lines.splice(0)) {
      const [, pid] = /^Memory cgroup out of memory: Killed process (\d+)/.exec(line) ?? [];
      if (pid !== undefined) kills.set(Number(pid), Number(/oom_score_adj:(-?\d+)/.exec(line)?.[1] ?? 0));
    }
    return kills;
  }

  close() {
    closeSync(this.#file);
  }
}
