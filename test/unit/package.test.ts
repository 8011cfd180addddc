import { spawnSync } from 'node:child_process';
import { cpSync, mkdirSync, mkdtempSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeEach, expect, test } from 'vitest';

const root = fileURLToPath(new URL('../../', import.meta.url));
let copy = '';

/** The package as it is when only JavaScript is there. */
beforeEach(() => {
  copy = mkdtempSync(join(tmpdir(), 'reprieve-test-package-'));
  for (const part of ['dist', 'scripts/install.mjs', 'package.json'])
    cpSync(join(root, part), join(copy, part), { recursive: true });
  symlinkSync(join(root, 'node_modules'), join(copy, 'node_modules'));
});

afterEach(() => rmSync(copy, { recursive: true, force: true }));

function doctor() {
  const { stdout, stderr, status } = spawnSync(process.execPath, [join(copy, 'dist/cli/main.js'), 'doctor', '--json'], {
    encoding: 'utf8',
  });
  return { stdout, stderr, status };
}

function install(env: NodeJS.ProcessEnv) {
  return spawnSync(process.execPath, [join(copy, 'scripts/install.mjs')], {
    encoding: 'utf8',
    env: { ...process.env, ...env },
  });
}

test('a missing compiler is one clear sentence', () => {
  const { stdout, stderr, status } = install({ CXX: 'g++-that-is-not-there' });
  expect([status, stdout]).toEqual([1, '']);
  expect(stderr).toBe(
    'reprieve: g++-that-is-not-there was not found, and the native addon is built from source: apt-get install g++\n',
  );
});

test('without the addon, the error says what was looked for and how to build it', () => {
  const { stderr, status } = doctor();
  expect(status).toBe(1);
  expect(stderr).toMatch(
    /The native addon of reprieve does not load\. Build it with: node .*install\.mjs --from-source/,
  );
  expect(stderr).toMatch(/prebuilds\/linux-.*\/reprieve\.node: not there\n.*build\/Release\/reprieve\.node: not there/);
  expect(stderr).toMatch(/ERR_REPRIEVE_NATIVE_MISSING/);
});

test('a prebuilt binary that fits is taken and nothing is built; one that does not is passed over', () => {
  const prebuilt = join(copy, `prebuilds/linux-${process.arch}-glibc`);
  mkdirSync(prebuilt, { recursive: true });
  writeFileSync(join(prebuilt, 'reprieve.node'), 'of another machine');
  cpSync(join(root, 'build/Release/reprieve-guard'), join(prebuilt, 'reprieve-guard'));
  expect(doctor().stderr).toMatch(/prebuilds\/.*reprieve\.node: .*(file too short|invalid ELF header)/);
  cpSync(join(root, 'build/Release/reprieve.node'), join(copy, 'build/Release/reprieve.node'));
  expect(JSON.parse(doctor().stdout).version).toBe(1);
  rmSync(join(copy, 'build'), { recursive: true });
  cpSync(join(root, 'build/Release/reprieve.node'), join(prebuilt, 'reprieve.node'));
  expect(JSON.parse(doctor().stdout).version).toBe(1);
  expect(install({ CXX: 'g++-that-is-not-there' }).status).toBe(0);
});
