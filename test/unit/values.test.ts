import { describe, expect, test } from 'vitest';
import { fullSlack, type Memcg } from '../../src/cgroup/cgroup.js';
import { cgroupPathOf, findMemoryV1, parseCgroupMounts } from '../../src/cgroup/mounts.js';
import { mostKept } from '../../src/cgroup/page-lists.js';
import { SimulatedHierarchy, VirtualClock } from '../../src/cgroup/simulated.js';
import { DEFAULT_DEADLINES, parseLadder } from '../../src/condition/options.js';
import { ERROR_CODES, fromSystem, isVanished, show } from '../../src/errors.js';
import { lowestPriority } from '../../src/index.js';
import { JobRules } from '../../src/snapshot/settings.js';
import { findOwner } from '../../src/source/owner.js';
import { parseScope } from '../../src/source/scope.js';
import { bytesOf, formatBytes, formatMicros } from '../../src/units.js';
import { MiB } from '../support/simulation.js';

const GiB = 2 ** 30;
const invalid = (message: string | RegExp) =>
  expect.objectContaining({
    name: 'ReprieveError',
    code: 'ERR_REPRIEVE_INVALID_ARGUMENT',
    message: expect.stringMatching(message),
  });

describe('units', () => {
  test.each([
    [0, 0],
    [4096, 4096],
    ['0', 0],
    ['17', 17],
    ['17B', 17],
    ['3KiB', 3072],
    [' 32 MiB ', 32 * MiB],
    ['1.5GiB', 1.5 * GiB],
    ['2TiB', 2048 * GiB],
  ])('%o is %i bytes', (size, bytes) => expect(bytesOf(size, 'it')).toBe(bytes));

  test.each([
    -1,
    0.5,
    Number.NaN,
    Number.POSITIVE_INFINITY,
    2 ** 53,
    '',
    'MiB',
    '-1MiB',
    '1MB',
    '1kib',
    '1e3',
    '1 2',
    '9000000TiB',
    null,
    undefined,
    {},
  ])('%o is no size', (size) =>
    expect(() => bytesOf(size, 'the `x` option')).toThrow(invalid(/^Expected the `x` option to be a size/)),
  );

  test.each([
    [0, '0 B'],
    [1023, '1023 B'],
    [1024, '1 KiB'],
    [1536, '1.5 KiB'],
    [10 * MiB, '10 MiB'],
    [100 * MiB, '100 MiB'],
    [31.5 * MiB, '31.5 MiB'],
    [2000 * GiB, '1.95 TiB'],
    [5000 * 1024 * GiB, '5000 TiB'],
    [Number.POSITIVE_INFINITY, 'no limit'],
  ])('%d bytes read %s', (bytes, text) => expect(formatBytes(bytes)).toBe(text));

  test.each([
    [730.4, '730 µs'],
    [4_200, '4.20 ms'],
    [42_000, '42.0 ms'],
    [1_530_000, '1.53 s'],
  ])('%d microseconds read %s', (us, text) => expect(formatMicros(us)).toBe(text));
});

describe('errors', () => {
  test.each([
    ['ENODEV', 'ERR_REPRIEVE_VANISHED'],
    ['ESTALE', 'ERR_REPRIEVE_VANISHED'],
    ['EACCES', 'ERR_REPRIEVE_PERMISSION'],
    ['EPERM', 'ERR_REPRIEVE_PERMISSION'],
    ['EROFS', 'ERR_REPRIEVE_PERMISSION'],
    ['ERR_REPRIEVE_CLOSED', 'ERR_REPRIEVE_CLOSED'],
    ['EIO', 'ERR_REPRIEVE_SYSTEM'],
  ])('%s becomes %s, with the call that failed', (from, code) => {
    const cause = Object.assign(new Error('it failed'), { code: from, errno: 5, syscall: 'write', path: '/x' });
    const error = fromSystem(cause, 'writing');
    expect(error).toMatchObject({ code, errno: 5, syscall: 'write', path: '/x', cause });
    expect(error.message).toMatch(/^writing: .*it failed/);
    expect(isVanished(error)).toBe(code === 'ERR_REPRIEVE_VANISHED');
    expect(fromSystem(error, 'again')).toBe(error);
    expect(ERROR_CODES).toHaveProperty(code);
  });

  test('a value is shown short, on one line, without throwing', () => {
    const circular: { self?: unknown } = {};
    circular.self = circular;
    expect([undefined, 1n, circular, function f() {}, 'x'.repeat(100)].map(show)).toEqual([
      'undefined',
      '1n',
      '[object Object]',
      'a function f',
      `"${'x'.repeat(76)}...`,
    ]);
  });
});

