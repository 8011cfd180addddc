import { closeAll, type Memcg, openDescendants, type Process, type TreeChange } from '../cgroup/cgroup.js';
import { isVanished } from '../errors.js';
import type { ResolvedSettings } from './settings.js';
import type { Job } from './snapshot.js';
import type { ProcessTree } from './tree.js';

interface Common {
  readonly id: string;
  readonly name: string;
  readonly born: number;
  settings: ResolvedSettings;
}

/** Where what is born of a process is looked for. */
export type Nursery =
  /** With `deep` in the memcgs below as well: they belong to the same job. */
  { readonly memcg: Memcg; readonly deep: boolean } | { readonly tree: ProcessTree };

/** A job that is a process by itself. */
export type ProcessJob = Common & { readonly kind: 'process'; readonly process: Process };
export type MemcgJob = Common & { readonly kind: 'memcg'; readonly memcg: Memcg };
/** A job whose processes are no memcg's, or only the root's. */
export type TreeJob = Common & { readonly kind: 'tree'; readonly tree: ProcessTree };

/** A job with the descriptors that it is read and killed through. */
export type LiveJob = MemcgJob | ProcessJob | TreeJob;

/** Jobs that are found together: those of a memcg, or of the machine. */
export interface JobGroup {
  /** Every job there is now. */
  live(): LiveJob[];
  /** The job of that id, as of the last look. */
  find(id: string): LiveJob | undefined;
  /** Reads every job's memory; `killed` holds identities. A job that vanishes meanwhile is left out. */
  sample(killed: ReadonlySet<string>): Job[];
  /** Looks anew at what is otherwise told by changes. */
  refresh(): void;
  /** Something changed in the hierarchy. */
  changed(change: TreeChange): void;
  nurseryOf(job: LiveJob): Nursery;
  close(): void;
}

/** Names a job for good: a memcg made anew at the same path, or a process with the same number, is another job. */
export function identityOf(job: { id: string; born: number }): string {
  return `${job.id}#${job.born}`;
}

/** What a policy is told of a job. @throws ReprieveError ERR_REPRIEVE_VANISHED */
export function sampleJob(job: LiveJob, killed: ReadonlySet<string>): Job {
  const { anon, swap, shmem, file } = holderOf(job).memory();
  const { id, name, kind, born, settings } = job;
  const { priority, overPriority, reservation, protected: isProtected, from } = settings;
  return {
    id,
    name,
    kind,
    priority,
    overPriority,
    reservation,
    protected: isProtected,
    settings: from,
    anon,
    swap,
    shmem,
    file,
    born,
    killed: killed.has(identityOf(job)),
  };
}

function holderOf(job: LiveJob): Memcg | Process | ProcessTree {
  switch (job.kind) {
    case 'memcg':
      return job.memcg;
    case 'process':
      return job.process;
    case 'tree':
      return job.tree;
  }
}

/** Processes directly in a memcg; none if it is gone. */
export function pidsIn(memcg: Memcg): number[] {
  try {
    return memcg.pids();
  } catch (error) {
    if (isVanished(error)) return [];
    throw error;
  }
}

/** Processes in a memcg and in those below it. */
export function pidsBelow(memcg: Memcg): number[] {
  const below = openDescendants(memcg);
  try {
    return [memcg, ...below].flatMap(pidsIn);
  } finally {
    closeAll(below);
  }
}

/** Processes of a job; of a tree, those that were there at the last look. */
export function pidsOf(job: LiveJob): number[] {
  switch (job.kind) {
    case 'memcg':
      return pidsBelow(job.memcg);
    case 'process':
      return [job.process.pid];
    case 'tree':
      return job.tree.pids();
  }
}
