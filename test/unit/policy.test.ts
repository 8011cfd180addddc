import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { explain, type Job, lowestPriority, type Snapshot } from '../../src/index.js';
import { compareJobs, firstTier, isCandidate, rankForGuard, rankJobs } from '../../src/policy/lowest-priority.js';
import { MiB } from '../support/simulation.js';

const job = (id: string, given: Partial<Job> = {}): Job => ({
  id,
  name: id,
  kind: 'memcg',
  priority: 50,
  overPriority: null,
  reservation: 0,
  protected: false,
  settings: 'default',
  anon: 10 * MiB,
  swap: 0,
  shmem: 0,
  file: 0,
  born: 1,
  killed: false,
  ...given,
});

const snapshotOf = (jobs: Job[]): Snapshot => ({
  version: 1,
  owner: '/jobs',
  above: false,
  limit: 64 * MiB,
  usage: 64 * MiB,
  sinceUs: 0,
  victims: [],
  jobs,
});

describe('who is prepared to die first, before anybody has to', () => {
  const idle = { anon: 0.2 * MiB, priority: 10 };
  const ids = (jobs: Job[]) => jobs.map(({ id }) => id);

  test('a job that holds next to nothing: it may be the one that grows', () => {
    const jobs = [job('web'), job('idle', idle), job('spared', { protected: true, priority: 0 })];
    expect(ids(firstTier(jobs))).toEqual(['idle']);
    expect(ids(rankForGuard(jobs))).toEqual(['idle', 'web']);
  });

  test('a memcg that holds files is none, but a process has mapped its program', () => {
    const holding = { ...idle, file: 2 * MiB };
    expect(ids(firstTier([job('web'), job('cache', holding)]))).toEqual(['web']);
    expect(ids(rankForGuard([job('web'), job('cache', holding)]))).toEqual(['web', 'cache']);
    expect(ids(firstTier([job('web'), job('program', { ...holding, kind: 'process' })]))).toEqual(['program']);
  });
});

describe('who dies first', () => {
  const within = { reservation: 20 * MiB };
  test.each([
    ['not a protected one', job('b'), job('a', { protected: true, priority: 0 }), /only job that may be killed/],
    ['not one killed before', job('b'), job('a', { killed: true, priority: 0 }), /only job that may be killed/],
    [
      'above before within its reservation',
      job('b', { priority: 90 }),
      job('a', { ...within, priority: 0 }),
      /10 MiB above its reservation, and a is within its own/,
    ],
    [
      'by its overPriority among those within',
      job('b', { overPriority: 5 }),
      job('a', { ...within, priority: 9 }),
      /priority 5 is the lowest \(next is a with 9\)/,
    ],
    [
      'after those above, with an overPriority',
      job('b'),
      job('a', { overPriority: 0, priority: 0 }),
      /and a is ranked by its overPriority/,
    ],
    [
      'not by its overPriority while within',
      job('b', { ...within, priority: 40 }),
      job('a', { ...within, overPriority: 0 }),
      /priority 40 is the lowest/,
    ],
    [
      'the lower priority, however small',
      job('b', { priority: 1 }),
      job('a', { anon: 60 * MiB }),
      /priority 1 is the lowest \(next is a with 50\)/,
    ],
    [
      'the larger overage',
      job('b'),
      job('a', { anon: 12 * MiB, reservation: 8 * MiB }),
      /further above its reservation/,
    ],
    [
      'more memory',
      job('b', { ...within, anon: 9 * MiB, swap: 3 * MiB }),
      job('a', { ...within, anon: 11 * MiB }),
      /holds more memory/,
    ],
    ['the younger', job('b', { born: 2 }), job('a'), /it is younger/],
    ['by name', job('a'), job('b'), /comes first by name/],
  ])('%s', (_, first, other, because) => {
    for (const jobs of [
      [first, other],
      [other, first],
    ]) {
      const decision = lowestPriority(snapshotOf(jobs));
      expect(decision).toMatchObject({ action: 'kill', victim: first.id });
      expect(decision.because).toMatch(because);
    }
  });

  test.each([
    ['tmpfs', { anon: MiB / 2, shmem: 40 * MiB }, /bring back 512 KiB only; 40 MiB are tmpfs or page cache/],
    ['page cache', { anon: 0, file: 40 * MiB }, /bring back 0 B only; 40 MiB are tmpfs or page cache/],
    ['nothing', { anon: 0 }, /it holds no memory/],
  ])('a job that holds %s is no candidate', (_, memory, why) => {
    const snapshot = snapshotOf([job('a', { ...memory, priority: 0 })]);
    expect(lowestPriority(snapshot).action).toBe('kernel');
    expect(explain(snapshot)).toEqual([expect.stringMatching(why)]);
  });
});

