import { readFileSync } from 'node:fs';

/** One mounted cgroup hierarchy (cgroups(7)). */
export interface CgroupMount {
  version: 1 | 2;
  /** v1: its controllers; v2: empty, see `cgroup.controllers` in the mount point. */
  controllers: string[];
  /** Where it is mounted. */
  point: string;
  /** The cgroup that the mount point shows; '/' outside containers and cgroup namespaces. */
  root: string;
  writable: boolean;
}

/** The cgroup hierarchies that this process sees, from mountinfo's text (proc_pid_mountinfo(5)). */
export function parseCgroupMounts(mountinfo: string): CgroupMount[] {
  const mounts: CgroupMount[] = [];
  for (const line of mountinfo.split('\n')) {
    const [mount, superblock] = line.split(' - ');
    if (mount === undefined || superblock === undefined) continue;
    const [, , , root = '/', point = '', options = ''] = mount.split(' ');
    const [type, , superOptions = ''] = superblock.split(' ');
    if (type !== 'cgroup' && type !== 'cgroup2') continue;
    mounts.push({
      version: type === 'cgroup' ? 1 : 2,
      controllers:
        type === 'cgroup' ? superOptions.split(',').filter((option) => option !== 'rw' && option !== 'ro') : [],
      point: unescapeOctal(point),
      root: unescapeOctal(root),
      writable: options.split(',').includes('rw') && superOptions.split(',').includes('rw'),
    });
  }
  return mounts;
}

export function readCgroupMounts(): CgroupMount[] {
  return parseCgroupMounts(readFileSync('/proc/self/mountinfo', 'utf8'));
}

/** The v1 memory hierarchy, or undefined. */
export function findMemoryV1(mounts: readonly CgroupMount[]): CgroupMount | undefined {
  return findV1(mounts, 'memory');
}

/** The v2 hierarchy, or undefined. */
export function findUnified(mounts: readonly CgroupMount[]): CgroupMount | undefined {
  return mounts.find(({ version }) => version === 2);
}

/** True if v2 has the memory controller, as far as we see. */
export function hasMemoryController({ point }: CgroupMount): boolean {
  try {
    return readFileSync(`${point}/cgroup.controllers`, 'utf8').split(/\s+/).includes('memory');
  } catch {
    return false; // hidden from us: as good as not there
  }
}

/** The v1 hierarchy of a controller, or undefined. */
export function findV1(mounts: readonly CgroupMount[], controller: string): CgroupMount | undefined {
  return mounts.find(({ version, controllers }) => version === 1 && controllers.includes(controller));
}

/**
 * Path of a process's cgroup below the mount point, of a v1 controller or of v2, from /proc/PID/cgroup's text, or undefined if
 * it lies outside what the mount shows.
 */
export function cgroupPathOf(text: string, controller: string, mount: CgroupMount): string | undefined {
  for (const line of text.split('\n')) {
    const match = /^\d+:([^:]*):(.*)$/.exec(line);
    if (match === null) continue;
    const [, controllers = ''] = match;
    if (mount.version === 2 ? controllers !== '' : !controllers.split(',').includes(controller)) continue;
    const path = match[2] ?? '/';
    if (mount.root === '/') return path;
    if (path === mount.root) return '/';
    return path.startsWith(`${mount.root}/`) ? path.slice(mount.root.length) : undefined;
  }
  return undefined;
}

/** mountinfo writes blanks, tabs, newlines and backslashes as octal. */
function unescapeOctal(text: string): string {
  return text.replace(/\\([0-7]{3})/g, (_, digits: string) => String.fromCharCode(Number.parseInt(digits, 8)));
}
