import { readFileSync, rmdirSync } from 'node:fs';
import { expect, test } from 'vitest';
import { ControlFiles } from '../../src/guard/control-files.js';
import { NO_EPOCH } from '../../src/guard/epoch.js';
import { openInstance } from '../../src/guard/instance.js';
import { describeHost, type Host, MiB, useHost } from '../support/memcg.js';

const mounts = { memory: '/sys/fs/cgroup/memory', freezer: '/sys/fs/cgroup/freezer' };
const LIMIT = 'memory.limit_in_bytes';

describeHost('control files that are changed for a while', () => {
  const newHost = useHost();

  function begin(host: Host) {
    const state = `${host.directory}/state`;
    const instance = openInstance(state, mounts, NO_EPOCH);
    const files = new ControlFiles(instance.ledger, NO_EPOCH, mounts);
    const written = () =>
      readFileSync(`${state}/${instance.name}/files`, 'utf8')
        .split('\n')
        .map((line) => line.trim())
        .filter(Boolean);
    return { instance, files, written };
  }

  test('are written down before, and forgotten when they are back', () => {
    const host = newHost();
    host.make('', 64 * MiB);
    const { instance, files, written } = begin(host);
    files.change('memory', host.path, LIMIT, String(80 * MiB));
    files.change('memory', host.path, LIMIT, String(96 * MiB));
    expect(host.read('', LIMIT).trim()).toBe(String(96 * MiB));
    expect(written()).toEqual([
      expect.stringMatching(`^[0-9a-f]{8} file ${LIMIT} \\d+ ${64 * MiB} ${96 * MiB} ${host.path}$`),
    ]);
    files.putBack('memory', host.path, LIMIT);
    expect([host.read('', LIMIT).trim(), ...written()]).toEqual([String(64 * MiB)]);
    expect(instance.ledger.isEmpty()).toBe(true);
    instance.remove();
  });

  test('keep what somebody else has written since', () => {
    const host = newHost();
    host.make('', 64 * MiB);
    const { instance, files } = begin(host);
    files.change('memory', host.path, LIMIT, String(80 * MiB));
    host.write('', LIMIT, 128 * MiB);
    files.putBackAll(false);
    expect(host.read('', LIMIT).trim()).toBe(String(128 * MiB));
    expect(instance.ledger.isEmpty()).toBe(true);
    instance.remove();
  });

  test('that cannot be put back stay written down; one that is gone does not', async () => {
    const host = newHost();
    host.make('', 16 * MiB);
    host.make('gone', 16 * MiB);
    const { instance, files, written } = begin(host);
    files.change('memory', host.path, LIMIT, String(64 * MiB));
    files.change('memory', `${host.path}/gone`, LIMIT, String(64 * MiB));
    rmdirSync(host.file('gone', ''));
    const job = await host.start('', 'hold --bytes 32MiB');
    await host.until(() => Number(host.read('', 'memory.usage_in_bytes')) > 32 * MiB, 'it is in use');
    files.putBackAll(false); // EBUSY: more is used than that
    expect(written()).toHaveLength(1);
    job.child.kill('SIGKILL');
    await job.gone;
    files.putBackAll(false);
    expect(host.read('', LIMIT).trim()).toBe(String(16 * MiB));
    expect(instance.ledger.isEmpty()).toBe(true);
    instance.remove();
  });

  test('are not changed if the file refuses it, and nothing stays written down', () => {
    const host = newHost();
    host.make('', 64 * MiB);
    const { instance, files } = begin(host);
    expect(() => files.change('memory', host.path, LIMIT, 'much')).toThrow(/EINVAL|invalid/i);
    expect(() => files.change('memory', `${host.path}/nothing`, LIMIT, '1')).toThrow(/ENOENT/);
    expect(instance.ledger.isEmpty()).toBe(true);
    instance.remove();
  });
});