describe('scopes', () => {
  test.each([
    ['memcg:/jobs', '/jobs'],
    ['memcg:/jobs/', '/jobs'],
    ['memcg:/a/b c/..d', '/a/b c/..d'],
  ])('%s', (scope, path) => expect(parseScope(scope)).toBe(path));

  test.each([
    [undefined, /got undefined: it does not start with 'memcg:'$/],
    ['/jobs', /it does not start with 'memcg:'$/],
    ['memcg:jobs', /the path is not absolute$/],
    ['memcg:', /the path is not absolute$/],
    ['memcg:/', /the root memcg has no limit of its own/],
    ['memcg://', /the root memcg has no limit of its own/],
    ['memcg:/a\0b', /the path holds a NUL$/],
    ['memcg:/a//b', /'' is no name of a memcg$/],
    ['memcg:/a/../b', /'..' is no name of a memcg$/],
    ['memcg:/a/.', /'.' is no name of a memcg$/],
  ])('%o is refused', (scope, message) =>
    expect(() => parseScope(scope)).toThrow(
      expect.objectContaining({ code: 'ERR_REPRIEVE_INVALID_SCOPE', message: expect.stringMatching(message) }),
    ),
  );

  test("'system' stands for the root, which is no memcg to watch", () => expect(parseScope('system')).toBe('/'));
});

describe('mounts', () => {
  const HOST = `25 30 0:22 / /proc rw,nosuid - proc proc rw
31 24 0:26 / /sys/fs/cgroup ro,nosuid shared:9 - tmpfs tmpfs ro,mode=755
36 31 0:31 / /sys/fs/cgroup/memory rw,relatime shared:16 - cgroup cgroup rw,memory
37 31 0:32 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:17 master:3 - cgroup cgroup rw,cpu,cpuacct
38 31 0:33 / /sys/fs/cgroup/unified ro,relatime - cgroup2 cgroup2 rw,nsdelegate
`;

  test('a host with v1, without optional fields too', () => {
    const mounts = parseCgroupMounts(HOST);
    expect(
      mounts.map(({ version, controllers, root, writable }) => ({ version, controllers, root, writable })),
    ).toEqual([
      { version: 1, controllers: ['memory'], root: '/', writable: true },
      { version: 1, controllers: ['cpu', 'cpuacct'], root: '/', writable: true },
      { version: 2, controllers: [], root: '/', writable: false },
    ]);
    const memory = findMemoryV1(mounts);
    expect(memory?.point).toBe('/sys/fs/cgroup/memory');
    expect(memory && cgroupPathOf('4:memory:/user/one\n3:cpu,cpuacct:/\n', 'memory', memory)).toBe('/user/one');
    expect(memory && cgroupPathOf('4:cpu:/user\n0::/memory\n', 'memory', memory)).toBeUndefined();
  });

  test('docker shows one cgroup of the host: paths are below it', () => {
    const [memory] = parseCgroupMounts('36 31 0:31 /docker/ab12 /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory');
    expect(memory).toMatchObject({ root: '/docker/ab12', writable: false });
    if (memory === undefined) return;
    const pathOf = (path: string) => cgroupPathOf(`9:name=systemd:/x\n4:memory:${path}`, 'memory', memory);
    expect(['/docker/ab12', '/docker/ab12/a/b', '/docker/ab123', '/', '/../other'].map(pathOf)).toEqual([
      '/',
      '/a/b',
      undefined,
      undefined,
      undefined,
    ]);
  });

  test('a cgroup namespace, whose root is above what the process sees', () => {
    const [memory] = parseCgroupMounts('36 31 0:31 /../.. /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory');
    expect(memory && cgroupPathOf('4:memory:/', 'memory', memory)).toBeUndefined();
    expect(memory && cgroupPathOf('4:memory:/../../x', 'memory', memory)).toBe('/x');
  });

  test('v2 only, and odd names', () => {
    expect(findMemoryV1(parseCgroupMounts('30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw'))).toBeUndefined();
    expect(
      parseCgroupMounts('36 31 0:31 /a\\040b /mnt/with\\040blank\\134\\011 rw - cgroup none rw,memory')[0],
    ).toMatchObject({ root: '/a b', point: '/mnt/with blank\\\t' });
  });
});

