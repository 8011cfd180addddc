import { readFileSync, readlinkSync } from 'node:fs';
import type { SystemError } from '../errors.js';

/** PF_KTHREAD in the `flags` of proc_pid_stat(5) (include/linux/sched.h). */
const KERNEL_THREAD = 0x0020_0000;

/** What a process is put into a job by. None of it is read from the process's own memory, so nothing here waits for it. */
export interface ProcessFacts {
  pid: number;
  parent: number;
  /** Process group and session: the number of the process that began them. */
  group: number;
  session: number;
  /** Start time in clock ticks since boot. */
  started: number;
  isKernelThread: boolean;
  /** Effective user id. */
  uid: number;
  /** Name of the program, its first 15 bytes. */
  comm: string;
  /** Path of its program; null if that may not be read, or there is none. */
  exe: string | null;
  /** Its cgroup in each hierarchy: v2's first, then `name=systemd`, then the others. */
  cgroups: string[];
  /** The one that says which service it is of, by v2 or else by `name=systemd`; '/' if neither does. */
  place: string;
}

/** Fields of /proc/PID/stat. The name may hold blanks and brackets: what follows it is counted from the last bracket. */
export function parseStat(text: string): Omit<ProcessFacts, 'uid' | 'exe' | 'cgroups' | 'place'> {
  const end = text.lastIndexOf(')');
  const fields = text.slice(end + 2).split(' ');
  const field = (number: number) => Number(fields[number - 3]);
  return {
    pid: Number.parseInt(text, 10),
    comm: text.slice(text.indexOf('(') + 1, end),
    parent: field(4),
    group: field(5),
    session: field(6),
    isKernelThread: Math.floor(field(9) / KERNEL_THREAD) % 2 === 1,
    started: field(22),
  };
}

/** Paths of /proc/PID/cgroup, in the order in which they tell most of whose process it is. */
export function parseCgroups(text: string): { cgroups: string[]; place: string } {
  const paths = new Map<string, string>();
  for (const line of text.split('\n')) {
    const match = /^\d+:([^:]*):(.*)$/.exec(line);
    if (match !== null) paths.set(match[1] ?? '', match[2] ?? '/');
  }
  const named = [paths.get(''), paths.get('name=systemd')].filter((path) => path !== undefined);
  return { cgroups: [...new Set([...named, ...paths.values()])], place: named.find((path) => path !== '/') ?? '/' };
}

/** The systemd unit of a cgroup path: its last component that is a service or a scope, and the path down to there. */
export function unitOf(path: string): { unit: string; path: string } | null {
  const parts = path.split('/');
  const last = parts.findLastIndex((part) => /.\.(service|scope)$/.test(part));
  return last < 0 ? null : { unit: parts[last] ?? '', path: parts.slice(0, last + 1).join('/') };
}

/**
 * Reads the facts of a process; null if it is gone. Of one that is held by a descriptor the caller must see afterwards
 * that it has not exited: only then was its number no other's meanwhile.
 * @param started its start time, where that is known already
 */
export function readFacts({ pid, started }: { pid: number; started?: number }): ProcessFacts | null {
  const read = (name: string) => readFileSync(`/proc/${pid}/${name}`, 'latin1');
  try {
    const stat = parseStat(read('stat'));
    if (started !== undefined && stat.started !== started) return null;
    if (stat.isKernelThread) return { ...stat, uid: 0, exe: null, cgroups: [], place: '/' };
    const uid = Number(/^Uid:\s+\d+\s+(\d+)/m.exec(read('status'))?.[1]);
    return { ...stat, uid, exe: readProgram(pid), ...parseCgroups(read('cgroup')) };
  } catch (error) {
    if (isGone(error)) return null;
    throw error;
  }
}

/** Process group of a process that may be nobody's here; null if it is gone. */
export function groupOf(pid: number): number | null {
  try {
    return parseStat(readFileSync(`/proc/${pid}/stat`, 'latin1')).group;
  } catch (error) {
    if (isGone(error)) return null;
    throw error;
  }
}

function readProgram(pid: number): string | null {
  try {
    return readlinkSync(`/proc/${pid}/exe`).replace(/ \(deleted\)$/, '');
  } catch (error) {
    const { code } = error as SystemError;
    // Without its mm on the way out (ENOENT), or of a user whom we may not trace.
    if (code === 'ENOENT' || code === 'EACCES' || code === 'EPERM') return null;
    throw error;
  }
}

function isGone(error: unknown): boolean {
  const { code } = error as SystemError;
  return code === 'ENOENT' || code === 'ESRCH';
}
