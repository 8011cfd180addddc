import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import type { Memcg } from '../../src/cgroup/cgroup.js';
import { NO_LEDGER } from '../../src/guard/ledger.js';
import { Account, ConditionReserve, type Lease } from '../../src/reserve/account.js';
import { ArenaAllocator } from '../../src/reserve/arena.js';
import { setKernelReserve } from '../../src/reserve/kernel.js';

const PAGE = 4096;
const withCode = (code: string) => expect.objectContaining({ code });

function reserveOf(pages: number, conditions = 1) {
  const root = new Account(pages * PAGE);
  const arena = new ArenaAllocator(new ArrayBuffer(pages * PAGE));
  const reserves = Array.from(
    { length: conditions },
    () => new ConditionReserve(new Account(pages * PAGE, root), arena),
  );
  return { root, reserves, reserve: reserves[0] as ConditionReserve };
}

test('a charge is whole pages, a lease as long as asked for', () => {
  const { root, reserve } = reserveOf(4);
  {
    using lease = reserve.charge(PAGE + 1);
    expect([lease.bytes, lease.buffer.length]).toEqual([PAGE + 1, PAGE + 1]);
    expect([reserve.charged, reserve.available, root.charged]).toEqual([2 * PAGE, 2 * PAGE, 2 * PAGE]);
  }
  expect(reserve.counters()).toEqual({
    bytes: 4 * PAGE,
    charged: 0,
    available: 4 * PAGE,
    maxCharged: 2 * PAGE,
    failures: 0,
  });
});

test('exhausted: refused, counted, and nothing is charged', () => {
  const { root, reserve } = reserveOf(4);
  expect(() => reserve.charge('20KiB')).toThrow(
    expect.objectContaining({
      code: 'ERR_REPRIEVE_RESERVE_EXHAUSTED',
      message: 'The reserve of 16 KiB has 16 KiB left, 20 KiB were asked for',
    }),
  );
  expect(reserve.tryCharge('20KiB')).toBe(null);
  expect([reserve.failures, reserve.charged, root.charged]).toEqual([2, 0, 0]);
});

test('room in all, but not in one piece, is refused alike; neighbours given back are one again', () => {
  const { reserve, root } = reserveOf(3);
  const [first, second, third] = [1, 2, 3].map(() => reserve.charge(PAGE));
  first?.release();
  third?.release();
  expect(reserve.tryCharge(2 * PAGE)).toBe(null);
  expect([reserve.failures, reserve.charged, root.charged]).toEqual([1, PAGE, PAGE]);
  expect([reserve.available, root.available]).toEqual([PAGE, 2 * PAGE]);
  second?.release();
  expect(reserve.charge(3 * PAGE).buffer.length).toBe(3 * PAGE);
});

test('what another condition holds is not there', () => {
  const { reserves } = reserveOf(4, 2);
  reserves[0]?.charge(3 * PAGE);
  expect(reserves[1]?.available).toBe(PAGE);
  expect(() => reserves[1]?.charge(2 * PAGE)).toThrow(withCode('ERR_REPRIEVE_RESERVE_EXHAUSTED'));
});

test('closed: every lease ends, nothing can be charged', () => {
  const { root, reserve } = reserveOf(4);
  const lease = reserve.charge(PAGE);
  reserve.close();
  expect([lease.buffer.length, root.charged, reserve.available]).toEqual([0, 0, 0]);
  expect(() => reserve.charge(PAGE)).toThrow(withCode('ERR_REPRIEVE_RESERVE_CLOSED'));
  expect(() => reserve.tryCharge(PAGE)).toThrow(withCode('ERR_REPRIEVE_RESERVE_CLOSED'));
  lease.release();
  expect(root.charged).toBe(0);
});

test.each([0, -1, 'much', undefined])('a size of %o is refused', (size) =>
  expect(() => reserveOf(4).reserve.charge(size as never)).toThrow(withCode('ERR_REPRIEVE_INVALID_ARGUMENT')),
);