describe('properties', () => {
  // Small ranges, so that every criterion meets ties.
  const bytes = fc.constantFrom(0, 4096, MiB, 2 * MiB, 3 * MiB);
  const jobs = fc
    .uniqueArray(
      fc.record({
        id: fc.stringMatching(/^[a-f]{1,2}$/),
        priority: fc.integer({ min: 0, max: 2 }),
        overPriority: fc.option(fc.integer({ min: 0, max: 2 })),
        reservation: bytes,
        protected: fc.boolean(),
        killed: fc.boolean(),
        anon: bytes,
        swap: bytes,
        shmem: bytes,
        file: bytes,
        born: fc.integer({ min: 1, max: 3 }),
      }),
      { selector: ({ id }) => id, maxLength: 10 },
    )
    .map((all) => all.map(({ id, ...given }) => job(id, given)));
  const check = <T extends unknown[]>(arbitraries: fc.Arbitrary<T>, holds: (...drawn: T) => void) =>
    fc.assert(
      fc.property(arbitraries, (drawn) => holds(...drawn)),
      { seed: 1, numRuns: 500 },
    );

  test('any order of the jobs gives the same ranking, the same victim and the same sentences', () => {
    const shuffled = jobs.chain((all) =>
      fc.tuple(fc.constant(all), fc.shuffledSubarray(all, { minLength: all.length })),
    );
    check(shuffled, (all, other) => {
      expect(rankJobs(other)).toEqual(rankJobs(all));
      expect({ ...lowestPriority(snapshotOf(other)) }).toEqual({ ...lowestPriority(snapshotOf(all)) });
      expect(explain(snapshotOf(other))).toEqual(explain(snapshotOf(all)));
    });
  });

  test('the order is antisymmetric, transitive and total', () => {
    check(fc.tuple(jobs), (all) => {
      for (const a of all) {
        for (const b of all) {
          expect(Math.sign(compareJobs(a, b)) + Math.sign(compareJobs(b, a))).toBe(0);
          expect(compareJobs(a, b) === 0).toBe(a === b);
          for (const c of all) {
            if (compareJobs(a, b) < 0 && compareJobs(b, c) < 0) expect(compareJobs(a, c)).toBeLessThan(0);
          }
        }
      }
    });
  });

  test('the victim is the first of the ranking, and a snapshot through JSON gives the same decision', () => {
    check(fc.tuple(jobs), (all) => {
      const snapshot = snapshotOf(all);
      const decision = { ...lowestPriority(snapshot) };
      expect(decision.victim).toBe(rankJobs(all)[0]?.id);
      expect({ ...lowestPriority(JSON.parse(JSON.stringify(snapshot))) }).toEqual(decision);
    });
  });

  test('explain has exactly one sentence a job, candidates first', () => {
    check(fc.tuple(jobs), (all) => {
      const sentences = explain(snapshotOf(all));
      expect(sentences.map((sentence) => sentence.split(' ')[0]).sort()).toEqual(all.map(({ name }) => name).sort());
      for (const sentence of sentences)
        expect(sentence).toMatch(/^\w+ (dies first|lives on|is no candidate): .+[^.]\.$/);
      expect(sentences.filter((sentence) => / is no candidate: /.test(sentence))).toHaveLength(
        all.filter((one) => !isCandidate(one)).length,
      );
    });
  });
});
