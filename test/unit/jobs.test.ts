import { describe, expect, test } from 'vitest';
import { isAdopted, nameOf, type Place, placeOf } from '../../src/snapshot/grouping.js';
import { Growth } from '../../src/snapshot/growth.js';
import { type ProcessFacts, parseCgroups, parseStat, unitOf } from '../../src/snapshot/processes.js';
import { JobRules } from '../../src/snapshot/settings.js';

function facts(of: Partial<ProcessFacts> = {}): ProcessFacts {
  const usual = { pid: 100, parent: 50, group: 100, session: 50, started: 1000, isKernelThread: false, uid: 0 };
  return { ...usual, comm: 'java', exe: '/usr/bin/java', cgroups: ['/'], place: '/', ...of };
}

describe('what is read of a process', () => {
  test('its stat, whatever it is called', () => {
    const text = '7 (a) b (c) S 3 4 5 0 -1 4194304 101 0 0 0 0 0 0 0 20 0 1 0 90724 3133440 416';
    const read = { pid: 7, comm: 'a) b (c', parent: 3, group: 4, session: 5, isKernelThread: false, started: 90724 };
    expect(parseStat(text)).toEqual(read);
    expect(parseStat('2 (kthreadd) S 0 0 0 0 -1 2129984 0 0 0 0 0 0 0 0 20 0 1 0 5 0').isKernelThread).toBe(true);
  });

  test('its cgroups, those that tell most first', () => {
    const text = '4:memory:/m\n1:name=systemd:/user.slice/x.scope\n2:cpu,cpuacct:/a:b\n0::/\n';
    const place = '/user.slice/x.scope';
    expect(parseCgroups(text)).toEqual({ cgroups: ['/', place, '/m', '/a:b'], place });
    expect(parseCgroups('').place).toBe('/');
  });

  test('its unit', () => {
    const path = '/user.slice/user@1.service/app.slice/run.scope/child';
    expect(unitOf(path)).toEqual({ unit: 'run.scope', path: '/user.slice/user@1.service/app.slice/run.scope' });
    expect(unitOf('/system.slice')).toBeNull();
  });
});

describe('the job of a process', () => {
  const rules = new JobRules([
    { match: { comm: 'java', uid: 7 }, name: 'app', priority: 10 },
    { match: { exe: '/opt/**' } },
    { match: { uid: 1000 } },
    { match: { session: 9 } },
    { match: { cgroup: '/docker/*' } },
    { match: { unit: 'ssh*.service' } },
  ]);
  const place = (of: Partial<ProcessFacts>, from: Place | null = null) => placeOf(facts(of), from, rules);

  test.each([
    ['the first rule that matches', { uid: 7 }, 'tree:100'],
    ['its program', { exe: '/opt/x/y' }, 'tree:100'],
    ['its user', { uid: 1000 }, 'uid:1000'],
    ['its session', { session: 9 }, 'session:9'],
    ['any of its cgroups', { cgroups: ['/', '/a', '/docker/1'] }, 'cgroup:/docker/1'],
    ['its unit', { place: '/system.slice/sshd.service/deep' }, 'cgroup:/system.slice/sshd.service'],
    ['else its cgroup', { place: '/a/b' }, 'cgroup:/a/b'],
    ['else its session', {}, 'session:50'],
    ['else by itself', { session: 0 }, 'tree:100'],
    ['process 1 always by itself', { pid: 1, uid: 1000 }, 'tree:1'],
  ])('%s', (_, of, id) => expect(place(of).id).toBe(id));

  test('is that of its ancestor, but where a rule says otherwise', () => {
    const app = place({ pid: 30, uid: 7 });
    expect(place({}, app)).toBe(app);
    expect(place({ uid: 7 }, app)).toBe(app); // only the topmost one begins a tree
    expect(place({ place: '/a' }, app)).toBe(app);
    const other = place({ pid: 40, exe: '/opt/x' }, app);
    expect(other.id).toBe('tree:40');
    expect(place({ uid: 7 }, other).id).toBe('tree:100');
    expect(place({ uid: 1000 }, app).id).toBe('uid:1000');
  });

  test('without a rule: those without a session stay together, a session is a job of its own', () => {
    const root = place({ pid: 30, session: 0 });
    expect(place({ session: 0 }, root)).toBe(root);
    expect(place({}, root).id).toBe('session:50');
    expect(place({ session: 0 }, place({ pid: 1 })).id).toBe('tree:100');
  });

  test('has a name', () => {
    const name = (of: Partial<ProcessFacts>) => nameOf(place(of), facts(of));
    expect(name({ uid: 7 })).toBe('app');
    expect(name({ uid: 1000 })).toBe('uid:1000');
    expect(name({ place: '/system.slice/sshd.service/deep' })).toBe('sshd.service');
    expect(name({ place: '/a/b' })).toBe('a/b');
    expect(name({})).toBe('java');
  });

  test('an adopted process is none of its parent', () => {
    expect(isAdopted(facts(), facts({ pid: 50 }))).toBe(false);
    expect(isAdopted(facts({ session: 100 }), facts({ pid: 50, session: 3 }))).toBe(false); // setsid(2)
    expect(isAdopted(facts(), facts({ pid: 50, session: 3 }))).toBe(true);
    expect(isAdopted(facts(), facts({ pid: 1 }))).toBe(true);
    expect(isAdopted(facts(), null)).toBe(true);
  });
});