test('no reserve at all', () => {
  const reserve = new ConditionReserve(new Account(0), new ArenaAllocator(new ArrayBuffer(0)));
  expect(() => reserve.charge(1)).toThrow(withCode('ERR_REPRIEVE_RESERVE_EXHAUSTED'));
});

test('any interleaving of charges, releases and ends loses or invents no byte', () => {
  const PAGES = 12;
  const command = fc.oneof(
    {
      weight: 6,
      arbitrary: fc.record({
        kind: fc.constantFrom('charge', 'tryCharge'),
        which: fc.nat(2),
        bytes: fc.integer({ min: 1, max: 6 * PAGE }),
      }),
    },
    { weight: 5, arbitrary: fc.record({ kind: fc.constant('release'), which: fc.nat(40), bytes: fc.constant(0) }) },
    { weight: 1, arbitrary: fc.record({ kind: fc.constant('end'), which: fc.nat(2), bytes: fc.constant(0) }) },
  );
  fc.assert(
    fc.property(fc.array(command, { maxLength: 40 }), (commands) => {
      const { root, reserves } = reserveOf(PAGES, 3);
      const leases: { of: number; lease: Lease; charged: number; live: boolean }[] = [];
      const model = reserves.map(() => ({ open: true, failures: 0, maxCharged: 0 }));
      let rootMax = 0;
      const live = (of?: number) => leases.filter((one) => one.live && (of === undefined || one.of === of));
      const sum = (of?: number) => live(of).reduce((total, { charged }) => total + charged, 0);
      const largestGap = () => {
        const used = live()
          .map(({ lease }): [number, number] => [
            lease.buffer.byteOffset,
            lease.buffer.byteOffset + Math.ceil(lease.bytes / PAGE) * PAGE,
          ])
          .sort(([a], [b]) => a - b);
        const gaps = [...used, [PAGES * PAGE, 0] as const].map(([start], index) => start - (used[index - 1]?.[1] ?? 0));
        return Math.max(...gaps);
      };
      for (const { kind, which, bytes } of commands) {
        const reserve = reserves[which];
        const state = model[which];
        if (kind === 'release') {
          const one = leases[which % Math.max(1, leases.length)];
          one?.lease.release(); // the second time too
          if (one !== undefined) one.live = false;
        } else if (reserve === undefined || state === undefined) {
          continue;
        } else if (kind === 'end') {
          reserve.close();
          state.open = false;
          for (const one of live(which)) one.live = false;
        } else {
          const charged = Math.ceil(bytes / PAGE) * PAGE;
          const room = largestGap();
          let lease: Lease | null = null;
          let code: unknown;
          try {
            lease = kind === 'charge' ? reserve.charge(bytes) : reserve.tryCharge(bytes);
          } catch (error) {
            ({ code } = error as { code: unknown });
          }
          const fits = room >= charged;
          expect(lease !== null).toBe(state.open && fits);
          expect(code).toBe(
            !state.open
              ? 'ERR_REPRIEVE_RESERVE_CLOSED'
              : kind === 'charge' && !fits
                ? 'ERR_REPRIEVE_RESERVE_EXHAUSTED'
                : undefined,
          );
          if (state.open && !fits) state.failures++;
          if (lease !== null) {
            lease.buffer.fill(leases.length + 1);
            leases.push({ of: which, lease, charged, live: true });
          }
          state.maxCharged = Math.max(state.maxCharged, sum(which));
          rootMax = Math.max(rootMax, sum());
        }
        expect([root.charged, root.available, root.maxCharged]).toEqual([sum(), PAGES * PAGE - sum(), rootMax]);
        reserves.forEach((one, of) => {
          const { open, failures, maxCharged } = model[of] as (typeof model)[0];
          expect([one.charged, one.failures, one.maxCharged]).toEqual([sum(of), failures, maxCharged]);
          expect(one.available).toBe(open ? largestGap() : 0);
        });
        leases.forEach(({ lease, live: lives }, index) => {
          expect(lease.buffer.length).toBe(lives ? lease.bytes : 0);
          // Whoever wrote over another's lease has left its number there.
          expect(lease.buffer.every((byte) => byte === index + 1)).toBe(true);
        });
      }
    }),
    { seed: 1, numRuns: 300 },
  );
});

