import { readFileSync } from 'node:fs';
import { type CgroupMount, cgroupPathOf } from '../cgroup/mounts.js';
import type { SystemError } from '../errors.js';
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

let shared: { own: OwnMemcg; users: number } | undefined;

/**
 * Moves this process to a memcg of its own directly below the root, where no watched memcg's limit reaches it. All
 * handlers of a process share it; the last one that leaves moves the process back.
 */
export function enterOwnMemcg(mount: CgroupMount): OwnMemcg {
  shared ??= { own: moveOut(mount), users: 0 };
  const { own } = shared;
  shared.users++;
  let left = false;
  return {
    ...own,
    leave() {
      if (left || shared === undefined) return;
      left = true;
      if (--shared.users > 0) return;
      shared = undefined;
      own.leave();
    },
  };
}

function moveOut(mount: CgroupMount): OwnMemcg {
  const before = ownMemcgPath(mount);
  const name = `${PREFIX}${process.pid}`;
  let root: Directory | undefined;
  try {
    root = new (native().Directory)(mount.point);
    removeStale(root, name);
    makeAndJoin(root, name);
  } catch (error) {
    root?.close();
    return { path: before, whyNot: (error as SystemError).message, leave() {} };
  }
  const held = root;
  return {
    path: `/${name}`,
    whyNot: null,
    leave() {
      try {
        // Ourselves, and programs that we started meanwhile.
        for (const pid of readBeneath(held, name, 'cgroup.procs').split('\n')) {
          if (pid !== '') moveBack(held, before ?? '/', pid);
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

function makeAndJoin(root: Directory, name: string): void {
  for (let attempt = 1; ; attempt++) {
    try {
      root.makeDirectory(name);
    } catch (error) {
      if ((error as SystemError).code !== 'EEXIST') throw error;
    }
    try {
      join(root, `/${name}`);
      return;
    } catch (error) {
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
