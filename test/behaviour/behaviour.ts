import { describe, onTestFailed, test } from 'vitest';
import { findMemoryV1, readCgroupMounts } from '../../src/cgroup/mounts.js';
import { renderReport } from '../../src/index.js';
import { useScene } from '../support/scene.js';
import { ENVIRONMENTS, type Environment, type EnvironmentId } from './environment.js';
import { MemcgV1 } from './memcg-v1.js';
import { MemcgV2 } from './memcg-v2.js';
import { System } from './system.js';

/** How a behaviour is not the same somewhere. */
interface Difference {
  verdict: 'different' | 'impossible';
  why: string;
}

/** It holds there, but for what is said here; the test asks the environment for it. */
export const different = (why: string): Difference => ({ verdict: 'different', why });

/** It cannot be had there, and is not tried. */
export const impossible = (why: string): Difference => ({ verdict: 'impossible', why });

/** The same for every environment of a kind. */
export const onSystem = (difference: Difference) => ({
  'system-v1': difference,
  'system-v2': difference,
  'system-plain': difference,
});

/** Both of cgroup v2. */
export const onV2 = (difference: Difference) => ({ v2: difference, 'v2-hold': difference });

declare module 'vitest' {
  interface TaskMeta {
    /** For docs/interface.md. */
    behaviour?: { id: string; sentence: string; differences: Partial<Record<EnvironmentId, Difference>> };
  }
}

const MAKE: Record<EnvironmentId, () => Environment> = {
  v1: () => new MemcgV1(),
  v2: () => new MemcgV2(false),
  'v2-hold': () => new MemcgV2(true),
  'system-v1': () => new System('v1'),
  'system-v2': () => new System('v2'),
  'system-plain': () => new System('plain'),
};

/** The one that is asked for, or what this machine is; null, and why, where there is none. */
function choose(): { id: EnvironmentId; skip: null } | { id: null; skip: string } {
  const asked = process.env.REPRIEVE_ENVIRONMENT;
  if (asked !== undefined) {
    const id = ENVIRONMENTS.find((name) => name === asked);
    if (id !== undefined) return { id, skip: null };
    throw new Error(`Expected REPRIEVE_ENVIRONMENT to be ${ENVIRONMENTS.join(', ')}, got '${asked}'`);
  }
  if (process.geteuid?.() !== 0) return { id: null, skip: 'not root' };
  if (findMemoryV1(readCgroupMounts()) !== undefined) return { id: 'v1', skip: null };
  return { id: null, skip: 'no cgroup v1 memory hierarchy' };
}

const chosen = choose();
const required = (process.env.REPRIEVE_REQUIRE ?? '').split(',').includes('host');
if (chosen.skip !== null && required) throw new Error(`REPRIEVE_REQUIRE asks for behaviour tests: ${chosen.skip}`);

/** What is the same everywhere, once: a test with a stable id and a sentence, and in which environments it differs how. */
export function behaviour(
  id: string,
  sentence: string,
  differences: Partial<Record<EnvironmentId, Difference>>,
  run: (env: Environment) => Promise<void>,
): void {
  const here = chosen.id === null ? undefined : differences[chosen.id];
  const skip = chosen.skip ?? (here?.verdict === 'impossible' ? `impossible: ${here.why}` : null);
  describe(id, () => {
    const newScene = useScene(() => MAKE[chosen.id as EnvironmentId]());
    const title = skip === null ? sentence : `${sentence} [skipped: ${skip}]`;
    const meta = { behaviour: { id, sentence, differences } };
    test.skipIf(skip !== null)(title, { meta }, async () => {
      const env = newScene();
      onTestFailed(() => {
        for (const report of env.reports) console.log(renderReport(report));
      });
      await run(env);
    });
  });
}
