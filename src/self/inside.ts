import { closeAll, isAtOrBelow, type Memcg } from '../cgroup/cgroup.js';
import { isVanished, ReprieveError } from '../errors.js';
import { SYSTEM_PATH } from '../source/scope.js';
import { formatMicros } from '../units.js';
import { openAbove } from '../watch.js';
import type { Ground } from './ground.js';
import type { OwnMemcgUse } from './own-memcg.js';

/** What a handler in a full memcg cannot do. */
const UNABLE =
  'while that is full the handler can neither open a file nor list processes (ENOMEM), and a page fault of its own parks it';

/** Stepped out for a scope that came near its limit, the handler goes back below this part of it. */
const BACK_AT = 0.9;

/** A handler that lives in what it watches: it steps out of a memcg that is full, or cannot work there. */
export class Inside {
  readonly #ground: Pick<Ground, 'own' | 'guard' | 'hierarchy'>;
  readonly #warn: (message: string) => void;
  /** When the handler stepped out, and was outside; in the clock's microseconds. */
  #outFromUs = 0;
  #outAtUs = 0;

  constructor(ground: Pick<Ground, 'own' | 'guard' | 'hierarchy'>, warn: (message: string) => void) {
    this.#ground = ground;
    this.#warn = warn;
  }

  /** True if the process lives in that memcg, whether or not it has stepped out of it just now. */
  #livesIn(path: string): boolean {
    const { own } = this.#ground;
    // The machine holds everybody, and nobody is parked there.
    return path !== SYSTEM_PATH && own.path !== undefined && isAtOrBelow(own.path, path);
  }

  /** The handler lives in that memcg, cannot leave it, and has a guard that can do what it cannot. */
  isUnableIn(path: string): boolean {
    const { own, guard } = this.#ground;
    return guard !== null && own.use === 'stays' && this.#livesIn(path);
  }

  whyUnable(path: string): string {
    return `${path} holds this handler (${this.#ground.own.whyNot}): ${UNABLE}`;
  }

  /**
   * Where the handler lives in a scope it must be able to leave it, or somebody outside must act for it.
   * @param raise whether the scope's limit is to be raised for the handler
   * @throws ReprieveError ERR_REPRIEVE_INVALID_ARGUMENT, ERR_REPRIEVE_INSIDE_SCOPE
   */
  check(path: string, raise: boolean): void {
    const { own, guard } = this.#ground;
    if (!this.#livesIn(path)) {
      if (!raise) return;
      throw new ReprieveError(
        'ERR_REPRIEVE_INVALID_ARGUMENT',
        `Expected a handler that lives in memcg:${path} for \`raiseLimit\`: it is in ${own.path ?? 'no memcg of this hierarchy'}, which that limit does not reach`,
      );
    }
    if (own.use === 'step-out') return;
    if (own.use === 'moved' && guard !== null) {
      // Only where v2 was delegated, which parks nobody: the handler can go on, and its guard too.
      this.#warn(
        `${path} holds this handler, in ${own.path}: it may make a memcg nowhere outside, and shares that limit`,
      );
      return;
    }
    if (own.refuge === null || guard === null) {
      throw new ReprieveError(
        'ERR_REPRIEVE_INSIDE_SCOPE',
        `The handler is itself in ${own.path}, inside memcg:${path}, and could not work there when it is full` +
          `${own.whyNot ? `; it was not moved out: ${own.whyNot}` : ''}`,
      );
    }
    this.#warn(`${this.whyUnable(path)}. Then the guard acts for it`);
  }

  /** The first act of an episode: whoever is in a full memcg can open nothing, and a page fault would park us. */
  stepOut(path: string): void {
    const { own } = this.#ground;
    if (own.use !== 'step-out' || own.isOut || !this.#livesIn(path)) return;
    const { clock } = this.#ground.hierarchy;
    this.#outFromUs = clock.nowUs();
    own.stepOut();
    this.#outAtUs = clock.nowUs();
    // The compiler holds on to what was checked above.
    if ((own.use as OwnMemcgUse) === 'stays') this.#warn(`The handler stays in ${own.path}: ${own.whyNot}`);
  }

  /** What can be gone through of stepping out without doing it. */
  drill(path: string): void {
    if (this.#livesIn(path)) this.#ground.own.drill();
  }

  /** That the handler stepped out for a memcg, and how long it took; null if it did not. */
  sayOut(path: string, eventUs: number): string | null {
    const { own } = this.#ground;
    if (!own.isOut || !this.#livesIn(path)) return null;
    const took = formatMicros(this.#outAtUs - this.#outFromUs);
    const before = eventUs - this.#outFromUs;
    const when = before > 0 ? `, begun ${formatMicros(before)} before the event` : '';
    return `stepped out of ${own.path} in ${took}${when}`;
  }

  /**
   * Where nothing is open, or near its limit, that holds the process.
   * @param open paths of the memcgs that are out of memory
   */
  stepBack(open: Iterable<string>): void {
    const { own } = this.#ground;
    if (own.use !== 'step-out') return;
    for (const path of open) if (this.#livesIn(path)) return;
    if (own.isOut && this.#isHomeFull()) return;
    const whyNot = own.stepBack();
    if (whyNot !== null) this.#warn(`The handler stays in ${own.path}: ${whyNot}`);
  }

  /** Programs that were started outside go back too; for want of a descriptor, say, at the next tick. */
  fetchPrograms(): void {
    try {
      this.#ground.own.fetchPrograms();
    } catch (error) {
      this.#warn(`looking for programs that were started outside: ${(error as Error).message}`);
    }
  }

  /** Where the process would go back to, watched or not. */
  #isHomeFull(): boolean {
    const { own, hierarchy } = this.#ground;
    const opened: Memcg[] = [];
    try {
      if (own.path === undefined || own.path === '/') return false;
      opened.push(...openAbove(hierarchy, own.path), hierarchy.open(own.path));
      return opened.some((memcg) => memcg.usage() > memcg.limit() * BACK_AT);
    } catch (error) {
      const gone = isVanished(error) || (error as ReprieveError).code === 'ERR_REPRIEVE_NOT_A_MEMCG'; // going back says so
      if (!gone) this.#warn(`looking at ${own.path}: ${(error as Error).message}`);
      return false;
    } finally {
      closeAll(opened);
    }
  }
}