test('accounts in a tree: what is charged anywhere counts at every level above, wherever accounts are moved', () => {
  const LIMITS = [16, 8, 12, 4, 6, 3].map((pages) => pages * PAGE);
  const command = fc.record({
    kind: fc.constantFrom('charge', 'charge', 'charge', 'unbacked', 'uncharge', 'uncharge', 'move'),
    which: fc.nat(LIMITS.length - 1),
    other: fc.nat(40),
    pages: fc.integer({ min: 1, max: 5 }),
  });
  fc.assert(
    fc.property(fc.array(command, { maxLength: 60 }), (commands) => {
      const [root, ...rest] = LIMITS.map((bytes) => new Account(bytes)) as [Account, ...Account[]];
      for (const account of rest) account.moveBelow(root);
      const accounts = [root, ...rest];
      const charges: { at: Account; bytes: number }[] = [];
      const failures = new Map(accounts.map((account) => [account, 0]));
      const peaks = new Map(accounts.map((account) => [account, 0]));
      const levels = (account: Account): Account[] =>
        account.parent === null ? [account] : [account, ...levels(account.parent)];
      const chargedTo = (account: Account) =>
        charges.filter(({ at }) => levels(at).includes(account)).reduce((sum, { bytes }) => sum + bytes, 0);
      for (const { kind, which, other, pages } of commands) {
        const account = accounts[which] as Account;
        const bytes = pages * PAGE;
        if (kind === 'charge' || kind === 'unbacked') {
          const fits = kind === 'charge' && levels(account).every((level) => chargedTo(level) + bytes <= level.bytes);
          expect(account.tryCharge(bytes, kind === 'charge')).toBe(fits);
          if (fits) charges.push({ at: account, bytes });
          else for (const level of levels(account)) failures.set(level, (failures.get(level) ?? 0) + 1);
        } else if (kind === 'uncharge') {
          const [charge] = charges.splice(other % Math.max(1, charges.length), 1);
          charge?.at.uncharge(charge.bytes);
        } else {
          const target = accounts[other % accounts.length] as Account;
          if (account !== root && !levels(target).includes(account)) account.moveBelow(target);
        }
        for (const level of accounts) {
          peaks.set(level, Math.max(peaks.get(level) ?? 0, chargedTo(level)));
          const room = Math.min(...levels(level).map((above) => Math.max(0, above.bytes - chargedTo(above))));
          expect(level.counters()).toEqual({
            bytes: level.bytes,
            charged: chargedTo(level),
            available: room,
            maxCharged: peaks.get(level),
            failures: failures.get(level),
          });
        }
      }
    }),
    { seed: 1, numRuns: 500 },
  );
});

describe("the kernel's own reserve", () => {
  /** memory.oom_reserve_in_bytes as the patchset has it: in whole pages. */
  const withReserve = (before: number) => {
    let value = before;
    const write = (bytes: number) => {
      value = Math.ceil(bytes / 4096) * 4096;
    };
    const file = { read: () => value, write };
    return { ...file, memcg: { kernelReserve: () => file } as unknown as Memcg };
  };

  test('is set, in whole pages, and put back', () => {
    const { memcg, read } = withReserve(4096);
    const restore = setKernelReserve(memcg, 10_000, NO_LEDGER);
    expect(read()).toBe(12288);
    restore?.();
    expect(read()).toBe(4096);
  });

  test("is left alone once it holds somebody else's value, and where the kernel has none", () => {
    const { memcg, read, write } = withReserve(4096);
    const restore = setKernelReserve(memcg, 2 ** 20, NO_LEDGER);
    write(12288);
    restore?.();
    expect(read()).toBe(12288);
    expect(setKernelReserve({ kernelReserve: () => null } as unknown as Memcg, 4096, NO_LEDGER)).toBeNull();
  });
});
