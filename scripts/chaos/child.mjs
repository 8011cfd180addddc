// A program that the runner started: it speaks in lines, and is known by its process number.
import { spawn } from 'node:child_process';
import { createInterface } from 'node:readline';

/** So much of what a program complained about is kept. */
const KEPT = 4000;

export class Child {
  #child;
  #waiting = [];
  /** What it wrote to stderr, its end. */
  complaints = '';
  /** `{ code, signal }` once it has ended. */
  ended = null;

  /** @param options of spawn, and `onLine` */
  constructor(path, words, { onLine, ...options } = {}) {
    this.#child = spawn(path, words, { stdio: ['pipe', 'pipe', 'pipe'], ...options });
    this.#child.stdin.on('error', () => {}); // it ended before it read
    this.#child.stdout.on('error', () => {});
    this.#child.stderr.on('data', (text) => {
      this.complaints = (this.complaints + text).slice(-KEPT);
    });
    createInterface({ input: this.#child.stdout }).on('line', (line) => {
      onLine?.(line);
      for (const resolve of this.#waiting.splice(0)) resolve(line);
    });
    /** Resolves when its process is gone. Those that it forked may still be there. */
    this.gone = new Promise((resolve) => {
      const end = (code, signal) => {
        this.ended ??= { code, signal };
        for (const wake of this.#waiting.splice(0)) wake(null);
        resolve(this.ended);
      };
      this.#child.once('error', (error) => {
        this.complaints += error.message;
        end(error.message, null);
      });
      this.#child.once('exit', end);
    });
  }

  get pid() {
    return this.#child.pid;
  }

  /** The next line that it says, or null when it ends. */
  line() {
    if (this.ended !== null) return Promise.resolve(null);
    return new Promise((resolve) => this.#waiting.push(resolve));
  }

  say(line) {
    this.#child.stdin.write(`${line}\n`);
  }

  endInput() {
    this.#child.stdin.end();
  }

  /** By our handle: never another process of the same number. */
  kill(signal) {
    if (this.ended === null) this.#child.kill(signal);
  }

  /** Forgets its pipes: processes that hold their other ends keep nobody up. */
  release() {
    this.#child.stdin.destroy();
    this.#child.stdout.destroy();
    this.#child.stderr.destroy();
    this.#child.unref();
  }
}
