/** Which job a process belongs to: pure, from what was read of it and where its parent was put. */
import type { ProcessFacts } from './processes.js';
import { unitOf } from './processes.js';
import type { Rule } from './rules.js';

/** A job of processes that somebody is in, or will be. */
export interface Place {
  /** `tree:PID`, or what its processes have in common: `session:SID`, `cgroup:PATH`, `uid:N`. */
  readonly id: string;
  /** Null where no rule spoke. */
  rule: Rule | null;
  /** Whoever is born of its processes is in it, where no rule says otherwise. */
  readonly descends: boolean;
}

/** What says which rule places a process. */
interface Rules {
  placing(facts: ProcessFacts): { rule: Rule; values: string[] } | null;
}

/**
 * The place of a process.
 * @param from the place of whoever it is born of; null if that is not known, or process 1
 */
export function placeOf(facts: ProcessFacts, from: Place | null, rules: Rules): Place {
  const root = (rule: Rule | null): Place => ({ id: `tree:${facts.pid}`, rule, descends: true });
  if (facts.pid === 1) return { ...root(null), descends: false };
  const found = rules.placing(facts);
  if (found !== null) {
    const { rule, values } = found;
    // Only the topmost of those that match begins a tree.
    if (rule.roots) return from?.descends && from.rule === rule ? from : root(rule);
    return { id: values.join(','), rule, descends: false };
  }
  if (from?.descends && from.rule !== null) return from;
  if (facts.place !== '/') return { id: `cgroup:${facts.place}`, rule: null, descends: false };
  if (facts.session !== 0) return { id: `session:${facts.session}`, rule: null, descends: false };
  return from?.descends ? from : root(null);
}

/** What a job of processes is called: as its rule says, or by its unit, cgroup or user, or as its first program. */
export function nameOf({ id, rule }: Place, first: ProcessFacts): string {
  if (rule?.name !== undefined) return rule.name;
  const path = /(?:^|,)cgroup:(.*)$/.exec(id)?.[1];
  if (path !== undefined) return unitOf(path)?.unit ?? path.slice(1);
  return /^uid:\d+$/.test(id) ? id : first.comm;
}

/**
 * Whether a process that is seen for the first time has lost whoever it is born of: fork(2) passes the session on, so
 * that a parent of another one has only adopted it.
 */
export function isAdopted(facts: ProcessFacts, parent: ProcessFacts | null): boolean {
  if (parent === null || parent.pid === 1) return true;
  return parent.session !== facts.session && facts.session !== facts.pid;
}
