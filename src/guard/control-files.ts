import type { SystemError } from '../errors.js';
import { type Directory, native } from '../native.js';
import type { Epoch } from './epoch.js';
import type { Entry, Ledger } from './ledger.js';

/** Where the hierarchies are mounted. */
export type Mounts = Partial<Record<'memory' | 'freezer' | 'unified', string>>;

interface Changed {
  hierarchy: keyof Mounts;
  path: string;
  /** The cgroup itself: one that is made anew at its path is another. */
  directory: Directory;
  name: string;
  was: string;
  wrote: string;
  entry: Entry;
}

/**
 * Control files of any hierarchy, such as limits and freezer states, changed and put back: each written down first, and
 * put back only if it still holds what was written.
 */
export class ControlFiles {
  readonly #ledger: Ledger;
  readonly #epoch: Epoch;
  readonly #mounts: Mounts;
  readonly #changed = new Map<string, Changed>();

  constructor(ledger: Ledger, epoch: Epoch, mounts: Mounts) {
    this.#ledger = ledger;
    this.#epoch = epoch;
    this.#mounts = mounts;
  }

  /** @throws ReprieveError ERR_REPRIEVE_STATE, ERR_REPRIEVE_REVOKED, or the system's error; the file is as it was then */
  change(hierarchy: keyof Mounts, path: string, name: string, value: string): void {
    const key = keyOf(hierarchy, path, name);
    const before = this.#changed.get(key);
    const directory = before?.directory ?? new (native().Directory)(`${this.#mounts[hierarchy]}${path}`);
    let entry: Entry | undefined;
    try {
      const was = before?.was ?? directory.readFile(name).trim();
      entry = this.#ledger.file({ path, inode: directory.inode }, name, was, value);
      this.#epoch.permit(); // again: we may have been stopped since
      directory.writeFile(name, value);
      this.#changed.set(key, { hierarchy, path, directory, name, was, wrote: value, entry });
      before?.entry.clear();
    } catch (error) {
      entry?.clear();
      if (before === undefined) directory.close();
      throw error;
    }
  }

  /** @throws ReprieveError ERR_REPRIEVE_REVOKED, or the system's error, such as EBUSY of a limit below what is used */
  putBack(hierarchy: keyof Mounts, path: string, name: string): void {
    const key = keyOf(hierarchy, path, name);
    const changed = this.#changed.get(key);
    if (changed === undefined) return;
    try {
      const now = changed.directory.readFile(name).trim();
      // A freezer says FREEZING until all have stopped.
      const ours = now === changed.wrote || (now === 'FREEZING' && changed.wrote === 'FROZEN');
      this.#epoch.permit();
      if (ours) changed.directory.writeFile(name, changed.was);
    } catch (error) {
      const { code } = error as SystemError;
      if (code !== 'ENOENT' && code !== 'ENODEV') throw error; // else the cgroup was removed
    }
    this.#changed.delete(key);
    changed.entry.clear();
    changed.directory.close();
  }

  /** Something could not be put back. */
  get pending(): boolean {
    return this.#changed.size > 0;
  }

  /** Lets go of what could not be put back: it stays written down. */
  close(): void {
    for (const { directory } of this.#changed.values()) directory.close();
    this.#changed.clear();
  }

  /** Everything that can be: the rest stays written down. */
  putBackAll(): void {
    for (const { hierarchy, path, name } of [...this.#changed.values()]) {
      try {
        this.putBack(hierarchy, path, name);
      } catch {
        // such as a limit below what is used
      }
    }
  }
}

function keyOf(hierarchy: string, path: string, name: string): string {
  return `${hierarchy}:${path}/${name}`;
}