describe('settings by rules', () => {
  const rules = new JobRules([
    { match: { name: 'bash' }, priority: 90 },
    { match: { comm: 'bash' }, priority: 10 },
    { match: { cgroup: '/docker/*' }, reservation: '1MiB' },
    { match: { unit: 'db.service', name: 'system.slice/*' }, protected: true },
    { match: { name: '**', uid: 'root' }, priority: 60 },
  ]);
  const memcg = (path: string) => ({ path, owner: 0, attribute: () => null }) as never;

  test('the first that matches counts, whoever made the job', () => {
    const made = rules.placing(facts({ comm: 'bash' }))?.rule ?? null;
    expect(rules.resolve({ name: 'bash', facts: facts({ comm: 'bash' }), rule: made })).toMatchObject({ priority: 90 });
    expect(rules.resolve({ name: 'sh', facts: facts({ comm: 'bash' }), rule: made })).toMatchObject({
      priority: 10,
      from: 'api jobs[1]',
    });
    expect(rules.resolve({ name: 'sh', facts: facts(), rule: null })).toMatchObject({ priority: 60 });
    expect(rules.resolve({ name: 'sh', facts: facts({ uid: 5 }), rule: null })).toMatchObject({ from: 'default' });
  });

  test('memcgs by path and unit', () => {
    expect(rules.resolve({ name: 'docker/1', memcg: memcg('/docker/1') })).toMatchObject({ reservation: 2 ** 20 });
    const db = rules.resolve({ name: 'system.slice/db.service', memcg: memcg('/system.slice/db.service') });
    expect(db).toMatchObject({ protected: true, from: 'api jobs[3]' });
    expect([rules.namesMemcg('docker/1', '/docker/1'), rules.namesMemcg('x', '/x')]).toEqual([true, false]);
    const all = new JobRules({ '**': { priority: 10 } });
    expect(all.namesMemcg('system.slice', '/system.slice')).toBe(false);
    expect(all.resolve({ name: 'system.slice', memcg: memcg('/system.slice') }).priority).toBe(10);
  });

  test.each([
    [-1000, { protected: true }],
    [-999, { priority: 100 }],
    [1000, { priority: 0 }],
    [300, { priority: 35, from: 'oom_score_adj 300 (hint)' }],
    [0, { priority: 50, from: 'default' }],
  ])('oom_score_adj %i is a hint where nothing else speaks', (scoreAdj, settings) => {
    const hint = { name: 'sh', facts: facts({ uid: 5 }), rule: null, scoreAdj: () => scoreAdj };
    expect(rules.resolve(hint)).toMatchObject(settings);
    expect(rules.resolve({ ...hint, facts: facts() })).toMatchObject({ priority: 60, from: 'api jobs[4]' });
    expect(rules.resolve({ ...hint, spared: 'process 1 lives in it' }).protected).toBe(true);
  });

  test.each([
    [[{ priority: 5 }], /`jobs\[0\]\.match` to be an object/],
    [[{ match: {} }], /`jobs\[0\]\.match` to be made of at least one of name, exe/],
    [[{ match: { comm: 'a' } }, 5], /`jobs\[1\]` to be an object with a `match`, got 5/],
    [[{ match: { com: 'a' } }], /`jobs\[0\]\.match` to be made of name, .* got {"com":"…"}/],
    [[{ match: { comm: '' } }], /`jobs\[0\]\.match\.comm` to be a glob, got ""/],
    [[{ match: { exe: 'java' } }], /`jobs\[0\]\.match\.exe` to be a glob on a path/],
    [[{ match: { cgroup: 'docker/*' } }], /`jobs\[0\]\.match\.cgroup` to be a glob on a path/],
    [[{ match: { uid: 'no such user' } }], /`jobs\[0\]\.match\.uid` to be a user id/],
    [[{ match: { uid: -1 } }], /`jobs\[0\]\.match\.uid`/],
    [[{ match: { session: 0 } }], /`jobs\[0\]\.match\.session`/],
    [[{ match: { comm: 'a' }, name: '' }], /`jobs\[0\]\.name` to be a text/],
    [[{ match: { comm: 'a' }, priority: 101 }], /`jobs\[0\]\.priority`/],
    [[{ match: { comm: 'a' }, prio: 1 }], /`jobs\[0\]` to be made of match, name, priority/],
  ])('%o is refused', (jobs, message) => expect(() => new JobRules(jobs)).toThrow(message));
});

test('growth is taken over half a second at least', () => {
  const growth = new Growth();
  const note = (bytes: number, atMs: number) => growth.note(new Map([['a#1', bytes]]), atMs * 1000);
  note(1000, 0);
  expect(growth.of('a#1')).toBe(0);
  note(2000, 1000);
  expect(growth.of('a#1')).toBe(1000);
  note(2650, 1100); // over 100 ms alone it would be 6500
  expect(growth.of('a#1')).toBeCloseTo(1500);
  note(2000, 2000);
  expect(growth.of('a#1')).toBe(0);
  growth.note(new Map(), 3_000_000);
  expect(growth.of('a#1')).toBe(0);
  note(500, 3100); // new: since the look before
  expect(growth.of('a#1')).toBeCloseTo(5000);
});
