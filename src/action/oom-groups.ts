import { isRevoked } from '../errors.js';
import type { ControlFiles } from '../guard/control-files.js';

const FILE = 'memory.oom.group';

/**
 * `memory.oom.group` of cgroup v2: where the kernel's killer takes a process of such a job, it takes all of it
 * (Documentation/admin-guide/cgroup-v2.rst). One register for all watches of a handler, as several may want the same.
 */
export class OomGroups {
  readonly #files: ControlFiles;
  readonly #holders = new Map<string, Set<object>>();
  /** Jobs whose file could not be written. */
  failures = 0;

  constructor(files: ControlFiles) {
    this.#files = files;
  }

  /** Makes these all that `holder` wants to die whole; where somebody else has written the file since, once more. */
  apply(holder: object, paths: readonly string[]): void {
    for (const path of paths) {
      const holders = this.#holders.get(path) ?? new Set();
      this.#holders.set(path, holders.add(holder));
      this.#attempt(() => this.#set(path));
    }
    for (const [path, holders] of this.#holders) {
      if (paths.includes(path) || !holders.delete(holder) || holders.size > 0) continue;
      this.#holders.delete(path);
      this.#attempt(() => this.#files.putBack('unified', path, FILE));
    }
  }

  #set(path: string): void {
    const written = this.#files.written('unified', path, FILE);
    if (written !== undefined && this.#files.stands('unified', path, FILE)) return;
    this.#files.forget('unified', path, FILE);
    this.#files.change('unified', path, FILE, '1');
  }

  /** A job that is gone, or a file that is not ours to write: the kernel then takes one process of it. */
  #attempt(run: () => unknown): void {
    try {
      run();
    } catch (error) {
      if (isRevoked(error)) throw error;
      this.failures++;
    }
  }
}
