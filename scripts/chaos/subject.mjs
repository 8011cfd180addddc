// The handler of an episode and its guard, as processes that faults happen to. The runner knows them by the cgroup that
// they were born in, and not by what they say.
import { spawnSync } from 'node:child_process';
import { readdirSync, readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { Child } from './child.mjs';

const program = fileURLToPath(new URL('handler.mjs', import.meta.url));
/** So that running out of heap takes a moment and not the machine's memory. */
const HEAP = '--max-old-space-size=64';
const GUARD_NAME = 'reprieve-guard';

export class Subject {
  #child;
  #group;
  /** Everything that it said. */
  said = [];

  /** @param tools `{ environment, node }`: what a sanitizer needs, and words before the program's */
  constructor(options, group, { onSay = () => {}, environment = {}, timeNamespace = false } = {}) {
    this.#group = group;
    const inside = 'echo 0 > "$0/cgroup.procs" && ulimit -c 0 && exec "$@"';
    const outer = timeNamespace ? ['unshare', '--time', '--monotonic', '86400', '--boottime', '86400'] : [];
    const words = [...outer, process.execPath, HEAP, program, JSON.stringify(options)];
    this.#child = new Child('/bin/sh', ['-c', inside, group, ...words], {
      detached: true, // Ctrl-C is the runner's to handle
      env: { ...process.env, ...environment },
      onLine: (line) => {
        let told;
        try {
          told = JSON.parse(line);
        } catch {
          return; // V8's last words
        }
        this.said.push(told);
        onSay(told);
      },
    });
  }

  get pid() {
    return this.#child.pid;
  }

  get ended() {
    return this.#child.ended;
  }

  get gone() {
    return this.#child.gone;
  }

  get complaints() {
    return this.#child.complaints;
  }

  kill(signal) {
    this.#child.kill(signal);
  }

  say(line) {
    this.#child.say(line);
  }

  endInput() {
    this.#child.endInput();
  }

  release() {
    this.#child.release();
  }

  /** What it said of one kind. */
  all(event) {
    return this.said.filter((told) => told.event === event);
  }

  /** Everything that lives in its cgroup: itself, guards, programs that it started. */
  processes() {
    try {
      return readFileSync(`${this.#group}/cgroup.procs`, 'utf8').split('\n').filter(Boolean).map(Number);
    } catch {
      return [];
    }
  }

  guards() {
    return this.processes().filter((pid) => pid !== this.pid && nameOf(pid).startsWith(GUARD_NAME));
  }

  /** Signals its guard; false where there is none. */
  killGuard(signal) {
    return this.guards().filter((pid) => signalTo(pid, signal)).length > 0;
  }

  /** As nearly at once as one process can do it. */
  killBoth() {
    const guards = this.guards();
    this.kill('SIGKILL');
    for (const pid of guards) signalTo(pid, 'SIGKILL');
    return guards.length > 0;
  }

  /** Leaves it `spare` descriptors besides those that it has. */
  limitFiles(spare) {
    try {
      const open = readdirSync(`/proc/${this.pid}/fd`).map(Number);
      const most = Math.max(...open) + 1 + spare;
      spawnSync('prlimit', [`--pid=${this.pid}`, `--nofile=${most}:`]);
    } catch {
      // gone already
    }
  }
}

function nameOf(pid) {
  try {
    return readFileSync(`/proc/${pid}/comm`, 'utf8').trim();
  } catch {
    return '';
  }
}

export function signalTo(pid, signal) {
  try {
    process.kill(pid, signal);
    return true;
  } catch {
    return false;
  }
}
