import { defineConfig } from 'vitest/config';

const shared = { globals: false, pool: 'forks' as const, isolate: true };

export default defineConfig({
  test: {
    projects: [
      { test: { ...shared, name: 'unit', include: ['test/unit/**/*.test.ts'] } },
      {
        test: {
          ...shared,
          name: 'host',
          include: ['test/host/**/*.test.ts'],
          // Real memcgs and two cores: one file at a time.
          fileParallelism: false,
          testTimeout: 60_000,
          hookTimeout: 60_000,
        },
      },
      {
        test: {
          ...shared,
          name: 'vm',
          include: ['test/vm/**/*.test.ts'],
          // Emulated processors: a machine at a time, and each in its own time.
          fileParallelism: false,
          testTimeout: 300_000,
          hookTimeout: 300_000,
        },
      },
      {
        test: {
          ...shared,
          name: 'behaviour',
          include: ['test/behaviour/**/*.test.ts'],
          // One scope at a time, which may be the whole machine; and a small one has no time to load all of it again.
          fileParallelism: false,
          isolate: false,
          testTimeout: 60_000,
          hookTimeout: 60_000,
        },
      },
      { test: { ...shared, name: 'chaos', include: ['test/chaos/**/*.test.ts'], fileParallelism: false } },
    ],
  },
});
