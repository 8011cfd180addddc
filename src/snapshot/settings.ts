import picomatch from 'picomatch';
import { isAtOrBelow, type Memcg } from '../cgroup/cgroup.js';
import { invalidOption } from '../errors.js';
import { bytesOf, type Size } from '../units.js';

/** What an administrator says of a job. */
export interface JobSettings {
  /** 0 to 100, higher lives longer; 50 by default. */
  priority?: number;
  /** Memory that it was promised; none by default. */
  reservation?: Size;
  /** Never to be chosen. */
  protected?: boolean;
  /** Its priority while it is above its reservation; by default it then goes before every job within its own. */
  overPriority?: number;
}

const DEFAULT_PRIORITY = 50;

interface Rule {
  glob: string;
  matches: (name: string) => boolean;
  priority: number | undefined;
  reservation: number | undefined;
  protected: boolean | undefined;
  overPriority: number | undefined;
}

/** Settings as a job has them in the end. */
export interface ResolvedSettings {
  priority: number;
  reservation: number;
  protected: boolean;
  overPriority: number | null;
  /** Where they come from. */
  from: string;
}

/**
 * Settings of jobs by glob on the name below the scope; the first glob that matches gives all of a job's API settings.
 * @throws ReprieveError ERR_REPRIEVE_INVALID_ARGUMENT naming the glob and the field
 */
export class JobRules {
  readonly #rules: Rule[];
  readonly #home: string | undefined;

  /** @param home path of the memcg that the handler lives in */
  constructor(jobs: unknown, home?: string) {
    this.#home = home;
    if (typeof jobs !== 'object' || jobs === null || Array.isArray(jobs)) {
      throw invalidOption('the `jobs` option', "an object such as { 'web-*': { priority: 90 } }", jobs);
    }
    this.#rules = Object.entries(jobs).map(([glob, settings]) => parseRule(glob, settings));
  }

  /** Settings of a job: the API's, then `trusted.reprieve.*`, then `user.reprieve.*`, then the defaults. */
  resolve(name: string, memcg: Memcg | null): ResolvedSettings {
    const rule = this.#rules.find(({ matches }) => matches(name));
    const origins: string[] = [];
    if (rule !== undefined) origins.push(`api '${rule.glob}'`);
    const notes: string[] = [];
    const isHome = memcg !== null && this.#home !== undefined && isAtOrBelow(this.#home, memcg.path);
    if (isHome) origins.push('the handler lives in it');
    const fromAttributes = <T>(field: string, parse: (text: string) => T | undefined): T | undefined => {
      if (memcg === null) return undefined;
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
    const settings = {
      priority: rule?.priority ?? fromAttributes('priority', parsePriorityText) ?? DEFAULT_PRIORITY,
      reservation: rule?.reservation ?? fromAttributes('reservation', parseSizeText) ?? 0,
      // Whole jobs die: with this one the handler would, or whoever it came with.
      protected: isHome || (rule?.protected ?? fromAttributes('protected', parseFlagText) ?? false),
      overPriority: rule?.overPriority ?? fromAttributes('overPriority', parsePriorityText) ?? null,
    };
    return { ...settings, from: [...(origins.length > 0 ? origins : ['default']), ...notes].join(', ') };
  }
}

function parseRule(glob: string, settings: unknown): Rule {
  const name = `\`jobs['${glob}']\``;
  if (typeof settings !== 'object' || settings === null) throw invalidOption(name, 'an object', settings);
  const { priority, reservation, protected: isProtected, overPriority, ...unknown } = settings as JobSettings;
  const [surplus] = Object.keys(unknown);
  if (surplus !== undefined) {
    throw invalidOption(name, 'made of priority, reservation, protected and overPriority', { [surplus]: '…' });
  }
  for (const [field, value] of Object.entries({ priority, overPriority })) {
    if (value !== undefined && !isPriority(value)) {
      throw invalidOption(`\`jobs['${glob}'].${field}\``, 'an integer from 0 to 100', value);
    }
  }
  if (isProtected !== undefined && typeof isProtected !== 'boolean') {
    throw invalidOption(`\`jobs['${glob}'].protected\``, 'true or false', isProtected);
  }
  return {
    glob,
    matches: picomatch(glob, { dot: true }),
    priority,
    reservation: reservation === undefined ? undefined : bytesOf(reservation, `\`jobs['${glob}'].reservation\``),
    protected: isProtected,
    overPriority,
  };
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

function isPriority(value: unknown): value is number {
  return Number.isInteger(value) && (value as number) >= 0 && (value as number) <= 100;
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
