import { readFileSync } from 'node:fs';
import picomatch from 'picomatch';
import { invalidOption } from '../errors.js';
import { bytesOf, type Size } from '../units.js';
import { type ProcessFacts, unitOf } from './processes.js';

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

/** What a rule speaks of: all fields that are given must hold. */
export interface JobMatch {
  /** Glob on the job's name: a memcg's path below the scope, or what a job of processes is called where no rule made it. */
  name?: string;
  /** Effective user: a number, or a name of /etc/passwd. */
  uid?: number | string;
  /** Glob on the path of the program. */
  exe?: string;
  /** Glob on the name of the program, of which the kernel keeps 15 bytes. */
  comm?: string;
  /** Glob on a cgroup path, which begins with '/': a memcg's, or any of those in /proc/PID/cgroup. */
  cgroup?: string;
  /** Number of a session. */
  session?: number;
  /** Glob on a systemd unit: the last `*.service` or `*.scope` in the cgroup path. */
  unit?: string;
}

/** Settings for what a rule matches; the first that matches gives all of a job's API settings. */
export interface JobRule extends JobSettings {
  match: JobMatch;
  /** What the job is called in reports. */
  name?: string;
}

/** A rule as it was read. */
export interface Rule {
  /** What it is called where settings come from: `api 'web-*'`, `api jobs[2]`. */
  readonly label: string;
  readonly name: string | undefined;
  readonly priority: number | undefined;
  readonly reservation: number | undefined;
  readonly protected: boolean | undefined;
  readonly overPriority: number | undefined;
  /** By name or path alone a memcg is made a job; a glob that takes every name only gives settings. */
  readonly names: boolean;
  /** It asks for the program: each process that it matches is the root of a tree. */
  readonly roots: boolean;
  readonly uid: number | undefined;
  readonly session: number | undefined;
  readonly is: Readonly<Partial<Record<GlobField, (text: string) => boolean>>>;
}

type GlobField = (typeof GLOBS)[number];
const GLOBS = ['name', 'exe', 'comm', 'cgroup', 'unit'] as const;
const MATCH_FIELDS = [...GLOBS, 'uid', 'session'] as const;
const SETTINGS = ['priority', 'reservation', 'protected', 'overPriority'] as const;

/**
 * Rules of the `jobs` option: an object of settings by glob on the name, or an array.
 * @throws ReprieveError ERR_REPRIEVE_INVALID_ARGUMENT naming the rule and the field
 */
export function parseRules(jobs: unknown): Rule[] {
  if (Array.isArray(jobs)) return jobs.map((rule, index) => parseRule(`jobs[${index}]`, rule));
  if (typeof jobs !== 'object' || jobs === null) {
    throw invalidOption('the `jobs` option', "an object such as { 'web-*': { priority: 90 } }, or an array", jobs);
  }
  return Object.entries(jobs).map(([glob, settings]) => {
    const where = `jobs['${glob}']`;
    return { ...readRule(where, settings, [], { name: glob }), label: `api '${glob}'` };
  });
}

function parseRule(where: string, rule: unknown): Rule {
  if (typeof rule !== 'object' || rule === null) throw invalidOption(`\`${where}\``, 'an object with a `match`', rule);
  const { match, name } = rule as JobRule;
  if (typeof match !== 'object' || match === null || Array.isArray(match)) {
    throw invalidOption(`\`${where}.match\``, "an object such as { comm: 'java' }", match);
  }
  if (name !== undefined && (typeof name !== 'string' || name === '')) {
    throw invalidOption(`\`${where}.name\``, 'a text', name);
  }
  return readRule(where, rule, ['match', 'name'], match);
}

