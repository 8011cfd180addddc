import { expect, test } from 'vitest';
import { VirtualClock } from '../../src/cgroup/simulated.js';
import { NO_PACE } from '../../src/self/hardening.js';
import { type Piece, Upkeep } from '../../src/self/upkeep.js';

/** A clock on which work takes its time. */
class WorkClock extends VirtualClock {
  #workedUs = 0;

  override nowUs(): number {
    return super.nowUs() + this.#workedUs;
  }

  work(ms: number): void {
    this.#workedUs += ms * 1000;
  }
}

function stage(isUnwelcome = () => false) {
  const clock = new WorkClock();
  const done: [string, number][] = [];
  const upkeep = new Upkeep(clock, NO_PACE, isUnwelcome);
  const piece =
    (name: string, ms: number): Piece =>
    () => {
      done.push([name, clock.nowUs() / 1000]);
      clock.work(ms);
    };
  return { clock, done, upkeep, piece };
}

test('after a piece there is as much time as it took, up to 50 ms', async () => {
  const { clock, done, upkeep, piece } = stage();
  upkeep.begin(() => [piece('a', 4), piece('b', 200), piece('c', 0)]);
  await clock.advance(1_000);
  expect(done).toEqual([
    ['a', 0],
    ['b', 8],
    ['c', 258],
  ]);
});

test('while it is not done nothing else is begun, and what was begun can be stopped', async () => {
  const { clock, done, upkeep, piece } = stage();
  upkeep.begin(() => [piece('a', 4), piece('b', 4)]);
  upkeep.begin(() => [piece('too early', 1)]);
  await clock.advance(3);
  upkeep.stop();
  await clock.advance(100);
  upkeep.begin(() => [piece('c', 1)]);
  expect(done.map(([name]) => name)).toEqual(['a', 'c']);
});

test('it waits until the processor is not needed for somebody else', async () => {
  let isDying = true;
  const { clock, done, upkeep, piece } = stage(() => isDying);
  upkeep.begin(() => [piece('a', 1)]);
  await clock.advance(500);
  expect(done).toEqual([]);
  isDying = false;
  await clock.advance(60);
  expect(done.map(([name]) => name)).toEqual(['a']);
});
