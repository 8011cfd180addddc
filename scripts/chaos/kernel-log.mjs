// Whom the kernel's own killer took, from its log.
import { closeSync, constants, openSync, readSync } from 'node:fs';

export class KernelLog {
  #file = openSync('/dev/kmsg', constants.O_RDONLY | constants.O_NONBLOCK);

  constructor() {
    this.read(); // what was before
  }

  /** Lines since the last call. */
  read() {
    const record = Buffer.alloc(8192);
    const lines = [];
    for (;;) {
      try {
        const length = readSync(this.#file, record);
        lines.push(
          record
            .toString('utf8', 0, length)
            .split('\n')[0]
            .replace(/^[^;]*;/, ''),
        );
      } catch (error) {
        if (error.code === 'EPIPE') throw new Error('lines of the kernel log were overwritten before they were read');
        if (error.code === 'EAGAIN') return lines;
        throw error;
      }
    }
  }

  /** Processes that it killed for a memcg since the last call: their `oom_score_adj` then, by number. */
  kills() {
    const kills = new Map();
    for (const line of this.read()) {
      const [, pid] = /^Memory cgroup out of memory: Killed process (\d+)/.exec(line) ?? [];
      if (pid !== undefined) kills.set(Number(pid), Number(/oom_score_adj:(-?\d+)/.exec(line)?.[1] ?? 0));
    }
    return kills;
  }

  close() {
    closeSync(this.#file);
  }
}
