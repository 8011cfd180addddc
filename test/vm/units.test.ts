import { expect, test } from 'vitest';
import { describeVm, startVm } from '../support/vm.js';

const guest = (name: string) => [process.execPath, `test/vm/guest/${name}.mjs`];
const MiB = 2 ** 20;

describeVm('cgroups of v2 that are not all ours', () => {
  test('units of systemd: what it writes anew is taken as the new limit, and is what is left at the end', async () => {
    const { told } = startVm(['--systemd', '--memory', '1GiB'], guest('units'));
    const { code, stdout, stderr } = await told;
    expect(stderr).toBe('');
    expect(code).toBe(0);
    const seen = JSON.parse(stdout);
    // In MiB: memory.high at the limit, memory.max the reserve above it; memory.oom.group of the job that is to die first.
    const watched = (limit: number) => ({
      service: [limit, limit + 16],
      slice: [limit, limit + 16],
      groups: ['0', '1'],
    });
    const systemds = (limit: number) => ({ service: ['max', limit], slice: ['max', limit] });
    expect(seen.watched.after).toEqual(watched(96));
    expect(seen.reloaded.before).toEqual({ ...systemds(96), groups: ['0', '0'] });
    expect(seen.reloaded.after).toEqual(watched(96));
    expect(seen.set.before).toMatchObject(systemds(128));
    expect(seen.set.after).toEqual(watched(128));
    expect(seen.reports).toEqual([
      {
        owner: '/system.slice/reprieve-test.service',
        limit: 128 * MiB,
        outcome: 'cleared',
        victims: ['bash'], // by the name that it had when it was first seen
        kernelVictims: [],
      },
      {
        owner: '/reprievetest.slice',
        limit: 128 * MiB,
        outcome: 'cleared',
        victims: ['bad.service'],
        kernelVictims: [],
      },
    ]);
    expect(seen.left.sort()).toEqual(['bash', 'reprieve-worklo']);
    expect(seen.handled).toEqual({ service: [128, 144], slice: [128, 144] });
    expect(seen.closed).toEqual({ ...systemds(128), group: '0' });
  });

  test('a delegated subtree, by a user who is not root, and cgroups that may only be read', async () => {
    const { told } = startVm(['--memory', '1GiB'], guest('delegated'));
    const { code, stdout, stderr } = await told;
    expect(stderr).toBe('');
    expect(code).toBe(0);
    const { root, user, readOnly, othersLive } = JSON.parse(stdout);
    const ground = '/user.slice/user-1000.slice/user@1000.service';

    expect(root).toMatchObject({
      status: 0,
      ready: true,
      scopes: {
        memcg: { by: 'v2', whileThinking: 'throttled', lacks: [] },
        system: { by: 'v2', whileThinking: 'frozen', lacks: [] },
      },
    });
    const { doctor } = user;
    expect(doctor).toMatchObject({
      status: 0,
      ready: true,
      scopes: { memcg: { by: 'v2', whileThinking: 'throttled' } },
    });
    expect(doctor.rows['memory.high and .max']).toEqual({ ok: true, found: `can be written below ${ground}` });
    expect(doctor.rows['state directory']).toEqual({ ok: true, found: '/run/user/1000/reprieve, can be written' });
    expect(doctor.rows.oom_score_adj.ok).toBe(false);
    expect(doctor.scopes.system.lacks).toHaveLength(2);

    expect(user.own).toMatchObject({
      use: 'moved',
      path: expect.stringMatching(`^${ground}/reprieve-handler-\\d+$`),
      whyNot: null,
      scheduling: 'keep',
      protected: true,
    });
    expect(user.errors.holdsOthers).toMatchObject({
      code: 'ERR_REPRIEVE_PERMISSION',
      message: expect.stringMatching(/memory\.(max|high).*EACCES/),
    });
    expect(user.errors.watchesOthers).toBeNull();
    expect(user.errors.holdsMe).toBeNull();

    const episode = { outcome: 'cleared', goodLives: true, score: '0' };
    // Emulated, the handler may be slower than the kernel where nobody is held: then that takes the right one.
    const outcome = expect.stringMatching(/^(cleared|kernel)$/);
    const limit = String(64 * MiB);
    expect(user.left).toMatchObject({
      ...episode,
      outcome,
      armed: ['max', limit],
      died: ['bad'],
      after: ['max', limit],
    });
    expect(user.held).toMatchObject({
      ...episode,
      armed: [limit, String(72 * MiB)],
      died: ['bad'],
      after: ['max', limit],
    });
    expect(user.system).toMatchObject({
      ...episode,
      died: [`${ground.slice(1)}/machine/bad`],
      othersAre: { protected: true, from: expect.stringMatching(/another user/) },
    });
    expect(othersLive).toBe(true);
    const pressure = /^(\S+), watched as memcg:\1: it is not seen .*\/memory\.pressure': Permission denied \(EACCES\)$/;
    expect(user.warnings).toEqual([
      expect.stringMatching(pressure),
      expect.stringMatching(`^${ground} holds this handler, in ${ground}/reprieve-handler-`),
      expect.stringMatching(pressure),
      expect.stringMatching(/^the kernel may take this handler or its guard as a victim: EACCES/),
    ]);

    // As root, where all cgroups may only be read.
    expect(readOnly).toMatchObject({
      status: 0,
      doctor: { status: 0, scopes: { memcg: { by: 'v2', whileThinking: 'goes on' }, system: { by: 'v2' } } },
      warnings: [expect.stringMatching(/memory\.pressure.*EROFS/)],
      // Emulated, the kernel may take another one while our victim is still dying.
      episode: { outcome, died: expect.any(Number) },
    });
    expect(user).toMatchObject({ status: 0, state: ['records'], refuges: [], back: `0::${ground}/app` });
  });
});
