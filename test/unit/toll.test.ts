import { expect, test } from 'vitest';
import { Toll } from '../../src/condition/toll.js';

/** A thread that has been held up by more at each reading. */
function makeToll(fromUs: number, pauses: { atUs: number; us: number }[] = []) {
  const readings = [
    [10, 1, 5, 2],
    [13, 1, 6, 4],
  ];
  const readUsage = (out: Float64Array) => out.set(readings.shift() ?? []);
  const asked: number[] = [];
  const heap = {
    tend() {},
    collections(from: number, to: number) {
      asked.push(from, to);
      const between = pauses.filter(({ atUs }) => atUs >= from && atUs <= to);
      return { count: between.length, us: between.reduce((sum, { us }) => sum + us, 0) };
    },
  };
  const atEvent = new Float64Array(4);
  readUsage(atEvent);
  const toll = new Toll(readUsage, heap, atEvent, fromUs);
  atEvent.fill(99); // the next event's
  return { toll, asked };
}

test('what came between event and kill is the difference of both readings, and the pauses between', () => {
  const { toll, asked } = makeToll(1000, [
    { atUs: 900, us: 5 },
    { atUs: 1100, us: 7 },
    { atUs: 1201, us: 11 },
  ]);
  toll.killed();
  expect(toll.figures(200)).toEqual({
    faults: { minor: 3, major: 0 },
    contextSwitches: { voluntary: 1, involuntary: 2 },
    collections: { count: 1, us: 7 },
  });
  expect(asked).toEqual([1000, 1200]);
});

test('where nobody was killed there is nothing to tell', () => {
  const { toll, asked } = makeToll(1000);
  expect(toll.figures(null)).toEqual({ faults: null, contextSwitches: null, collections: null });
  expect(asked).toEqual([]);
});
