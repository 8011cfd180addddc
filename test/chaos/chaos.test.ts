import { spawnSync } from 'node:child_process';
import { expect, test } from 'vitest';
import { describeHost } from '../support/memcg.js';

interface Run {
  summary: { episodes: number; violations: number };
  episodes: { faults: string[]; violations: string[]; outcome: string }[];
}

function chaos(...words: string[]): Run & { status: number | null } {
  const { status, stdout, stderr } = spawnSync(process.execPath, ['scripts/chaos.mjs', '--json', ...words], {
    encoding: 'utf8',
    maxBuffer: 2 ** 28,
  });
  if (stdout === '') throw new Error(stderr);
  return { status, ...(JSON.parse(stdout) as Run) };
}

describeHost('the chaos runner', () => {
  test('finds nothing where nothing is switched off', { timeout: 120_000 }, () => {
    const { status, episodes } = chaos('--seed', '1', '--episodes', '30');
    expect(episodes.flatMap(({ violations }) => violations)).toEqual([]);
    expect(status).toBe(0);
  });

  // Handlers that die while jobs are frozen and a limit is raised: with one thing missing it must be seen.
  const faults = 'handler-kill,handler-abort,policy-busy';
  test.each([
    ['guard', /was parked for/],
    ['restoration', /was (parked|frozen) for/],
    ['thaw', /was frozen for/],
    ['scores', /oom_score_adj of .* is 1000/],
    ['kills', /gave it to the kernel while somebody waited/],
    ['restraint', /was killed (though memory was back|while .* was dying)/],
    ['windows', /left: .*reprieve-window-|processes left: /],
  ])('misses the %s when it is switched off', { timeout: 180_000 }, (what, expected) => {
    const { status, episodes } = chaos('--without', what, '--seed', '7', '--episodes', '6', '--faults', faults);
    expect(episodes.flatMap(({ violations }) => violations).join('\n')).toMatch(expected);
    expect(status).toBe(1);
  });

  test('plays the same scenario for the same seed', { timeout: 60_000 }, () => {
    const [once, again] = [0, 1].map(() => chaos('--replay', '3:2').episodes[0]?.faults);
    expect(once).toEqual(again);
  });
});