describe('pages that processors keep', () => {
  // As of Linux 6.1 and 6.18: a zone has a watermark of the same name as a field of its lists.
  const zone = (fields: string) => `Node 0, zone    DMA32
  pages free     3000
        high     66
  pagesets
    cpu: 0
              count:    7
${fields}              batch:    63
  vm stats threshold: 24
`;

  test('all lists together, by zone and processor', () => {
    const text = zone('              high:     378\n');
    expect(mostKept(text + text)).toBe(2 * 378 * 4096);
  });

  test('up to where their room grows, where it does', () => {
    const text = zone('              high:     0\n              high_min: 13\n              high_max: 240\n');
    expect(mostKept(text)).toBe(240 * 4096);
  });

  test('none', () => {
    expect(mostKept('')).toBe(0);
  });
});

describe('options of the ladder', () => {
  test('defaults; the kernel is always the last rung', () => {
    expect(parseLadder({})).toEqual({
      ...DEFAULT_DEADLINES,
      policy: null,
      hold: null,
      fallback: [lowestPriority, 'kernel'],
    });
    expect(parseLadder({ fallback: [] }).fallback).toEqual(['kernel']);
    expect(parseLadder({ fallback: [lowestPriority] }).fallback).toEqual([lowestPriority, 'kernel']);
    expect(parseLadder({ fallback: ['kernel'] }).fallback).toEqual(['kernel']);
  });

  const times = ['respondWithin', 'clearWithin', 'handleWithin'].flatMap((name) =>
    [0, -1, Number.NaN, 2 ** 31, Number.POSITIVE_INFINITY, '5s', {}].map((value): [string, unknown] => [name, value]),
  );
  const counts = [0, 1.5, -1, '8', Number.POSITIVE_INFINITY].map((value): [string, unknown] => ['maxVictims', value]);
  test.each([...times, ...counts, ['policy', 'lowest'], ['policy', {}], ['fallback', 'kernel'], ['fallback', {}]])(
    '%s: %o',
    (name, value) => expect(() => parseLadder({ [name]: value })).toThrow(invalid(`the \`${name}\` option`)),
  );

  test.each([[['kernel', lowestPriority]], [['other']], [[null]]])('fallback: %o', (fallback) =>
    expect(() => parseLadder({ fallback } as never)).toThrow(invalid(/`fallback\[0\]`/)),
  );
});

