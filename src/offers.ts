import type { Findings } from './capabilities.js';

/** What a scope can be watched by, and what that is worth. */
export interface ScopeOffer {
  /** Memcgs of v1 or of v2, or processes alone; null if it cannot be watched. */
  by: 'v1' | 'v2' | 'processes' | null;
  /**
   * Who wants memory while the policy thinks: waits in the kernel; is throttled and frozen, if asked for (`hold: true`); is
   * frozen if it grows; or goes on, until the kernel kills.
   */
  whileThinking: 'waits' | 'throttled' | 'frozen' | 'goes on';
  /** What cannot be had here, with what it costs; why it cannot be watched, where it cannot. */
  lacks: string[];
}

/** By scope. */
export interface Scopes {
  memcg: ScopeOffer;
  system: ScopeOffer;
}

/** What can be watched with what was found. */
export function offersOf(found: Findings): Scopes {
  return { memcg: offerMemcg(found), system: offerSystem(found) };
}

function offerMemcg(found: Findings): ScopeOffer {
  const { memcgs, memoryV1, v2, oomControl, eventControl } = found;
  const none = (why: string): ScopeOffer => ({ by: null, whileThinking: 'goes on', lacks: [why] });
  if (memcgs === null) return none('there are no memory cgroups');
  if (memcgs === 'v1') {
    if (memoryV1?.writable !== true) return none('cgroup v1 is mounted read-only here');
    const missing = [...(oomControl ? [] : ['memory.oom_control']), ...(eventControl ? [] : ['cgroup.event_control'])];
    if (missing.length > 0) return none(`${missing.join(' and ')} cannot be written`);
    return { by: 'v1', whileThinking: 'waits', lacks: lacksKill(found) };
  }
  const lacks: string[] = [];
  const ground = v2?.ground ?? null;
  if (ground === null)
    lacks.push('no memcg can be changed here: `hold: true` is refused, and a job that forks is killed in rounds');
  else if (ground !== '/')
    lacks.push(`limits can be changed below ${ground} only: elsewhere \`hold: true\` is refused`);
  if (found.psi === 'none')
    lacks.push('no pressure: who reads the same pages again and again at the limit is not seen');
  return { by: 'v2', whileThinking: ground === null ? 'goes on' : 'throttled', lacks: [...lacks, ...lacksKill(found)] };
}

function offerSystem(found: Findings): ScopeOffer {
  const { memcgs, freezer, psi, swap, lowersScore } = found;
  const lacks: string[] = [];
  if (memcgs === null) lacks.push('no memory cgroups: a job is what its processes have in common');
  if (freezer === null) lacks.push('no freezer: jobs that grow go on while the policy thinks');
  if (psi === 'none' && swap.total > 0) lacks.push('no pressure: a machine that swaps without getting on is not seen');
  if (!lowersScore)
    lacks.push("oom_score_adj cannot be lowered: the kernel's killer may take the handler or its guard");
  return {
    by: memcgs ?? 'processes',
    whileThinking: freezer === null ? 'goes on' : 'frozen',
    lacks: [...lacks, ...lacksKill(found)],
  };
}

function lacksKill({ held }: Findings): string[] {
  return held.includes('CAP_KILL') ? [] : ['no CAP_KILL: processes of other users cannot be killed'];
}