function readRule(where: string, rule: unknown, besides: readonly string[], match: JobMatch): Rule {
  if (typeof rule !== 'object' || rule === null) throw invalidOption(`\`${where}\``, 'an object', rule);
  refuseOthers(`\`${where}\``, rule, [...besides, ...SETTINGS]);
  refuseOthers(`\`${where}.match\``, match, MATCH_FIELDS);
  const { priority, reservation, protected: isProtected, overPriority, name } = rule as JobRule;
  for (const [field, value] of Object.entries({ priority, overPriority })) {
    if (value !== undefined && !isPriority(value)) {
      throw invalidOption(`\`${where}.${field}\``, 'an integer from 0 to 100', value);
    }
  }
  if (isProtected !== undefined && typeof isProtected !== 'boolean') {
    throw invalidOption(`\`${where}.protected\``, 'true or false', isProtected);
  }
  const is: Rule['is'] = Object.fromEntries(
    GLOBS.flatMap((field) => {
      const glob = readGlob(`\`${where}.match.${field}\``, field, match[field]);
      return glob === undefined ? [] : [[field, picomatch(glob, { dot: true })]];
    }),
  );
  const uid = match.uid === undefined ? undefined : readUser(`\`${where}.match.uid\``, match.uid);
  const { session } = match;
  if (session !== undefined && !(Number.isInteger(session) && session > 0)) {
    throw invalidOption(`\`${where}.match.session\``, 'the number of a session', session);
  }
  if (Object.keys(is).length === 0 && uid === undefined && session === undefined) {
    throw invalidOption(`\`${where}.match\``, `made of at least one of ${MATCH_FIELDS.join(', ')}`, match);
  }
  return {
    label: `api ${where}`,
    name,
    priority,
    reservation: reservation === undefined ? undefined : bytesOf(reservation, `\`${where}.reservation\``),
    protected: isProtected,
    overPriority,
    names: [match.name, match.cgroup, match.unit].some((glob) => glob !== undefined && !/^[*?/]*$/.test(glob)),
    roots: match.comm !== undefined || match.exe !== undefined,
    uid,
    session,
    is,
  };
}

function refuseOthers(where: string, given: object, fields: readonly string[]): void {
  const surplus = Object.keys(given).find((field) => !fields.includes(field));
  if (surplus === undefined) return;
  throw invalidOption(where, `made of ${fields.slice(0, -1).join(', ')} and ${fields.at(-1)}`, { [surplus]: '…' });
}

function readGlob(where: string, field: GlobField, glob: unknown): string | undefined {
  if (glob === undefined) return undefined;
  const isPath = field === 'cgroup' || field === 'exe';
  if (typeof glob === 'string' && glob !== '' && (!isPath || /^[/*{(!]/.test(glob))) return glob;
  throw invalidOption(where, isPath ? "a glob on a path, which begins with '/'" : 'a glob', glob);
}

function readUser(where: string, user: unknown): number {
  if (Number.isInteger(user) && (user as number) >= 0) return user as number;
  const found =
    typeof user === 'string'
      ? readFileSync('/etc/passwd', 'utf8')
          .split('\n')
          .map((line) => line.split(':'))
          .find(([name]) => name === user)
      : undefined;
  if (found !== undefined) return Number(found[2]);
  throw invalidOption(where, 'a user id, or the name of a user in /etc/passwd', user);
}

export function isPriority(value: unknown): value is number {
  return Number.isInteger(value) && (value as number) >= 0 && (value as number) <= 100;
}

/** Whether a rule speaks of a memcg; one that asks for something of a process does not. */
export function matchesMemcg({ is, roots, uid, session }: Rule, name: string, path: string): boolean {
  if (roots || uid !== undefined || session !== undefined) return false;
  if (is.name?.(name) === false || is.cgroup?.(path) === false) return false;
  return is.unit === undefined || is.unit(unitOf(path)?.unit ?? '');
}

/**
 * What of a process a rule holds it by, such as `['uid:1000']`; null if it does not match. The name, which only a job has,
 * is not looked at.
 */
export function matchProcess({ is, uid, session }: Rule, facts: ProcessFacts): string[] | null {
  const values: string[] = [];
  if (uid !== undefined) {
    if (facts.uid !== uid) return null;
    values.push(`uid:${uid}`);
  }
  if (session !== undefined) {
    if (facts.session !== session) return null;
    values.push(`session:${session}`);
  }
  if (is.exe !== undefined && (facts.exe === null || !is.exe(facts.exe))) return null;
  if (is.comm !== undefined && !is.comm(facts.comm)) return null;
  if (is.cgroup !== undefined) {
    const { cgroup } = is;
    const path = facts.cgroups.find((one) => cgroup(one));
    if (path === undefined) return null;
    values.push(`cgroup:${path}`);
  }
  if (is.unit !== undefined) {
    const unit = unitOf(facts.place);
    if (unit === null || !is.unit(unit.unit)) return null;
    if (is.cgroup === undefined) values.push(`cgroup:${unit.path}`);
  }
  return values;
}
