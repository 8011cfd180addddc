/** A rate is taken over at least this long: samples are taken in quick succession when something happens. */
const SPAN_US = 500_000;

interface Point {
  bytes: number;
  atUs: number;
}

/** How quickly each job's memory grows: from what is noted of it, over the last half second to second and a half. */
export class Growth {
  #jobs = new Map<string, { base: Point; last: Point }>();

  /** What all jobs hold now, in bytes by identity; who is not named is forgotten. */
  note(held: ReadonlyMap<string, number>, atUs: number): void {
    const jobs = new Map<string, { base: Point; last: Point }>();
    for (const [identity, bytes] of held) {
      const point = { bytes, atUs };
      const known = this.#jobs.get(identity);
      if (known === undefined) jobs.set(identity, { base: point, last: point });
      else
        jobs.set(identity, {
          base: known.last.atUs - known.base.atUs < SPAN_US ? known.base : known.last,
          last: point,
        });
    }
    this.#jobs = jobs;
  }

  /** Bytes per second; 0 for one that is new, negative for one that gives memory back. */
  of(identity: string): number {
    const { base, last } = this.#jobs.get(identity) ?? {};
    if (base === undefined || last === undefined || last.atUs === base.atUs) return 0;
    return ((last.bytes - base.bytes) / (last.atUs - base.atUs)) * 1e6;
  }
}
