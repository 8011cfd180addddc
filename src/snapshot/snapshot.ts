/** One job as the policy sees it: plain data. Sizes are bytes. */
export interface Job {
  /**
   * Names the job in decisions: the memcg's path, or `pid:N` for a process. A tree's is `tree:PID`, or what its processes
   * have in common: `session:SID`, `cgroup:PATH`, `uid:N`.
   */
  id: string;
  /** The memcg's name below the scope, or the process's; a tree's is its rule's, its unit or cgroup, or its first program. */
  name: string;
  /** A tree is several processes that no memcg holds together. Pages that they share are counted in each of them. */
  kind: 'memcg' | 'process' | 'tree';
  /** 0 to 100; higher lives longer. */
  priority: number;
  /** The priority it has while it is above its reservation, or null: then it goes before all jobs within theirs. */
  overPriority: number | null;
  /** Bytes it was promised. */
  reservation: number;
  /** Never chosen by a policy. */
  protected: boolean;
  /** Where the settings come from, such as "api 'web-*'"; for the report. */
  settings: string;
  /** Anonymous memory. */
  anon: number;
  /** Swapped out anonymous memory. */
  swap: number;
  /** tmpfs and shared memory: stays when the job dies. */
  shmem: number;
  /** Page cache: the kernel reclaims it by itself. */
  file: number;
  /** Grows with the time of creation (a memcg's inode, a process's start time): larger is younger. */
  born: number;
  /** Was killed in this condition already. */
  killed: boolean;
}

/** What a policy decides on: plain data, which JSON carries without loss. Sizes are bytes, times microseconds. */
export interface Snapshot {
  version: 1;
  /** The memcg that is out of memory. */
  owner: string;
  /** True if it lies above everything that is watched: then only the watched jobs may be touched. */
  above: boolean;
  /** Its limit; null without one. */
  limit: number | null;
  usage: number;
  /** Since the condition opened. */
  sinceUs: number;
  /** Jobs that died in this condition so far. */
  victims: string[];
  jobs: Job[];
}

/** Memory that comes back when the job dies. */
export function diesWith(job: Job): number {
  return job.anon + job.swap;
}
