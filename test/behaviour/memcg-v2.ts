import { mkdirSync, writeFileSync } from 'node:fs';
import { findUnified, readCgroupMounts } from '../../src/cgroup/mounts.js';
import { MemcgEnvironment } from './memcg.js';

/** Makes a cgroup with the memory controller in it and above; processes may be in leaves only. */
export function makeUnified(point: string, path: string): void {
  let above = point;
  for (const name of path.split('/').filter(Boolean)) {
    writeFileSync(`${above}/cgroup.subtree_control`, '+memory');
    above = `${above}/${name}`;
    mkdirSync(above, { recursive: true });
  }
}

/** A memcg of cgroup v2: with `hold` its jobs are frozen at the limit, and without it the kernel may kill there. */
export class MemcgV2 extends MemcgEnvironment {
  protected override readonly point = findUnified(readCgroupMounts())?.point ?? '';
  protected override readonly limit = 'memory.max';
  override readonly holds: boolean;
  override readonly mayBeOutrun: boolean;
  /** So slow where nobody is held that an answer is there before the limit. */
  override readonly leak: string;
  protected override readonly own: { hold: boolean };

  constructor(hold: boolean) {
    super();
    this.holds = hold;
    this.mayBeOutrun = !hold;
    this.own = { hold };
    this.leak = hold ? 'leak --every 0' : 'leak --chunk 64KiB --every 5';
  }

  override make(below = ''): string {
    const path = below === '' ? this.path : `${this.path}/${below}`;
    makeUnified(this.point, path);
    return path;
  }

  override kernelKills(): number {
    // Who is chosen in a job that dies whole is counted twice.
    const count = (key: string) => this.field('', 'memory.events', key);
    return count('oom_kill') - count('oom_group_kill');
  }

  override frozen(): string[] {
    return this.below().filter((below) => this.readIfThere(below, 'cgroup.freeze').trim() === '1');
  }

  protected override settings(): Record<string, string> {
    const files = ['memory.high', 'memory.max', 'memory.oom.group', 'cgroup.freeze'];
    return Object.fromEntries(
      this.below().flatMap((below) =>
        files.map((name) => [`${name} of ${below}`, this.readIfThere(below, name).trim()]),
      ),
    );
  }

  protected override release(directory: string): void {
    writeFileSync(`${directory}/cgroup.freeze`, '0');
  }
}
