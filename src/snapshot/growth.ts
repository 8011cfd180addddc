/** A rate is taken over at least this long: samples are taken in quick succession when something happens. */
const SPAN_US = 500_000;
/** Where there is no more yet, over at least this. */
const LEAST_US = 50_000;

interface Point {
  bytes: number;
  atUs: number;
}

interface Course {
  base: Point;
  /** The base of what is noted later. */
  middle: Point;
  last: Point;
}

/** How quickly each job's memory grows: from what is noted of it, over the last half second, or a second and a half at most. */
export class Growth {
  #jobs = new Map<string, Course>();
  /** When that was, in the clock's microseconds; null before the first time. */
  notedUs: number | null = null;

  /** What all jobs hold now, in bytes by identity; who is not named is forgotten. */
  note(held: ReadonlyMap<string, number>, atUs: number): void {
    const jobs = new Map<string, Course>();
    for (const [identity, bytes] of held) {
      const last = { bytes, atUs };
      const before = this.notedUs === null ? last : { bytes: 0, atUs: this.notedUs };
      const { base, middle } = this.#jobs.get(identity) ?? { base: before, middle: before };
      jobs.set(identity, atUs - middle.atUs < SPAN_US ? { base, middle, last } : { base: middle, middle: last, last });
    }
    this.#jobs = jobs;
    this.notedUs = atUs;
  }

  /** Bytes per second, negative for one that gives memory back; one that is new held nothing at the look before. */
  of(identity: string): number {
    const { base, last } = this.#jobs.get(identity) ?? {};
    if (base === undefined || last === undefined || last.atUs - base.atUs < LEAST_US) return 0;
    return ((last.bytes - base.bytes) / (last.atUs - base.atUs)) * 1e6;
  }
}
