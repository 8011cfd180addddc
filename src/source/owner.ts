import type { Memcg } from '../cgroup/cgroup.js';

/** Whose out-of-memory it is, and whether its usage is at its limit. */
export interface Owner {
  memcg: Memcg;
  full: boolean;
}

/**
 * Whose out-of-memory this is. The kernel signals the memcg whose limit was hit and everything below it, and shows
 * `under_oom` in all of them: it belongs to the topmost one under OOM whose usage is at its limit, or, if memory came
 * back meanwhile and only a waiter sleeps on, to the topmost one under OOM. Null if there is none: it is over.
 * @param chain the memcg that was signalled, and those above it: topmost first
 */
export function findOwner(chain: readonly Memcg[]): Owner | null {
  let topmost: Memcg | null = null;
  for (const memcg of chain) {
    if (!memcg.oomState().underOom) continue;
    // Where nobody is parked there is no other sign of it than that it is full.
    if (!memcg.parks || memcg.isFull()) return { memcg, full: true };
    topmost ??= memcg;
  }
  return topmost === null ? null : { memcg: topmost, full: false };
}
