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

/** What became of a file: it is as it was, somebody else has changed it since and it is left so, or it is gone. */
export type PutBack = 'back' | 'theirs' | 'gone';

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

  /** What was written; undefined if it is not changed. */
  written(hierarchy: keyof Mounts, path: string, name: string): string | undefined {
    return this.#changed.get(keyOf(hierarchy, path, name))?.wrote;
  }

  /** What it was before; undefined if it is not changed. */
  was(hierarchy: keyof Mounts, path: string, name: string): string | undefined {
    return this.#changed.get(keyOf(hierarchy, path, name))?.was;
  }

  /** It holds what was written, or is not changed, or gone. */
  stands(hierarchy: keyof Mounts, path: string, name: string): boolean {
    const changed = this.#changed.get(keyOf(hierarchy, path, name));
    try {
      return changed === undefined || changed.directory.readFile(name).trim() === changed.wrote;
    } catch (error) {
      if (isGone(error)) return true;
      throw error;
    }
  }

  /**
   * @throws ReprieveError ERR_REPRIEVE_REVOKED, or the system's error, such as EBUSY of a limit below what is used: v1 refuses
   * it, and for v2, which would kill at once or throttle, it is refused here
   */
  putBack(hierarchy: keyof Mounts, path: string, name: string): PutBack {
    const key = keyOf(hierarchy, path, name);
    const changed = this.#changed.get(key);
    if (changed === undefined) return 'back';
    let became: PutBack = 'back';
    try {
      const now = changed.directory.readFile(name).trim();
      // A freezer says FREEZING until all have stopped.
      const ours = now === changed.wrote || (now === 'FREEZING' && changed.wrote === 'FROZEN');
      if (ours && hierarchy === 'unified') refuseBelowUsage(changed);
      this.#epoch.permit();
      if (ours) changed.directory.writeFile(name, changed.was);
      else if (now !== changed.was) became = 'theirs';
    } catch (error) {
      if (!isGone(error)) throw error;
      became = 'gone';
    }
    this.#changed.delete(key);
    changed.entry.clear();
    changed.directory.close();
    return became;
  }

  /** It is somebody else's now: nothing is put back. */
  forget(hierarchy: keyof Mounts, path: string, name: string): void {
    const key = keyOf(hierarchy, path, name);
    const changed = this.#changed.get(key);
    this.#changed.delete(key);
    changed?.entry.clear();
    changed?.directory.close();
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

  /**
   * Everything that can be: the rest stays written down. With a guard jobs are not thawed as long as a limit is still
   * raised, as they would use up what is not theirs: it knows how to go on.
   */
  putBackAll(guarded: boolean): void {
    const attempt = ({ hierarchy, path, name }: Changed) => {
      try {
        this.putBack(hierarchy, path, name);
      } catch {
        // such as a limit below what is used
      }
    };
    const limits = () => [...this.#changed.values()].filter(isLimit);
    // v1's limit of memory may not be above the one of memory and swap: last raised, first put back.
    for (const changed of limits().reverse()) attempt(changed);
    if (guarded && limits().length > 0) return;
    for (const changed of [...this.#changed.values()]) attempt(changed);
  }
}

function isLimit({ hierarchy, name }: Changed): boolean {
  return hierarchy === 'memory' || (hierarchy === 'unified' && name.startsWith('memory.'));
}

function refuseBelowUsage({ directory, path, name, was, wrote }: Changed): void {
  if (name !== 'memory.max' && name !== 'memory.high') return;
  const usage = Number(directory.readFile('memory.current'));
  if (amountOf(was) >= amountOf(wrote) || usage <= amountOf(was)) return;
  const message = `${name} of ${path} cannot go back to ${was} as long as ${usage} bytes are in use`;
  throw Object.assign(new Error(message), { code: 'EBUSY' });
}

function amountOf(text: string): number {
  return text === 'max' ? Number.POSITIVE_INFINITY : Number(text);
}

/** The cgroup was removed. */
function isGone(error: unknown): boolean {
  const { code } = error as SystemError;
  return code === 'ENOENT' || code === 'ENODEV';
}

function keyOf(hierarchy: string, path: string, name: string): string {
  return `${hierarchy}:${path}/${name}`;
}
