import { accessSync, constants } from 'node:fs';
import type { CgroupMount } from './mounts.js';

/** By access(2), which knows a read-only mount as well. */
export function canWrite(path: string): boolean {
  try {
    accessSync(path, constants.W_OK);
    return true;
  } catch {
    return false;
  }
}

/**
 * Where this process may make cgroups and move itself to them: '/', or the topmost cgroup of v2 at or above its own that was
 * delegated to its user (Documentation/admin-guide/cgroup-v2.rst, "Model of Delegation"); null if none was.
 * @param own path of its cgroup; undefined if it lies outside of what the mount shows
 */
export function findGround({ point, version, writable }: CgroupMount, own: string | undefined): string | null {
  if (!writable) return null;
  if (canWrite(point)) return '/';
  if (version === 1 || own === undefined) return null;
  const names = own.split('/').slice(1);
  const above = names.map((_, index) => `/${names.slice(0, index + 1).join('/')}`);
  return above.find((path) => isDelegated(point, path)) ?? null;
}

/** Whether cgroups can be made there, and processes moved to them from elsewhere below it. */
export function isDelegated(point: string, path: string): boolean {
  return ['', '/cgroup.procs'].every((name) => canWrite(`${point}${path}${name}`));
}
