import { readFileSync } from 'node:fs';
import { type CgroupMount, cgroupPathOf } from '../cgroup/mounts.js';
import type { SystemError } from '../errors.js';
import type { Entry, FileLedger } from '../guard/ledger.js';
import { type Directory, native } from '../native.js';

const PREFIX = 'reprieve-handler-';

/** Where this process stands in the memory hierarchy. */
export interface OwnMemcg {
  /** Path below the hierarchy's root; undefined if it lies outside what the mount shows. */
  path: string | undefined;
  /** Why the process could not be moved to a memcg of its own; null if it was. */
  whyNot: string | null;
  /** Moves the process back and removes its memcg. Synchronous: it also runs when the process exits. */
  leave(): void;
}

/** Path of this process's memory cgroup, now. */
export function ownMemcgPath(mount: CgroupMount): string | undefined {
  return cgroupPathOf(readFileSync('/proc/self/cgroup', 'utf8'), 'memory', mount);
}

/** The memcg that was made, and where the process was before. */
interface Made extends OwnMemcg {
  inode: number | null;
  before: string;
}

let shared: { own: Made; users: number } | undefined;

/**
 * Moves this process to a memcg of its own directly below the root, where no watched memcg's limit reaches it. All
 * handlers of a process share it, each has it written down; the last one that leaves moves the process back.
 */
export function enterOwnMemcg(mount: CgroupMount, ledger: FileLedger): OwnMemcg {
  let entry: Entry | undefined;
  const note = (path: string, inode: number, before: string) => {
    entry = ledger.made({ path, inode }, before);
    return entry;
  };
  if (shared === undefined) shared = { own: moveOut(mount, note), users: 0 };
  else if (shared.own.path !== undefined && shared.own.inode !== null)
    note(shared.own.path, shared.own.inode, shared.own.before);
  const { own } = shared;
  shared.users++;
  let left = false;
  return {
    path: own.path,
    whyNot: own.whyNot,
    leave() {
      if (left || shared === undefined) return;
      left = true;
      if (--shared.users === 0) {
        shared = undefined;
        own.leave();
      }
      entry?.clear();
    },
  };
}

type Note = (path: string, inode: number, before: string) => Entry;

function moveOut(mount: CgroupMount, note: Note): Made {
  const before = ownMemcgPath(mount);
  const name = `${PREFIX}${process.pid}`;
  const back = before ?? '/';
  let root: Directory | undefined;
  let inode: number;
  try {
    root = new (native().Directory)(mount.point);
    removeStale(root, name);
    inode = makeAndJoin(root, name, (made) => note(`/${name}`, made, back));
  } catch (error) {
    root?.close();
    return { path: before, inode: null, before: back, whyNot: (error as SystemError).message, leave() {} };
  }
  const held = root;
  return {
    path: `/${name}`,
    inode,
    before: back,
    whyNot: null,
    leave() {
      try {
        // Ourselves, and programs that we started meanwhile.
        for (const pid of readBeneath(held, name, 'cgroup.procs').split('\n')) {
          if (pid !== '') moveBack(held, back, pid);
        }
        held.removeDirectory(name);
      } catch {
        // A memcg that stays is empty once the process has exited, and the next handler removes it.
      } finally {
        held.close();
      }
    },
  };
}

function makeAndJoin(root: Directory, name: string, note: (inode: number) => Entry): number {
  for (let attempt = 1; ; attempt++) {
    try {
      root.makeDirectory(name);
    } catch (error) {
      if ((error as SystemError).code !== 'EEXIST') throw error;
    }
    let entry: Entry | undefined;
    try {
      const made = root.openBeneath(name);
      const { inode } = made;
      made.close();
      entry = note(inode);
      join(root, `/${name}`);
      return inode;
    } catch (error) {
      entry?.clear();
      // Another handler that starts now took the empty memcg for a stale one.
      if ((error as SystemError).code !== 'ENOENT' || attempt === 5) throw error;
    }
  }
}

function join(root: Directory, path: string, pid = String(process.pid)): void {
  if (path === '/') return root.writeFile('cgroup.procs', pid);
  const directory = root.openBeneath(path.slice(1));
  try {
    directory.writeFile('cgroup.procs', pid);
  } finally {
    directory.close();
  }
}

function moveBack(root: Directory, path: string, pid: string): void {
  try {
    join(root, path, pid);
  } catch (error) {
    // To the root if where it was is gone; ESRCH: the process is.
    if ((error as SystemError).code !== 'ESRCH') join(root, '/', pid);
  }
}

function readBeneath(root: Directory, path: string, file: string): string {
  const directory = root.openBeneath(path);
  try {
    return directory.readFile(file);
  } finally {
    directory.close();
  }
}

/** Memcgs of handlers that were killed. One that still has a process refuses rmdir(2). */
function removeStale(root: Directory, mine: string): void {
  for (const name of root.subdirectories()) {
    if (!name.startsWith(PREFIX) || name === mine) continue;
    try {
      root.removeDirectory(name);
    } catch {
      // in use
    }
  }
}
