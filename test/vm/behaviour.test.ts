import { spawnSync } from 'node:child_process';
import { expect, test } from 'vitest';
import { describeVm } from '../support/vm.js';

/**
 * Of each place those that say most and do not depend on how quick the machine is: all of them take half an hour in emulated
 * machines (`node scripts/interface-table.mjs`). Without `hold` a kernel of v2 kills before an emulated handler does.
 */
const CHOSEN = {
  'v1-vm': 'one-waiter',
  v2: 'close|scope-removed',
  'v2-hold': 'one-waiter|priority|policy-slow|page-cache',
  'system-v1': 'one-waiter',
  'system-v2': 'one-waiter',
  'system-plain': 'one-waiter',
};

interface Told {
  results: { id: string; status?: string }[];
}

describeVm('the behaviours in virtual machines', () => {
  test.each(Object.entries(CHOSEN))('%s', (place, ids) => {
    const words = ['scripts/behaviour.mjs', place, `^(${ids})$`];
    const { stdout, stderr } = spawnSync(process.execPath, words, { encoding: 'utf8' });
    const { results } = JSON.parse(stdout) as Told;
    const failed = results.filter(({ status }) => status !== 'passed' && status !== 'skipped');
    expect(failed, stderr).toEqual([]);
    expect(results.map(({ id }) => id).toSorted()).toEqual(ids.split('|').toSorted());
  });
});
