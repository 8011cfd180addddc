import { writeFileSync } from 'node:fs';
import { describe } from 'vitest';
import { findMemoryV1, readCgroupMounts } from '../../src/cgroup/mounts.js';
import { CgroupScene } from './cgroup-scene.js';
import { useScene } from './scene.js';

export { type Job, MiB } from './scene.js';

const mount = findMemoryV1(readCgroupMounts());
const point = mount?.point ?? '';

/** Why tests on real memcgs cannot run here; null if they can. */
const hostSkip = mount === undefined ? 'no cgroup v1 memory hierarchy' : process.geteuid?.() !== 0 ? 'not root' : null;

/** Tests on real memcgs: skipped with the reason where there are none, unless REPRIEVE_REQUIRE asks for them. */
export function describeHost(name: string, tests: () => void): void {
  const required = (process.env.REPRIEVE_REQUIRE ?? '').split(',').includes('host');
  if (hostSkip !== null && required) throw new Error(`REPRIEVE_REQUIRE asks for host tests: ${hostSkip}`);
  describe.skipIf(hostSkip !== null)(hostSkip === null ? name : `${name} [skipped: ${hostSkip}]`, tests);
}

/** The memcgs of one test, beside its processes, handlers and files. */
export class Host extends CgroupScene {
  protected override readonly point = point;

  override get scope(): string {
    return `memcg:${this.path}`;
  }

  /** Makes the scope, or a memcg below it. */
  override make(below = '', limit?: number): string {
    const path = super.make(below);
    if (limit !== undefined) this.write(below, 'memory.limit_in_bytes', limit);
    return path;
  }

  override cgroupsOf(below: string): string[] {
    return [this.file(below, '')];
  }

  protected override release(directory: string): void {
    writeFileSync(`${directory}/memory.oom_control`, '0');
  }
}

/** One host a test, cleared after it. */
export const useHost = () => useScene(() => new Host());
