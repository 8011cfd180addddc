// A program that the benchmark started: it speaks in lines, and is ended by its handle.
import { spawn } from 'node:child_process';
import { createInterface } from 'node:readline';

export class Program {
  #name;
  #child;
  #lines = [];
  #wake = () => {};
  #closed = false;

  /** @param {number[]} descriptors that it gets from 3 on */
  constructor(path, args, descriptors = []) {
    this.#name = [path, ...args].join(' ');
    this.#child = spawn(path, args, { stdio: ['pipe', 'pipe', 'inherit', ...descriptors] });
    this.#child.stdin.on('error', () => {}); // it ended before it read: seen at `closed`
    createInterface({ input: this.#child.stdout }).on('line', (line) => {
      this.#lines.push(line);
      this.#wake();
    });
    /** Resolves when it has ended, with all that it forked that holds its stdout, and everything it said is here. */
    this.closed = new Promise((resolve, reject) => {
      this.#child.once('error', reject);
      this.#child.once('close', (code, signal) => {
        this.#closed = true;
        this.#wake();
        resolve({ code, signal });
      });
    });
    this.closed.catch(() => {});
  }

  /** The next line of its stdout. */
  async line() {
    while (this.#lines.length === 0) {
      if (this.#closed) throw new Error(`ended without a word: ${this.#name}`);
      await Promise.race([this.closed, new Promise((resolve) => (this.#wake = resolve))]);
    }
    return this.#lines.shift();
  }

  /** Drops the lines that nobody has asked for. */
  forget() {
    this.#lines.length = 0;
  }

  say(line) {
    this.#child.stdin.write(`${line}\n`);
  }

  signal(signal) {
    this.#child.kill(signal);
  }

  /** Closes its stdin, which asks the long-lived ones to go; `insist` with a signal. */
  async end(signal) {
    this.#child.stdin.end();
    if (signal !== undefined) this.signal(signal);
    const stubborn = setTimeout(() => this.signal('SIGKILL'), 2_000);
    await this.closed.catch(() => {});
    clearTimeout(stubborn);
  }
}

/** Like the promise, but rejects with the signal's reason once that is aborted. */
export function until(signal, promise) {
  return new Promise((resolve, reject) => {
    const stop = () => reject(signal.reason);
    if (signal.aborted) return stop();
    signal.addEventListener('abort', stop, { once: true });
    promise.then(resolve, reject).finally(() => signal.removeEventListener('abort', stop));
  });
}
