import { closeAll, type Hierarchy, type Memcg, openDescendants } from '../cgroup/cgroup.js';
import { isVanished } from '../errors.js';
import type { KernelVictim } from '../report/report.js';
import { type JobGroup, pidsIn, pidsOf } from '../snapshot/jobs.js';
import { NEVER } from './scores.js';

/** True if the kernel's killer finds a task there that it may take; else its waiters would spin for ever. */
export function hasKillableTask(hierarchy: Hierarchy, memcg: Memcg): boolean {
  const below = openDescendants(memcg);
  try {
    return [memcg, ...below].some((level) => pidsIn(level).some((pid) => isKillable(hierarchy, pid)));
  } finally {
    closeAll(below);
  }
}

function isKillable(hierarchy: Hierarchy, pid: number): boolean {
  const process = hierarchy.openProcess(pid);
  if (process === null) return false;
  try {
    return process.scoreAdj() > NEVER;
  } catch (error) {
    if (isVanished(error)) return false;
    throw error;
  } finally {
    process.close();
  }
}

/** Processes of each job, by its name. */
export function processesOf(groups: readonly JobGroup[]): Map<string, number[]> {
  const found = new Map<string, number[]>();
  for (const job of groups.flatMap((jobs) => jobs.live())) {
    found.set(job.name, [...(found.get(job.name) ?? []), ...pidsOf(job)]); // names are not unique
  }
  return found;
}

/** Whose processes are gone since then: where the kernel had the memcg, it took them. */
export function goneSince(before: ReadonlyMap<string, number[]>, groups: readonly JobGroup[]): KernelVictim[] {
  const now = processesOf(groups);
  return [...before].flatMap(([job, pids]) => {
    const left = new Set(now.get(job));
    const gone = pids.filter((pid) => !left.has(pid));
    return gone.length > 0 ? [{ job, pids: gone, processes: gone.length }] : [];
  });
}
