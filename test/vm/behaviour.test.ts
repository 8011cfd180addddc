import { spawnSync } from 'node:child_process';
import { expect, test } from 'vitest';
import { describeVm } from '../support/vm.js';

/**
 * Of each kind of behaviour one that says most: all of them, in all places, take half an hour in an emulated machine
 * (`node scripts/interface-table.mjs`).
 */
const CHOSEN = '^(one-waiter|priority|protected|policy-silent|policy-slow|page-cache|report)$';
const PLACES = ['v1-vm', 'v2', 'v2-hold', 'system-v1', 'system-v2', 'system-plain'];

interface Told {
  results: { id: string; status?: string }[];
}

describeVm('the behaviours in virtual machines', () => {
  test.each(PLACES)('%s', { timeout: 300_000 }, (place) => {
    const { stdout, stderr } = spawnSync(process.execPath, ['scripts/behaviour.mjs', place, CHOSEN], {
      encoding: 'utf8',
    });
    const { results } = JSON.parse(stdout) as Told;
    const failed = results.filter(({ status }) => status !== 'passed' && status !== 'skipped');
    expect(failed, stderr).toEqual([]);
    expect(results.filter(({ status }) => status === 'passed').length, stderr).toBeGreaterThan(4);
  });
});
