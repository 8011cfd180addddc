import type { Memcg } from '../cgroup/cgroup.js';

/**
 * How near to its limit a memcg counts as full: the kernel keeps up to 64 pages a CPU in its charge stock, and waiters
 * need one page each. At most an eighth of a small limit.
 */
export function fullSlack(limit: number): number {
  return Math.min(2 ** 20, limit / 8);
}

/** True if the memcg is at its limit now. */
export function isAtLimit(memcg: Memcg): boolean {
  return memcg.isFull(fullSlack(memcg.limit()));
}

/**
 * Whose out-of-memory this is. The kernel signals the memcg whose limit was hit and everything below it, and shows
 * `under_oom` in all of them: it belongs to the topmost one under OOM whose usage is at its limit, or, if memory came
 * back meanwhile and only a waiter sleeps on, to the topmost one under OOM. Null if there is none: it is over.
 * @param chain the memcg that was signalled, and those above it: topmost first
 */
export function findOwner(chain: readonly Memcg[]): Memcg | null {
  let topmost: Memcg | null = null;
  for (const memcg of chain) {
    if (!memcg.oomState().underOom) continue;
    if (isAtLimit(memcg)) return memcg;
    topmost ??= memcg;
  }
  return topmost;
}
