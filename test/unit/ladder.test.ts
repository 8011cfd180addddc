import { expect, test } from 'vitest';
import { lowestPriority, type Report, renderReport } from '../../src/index.js';
import { simulate } from '../support/simulation.js';

const MiB = 2 ** 20;

test('the lowest priority dies, the others go on', async () => {
  const { clock, hierarchy, handler } = simulate();
  const web = hierarchy.spawn(hierarchy.make('/jobs/web'), 'web', 20 * MiB);
  hierarchy.make('/jobs', 64 * MiB);
  const batch = hierarchy.spawn(hierarchy.make('/jobs/batch'), 'batch', 30 * MiB);
  const reports: Report[] = [];
  handler.on('report', (report) => reports.push(report));
  await handler.watch('memcg:/jobs', {
    policy: lowestPriority,
    jobs: { web: { priority: 90 }, batch: { priority: 10 } },
  });
  expect(hierarchy.grow(batch, 10 * MiB)).toBe(true);
  expect(hierarchy.grow(web, 10 * MiB)).toBe(false);
  await clock.advance(100);
  expect(batch.gone).toBe(true);
  expect(web.anon).toBe(30 * MiB);
  expect(reports.map(({ outcome }) => outcome)).toEqual(['cleared']);
  console.log(renderReport(reports[0] as Report));
  await handler.close();
});