describe('settings of jobs', () => {
  const memcg = (attributes: Record<string, string>, owner = 0) =>
    ({ owner, attribute: (name: string) => attributes[name] ?? null }) as unknown as Memcg;

  test('the first glob that matches counts, alone', () => {
    const rules = new JobRules({ 'web-*': { priority: 90 }, '*': { priority: 10, reservation: '1MiB' }, 'a/**': {} });
    expect(rules.resolve({ name: 'web-1' })).toEqual({
      priority: 90,
      reservation: 0,
      protected: false,
      overPriority: null,
      from: "api 'web-*'",
    });
    expect(rules.resolve({ name: '.hidden' })).toMatchObject({ priority: 10, reservation: MiB, from: "api '*'" });
    expect(rules.resolve({ name: 'a/b' })).toMatchObject({ priority: 50, from: "api 'a/**'" });
    expect(rules.resolve({ name: 'b/c' })).toMatchObject({ priority: 50, from: 'default' });
  });

  test('API, then trusted, then user attributes, then defaults, field by field', () => {
    const rules = new JobRules({ web: { priority: 90 } });
    const attributes = {
      'trusted.reprieve.priority': '1',
      'trusted.reprieve.reservation': '2MiB',
      'user.reprieve.reservation': '1MiB',
      'user.reprieve.protected': ' true\n',
    };
    expect(rules.resolve({ name: 'web', memcg: memcg(attributes) })).toEqual({
      priority: 90,
      reservation: 2 * MiB,
      protected: true,
      overPriority: null,
      from: "api 'web', trusted.reprieve.reservation, user.reprieve.protected",
    });
    expect(rules.resolve({ name: 'other', memcg: memcg(attributes) })).toMatchObject({ priority: 1 });
  });

  test('user attributes count only where the owner is trusted', () => {
    const rules = new JobRules({});
    const attributes = { 'user.reprieve.priority': '99', 'trusted.reprieve.overPriority': '7' };
    const own = process.geteuid?.() ?? 0;
    expect(rules.resolve({ name: 'x', memcg: memcg(attributes, own) })).toMatchObject({
      priority: 99,
      overPriority: 7,
    });
    expect(rules.resolve({ name: 'x', memcg: memcg(attributes, own + 1_000) })).toMatchObject({
      priority: 50,
      overPriority: 7,
    });
  });

  test.each([
    ['priority', '101'],
    ['priority', '-1'],
    ['priority', '1e1'],
    ['overPriority', ''],
    ['reservation', 'much'],
    ['protected', 'yes'],
    ['protected', 'constructor'],
    ['protected', 'toString'],
  ])('an attribute %s=%o is passed over, and noted', (field, text) => {
    const settings = new JobRules({}).resolve({ name: 'x', memcg: memcg({ [`trusted.reprieve.${field}`]: text }) });
    expect(settings).toEqual({
      priority: 50,
      reservation: 0,
      protected: false,
      overPriority: null,
      from: `default, trusted.reprieve.${field}='${text}' ignored: not valid`,
    });
  });

  test.each([
    [null, /the `jobs` option/],
    [{ web: 5 }, /`jobs\['web'\]` to be an object, got 5/],
    [{ web: { prio: 5 } }, /made of priority, reservation, protected and overPriority, got {"prio":"…"}/],
    [{ web: { priority: 1.5 } }, /`jobs\['web'\].priority`/],
    [{ web: { overPriority: 101 } }, /`jobs\['web'\].overPriority`/],
    [{ web: { protected: 1 } }, /`jobs\['web'\].protected`/],
    [{ web: { reservation: '1MB' } }, /`jobs\['web'\].reservation`/],
  ])('%o is refused', (jobs, message) => expect(() => new JobRules(jobs)).toThrow(invalid(message)));
});

describe('whose out-of-memory it is', () => {
  const level = (path: string, underOom: boolean, usage: number, limit: number, parks = true) =>
    ({
      path,
      parks,
      limit: () => limit,
      usage: () => usage,
      isFull: () => usage + fullSlack(limit) >= limit,
      oomState: () => ({ underOom, killDisabled: true }),
    }) as unknown as Memcg;

  test('a charge stock of 1 MiB, or an eighth of a small limit, still counts as full', () => {
    expect([4 * MiB, 64 * MiB].map(fullSlack)).toEqual([MiB / 2, MiB]);
    const hierarchy = new SimulatedHierarchy(new VirtualClock());
    const process = hierarchy.spawn(hierarchy.make('/a', 64 * MiB), 'a', 63 * MiB);
    const memcg = hierarchy.open('/a');
    expect(memcg.isFull()).toBe(true);
    hierarchy.shrink(process, 4096);
    expect(memcg.isFull()).toBe(false);
    expect(hierarchy.open('/').isFull()).toBe(false);
  });

  test.each([
    ['the topmost one that is full', [true, 64], [true, 64], '/a'],
    ['the lower one, where only it is full', [true, 10], [true, 64], '/a/b'],
    ['the topmost one under OOM, where memory came back', [true, 10], [true, 10], '/a'],
    ['the lower one, where the upper one is full but not under OOM', [false, 64], [true, 64], '/a/b'],
    ['nobody, once it is over', [false, 64], [false, 64], undefined],
  ] as const)('%s', (_, [upperOom, upper], [lowerOom, lower], owner) => {
    const chain = [level('/a', upperOom, upper * MiB, 64 * MiB), level('/a/b', lowerOom, lower * MiB, 64 * MiB)];
    expect(findOwner(chain)?.memcg.path).toBe(owner);
  });

  test('of one where nobody is parked that it is full is the only sign, and is not looked for twice', () => {
    expect(findOwner([level('/a', true, 10 * MiB, 64 * MiB, false)])).toMatchObject({ full: true });
  });
});
