import { isAtOrBelow, type Memcg } from '../cgroup/cgroup.js';
import { bytesOf } from '../units.js';
import type { ProcessFacts } from './processes.js';
import { isPriority, matchesMemcg, matchProcess, parseRules, type Rule } from './rules.js';

const DEFAULT_PRIORITY = 50;
/** `oom_score_adj` points that count as one of priority: 1000 of them lead from the default to either end. */
const SCORE_STEP = 20;
const NEVER = -1000;

/** Settings as a job has them in the end. */
export interface ResolvedSettings {
  priority: number;
  reservation: number;
  protected: boolean;
  overPriority: number | null;
  /** Where they come from. */
  from: string;
}

/** What settings are looked up for. */
export interface Subject {
  name: string;
  /** Its memcg, if it is one. */
  memcg?: Memcg;
  /** Of its process, or of the first one of several. */
  facts?: ProcessFacts | null;
  /** The rule that made it a job. */
  rule?: Rule | null;
  /** Why it must not die, whatever is said of it. */
  spared?: string | null;
  /** The `oom_score_adj` that somebody gave it; asked only where nothing else speaks. Null if that says nothing. */
  scoreAdj?: () => number | null;
}

/**
 * Settings of jobs by rule; the first that matches gives all of a job's API settings.
 * @throws ReprieveError ERR_REPRIEVE_INVALID_ARGUMENT naming the rule and the field
 */
export class JobRules {
  readonly #rules: readonly Rule[];
  readonly #home: string | undefined;

  /** @param home path of the memcg that the handler lives in */
  constructor(jobs: unknown, home?: string) {
    this.#home = home;
    this.#rules = parseRules(jobs);
  }

  /** Some rule asks for more of a process than its name. */
  get asksProcesses(): boolean {
    return this.#rules.some(
      ({ is, roots, uid, session }) => roots || is.cgroup || is.unit || (uid ?? session) !== undefined,
    );
  }

  /** Whether a rule makes a job of that memcg, wherever it lies. */
  namesMemcg(name: string, path: string): boolean {
    return this.#rules.find((rule) => matchesMemcg(rule, name, path))?.names ?? false;
  }

  /** The rule that a process is put into a job by, and what it holds it by. A rule that asks for a name makes no jobs. */
  placing(facts: ProcessFacts): { rule: Rule; values: string[] } | null {
    for (const rule of this.#rules) {
      const values = rule.is.name === undefined ? matchProcess(rule, facts) : null;
      if (values !== null) return { rule, values };
    }
    return null;
  }

  #find({ name, memcg, facts, rule: made }: Subject): Rule | undefined {
    return this.#rules.find((rule) => {
      if (memcg !== undefined) return matchesMemcg(rule, name, memcg.path);
      if (made !== undefined && rule.is.name === undefined) return rule === made; // of its processes some match, others may not
      if (rule.is.name !== undefined && !rule.is.name(name)) return false;
      return facts ? matchProcess(rule, facts) !== null : isByName(rule);
    });
  }

  /**
   * Settings of a job: the API's, then `trusted.reprieve.*`, then `user.reprieve.*`, then what its `oom_score_adj` hints
   * at, then the defaults.
   */
  resolve(subject: Subject): ResolvedSettings {
    const { memcg } = subject;
    const rule = this.#find(subject);
    const origins: string[] = [];
    if (rule !== undefined) origins.push(rule.label);
    const notes: string[] = [];
    const isHome = memcg !== undefined && this.#home !== undefined && isAtOrBelow(this.#home, memcg.path);
    const spared = isHome ? 'the handler lives in it' : (subject.spared ?? null);
    if (spared !== null) origins.push(spared);
    const fromAttributes = <T>(field: string, parse: (text: string) => T | undefined): T | undefined => {
      if (memcg === undefined) return undefined;
      for (const attribute of attributesOf(memcg, field)) {
        const value = parse(attribute.text.trim());
        if (value !== undefined) {
          origins.push(attribute.name);
          return value;
        }
        notes.push(`${attribute.name}='${attribute.text.slice(0, 40)}' ignored: not valid`);
      }
      return undefined;
    };
    const said = {
      priority: rule?.priority ?? fromAttributes('priority', parsePriorityText),
      reservation: rule?.reservation ?? fromAttributes('reservation', parseSizeText) ?? 0,
      // Whole jobs die: with this one the handler would, or whoever it came with.
      protected: spared !== null || (rule?.protected ?? fromAttributes('protected', parseFlagText) ?? false),
      overPriority: rule?.overPriority ?? fromAttributes('overPriority', parsePriorityText) ?? null,
    };
    const scoreAdj = origins.length === 0 ? (subject.scoreAdj?.() ?? 0) : 0;
    if (scoreAdj !== 0) origins.push(`oom_score_adj ${scoreAdj} (hint)`);
    return {
      ...said,
      priority: said.priority ?? priorityOfScore(scoreAdj),
      protected: said.protected || scoreAdj === NEVER,
      from: [...(origins.length > 0 ? origins : ['default']), ...notes].join(', '),
    };
  }
}

/** The priority that an `oom_score_adj` hints at: 1000 is the lowest, 0 the default, -999 the highest. */
function priorityOfScore(scoreAdj: number): number {
  return Math.min(100, Math.max(0, Math.round(DEFAULT_PRIORITY - scoreAdj / SCORE_STEP)));
}

function isByName({ is, roots, uid, session }: Rule): boolean {
  return !roots && uid === undefined && session === undefined && is.cgroup === undefined && is.unit === undefined;
}

/** `user.*` counts only where nobody but root or ourselves could have set it. */
function attributesOf(memcg: Memcg, field: string): { name: string; text: string }[] {
  const trusts = memcg.owner === 0 || memcg.owner === process.geteuid?.();
  return ['trusted', ...(trusts ? ['user'] : [])].flatMap((space) => {
    const name = `${space}.reprieve.${field}`;
    const text = memcg.attribute(name);
    return text === null ? [] : [{ name, text }];
  });
}

function parsePriorityText(text: string): number | undefined {
  return /^\d{1,3}$/.test(text) && isPriority(Number(text)) ? Number(text) : undefined;
}

function parseSizeText(text: string): number | undefined {
  try {
    return bytesOf(text, 'reservation');
  } catch {
    return undefined; // reported as not valid by the caller
  }
}

function parseFlagText(text: string): boolean | undefined {
  if (text === '1' || text === 'true') return true;
  return text === '0' || text === 'false' ? false : undefined;
}
