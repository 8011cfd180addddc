import { existsSync, readFileSync, writeFileSync } from 'node:fs';
import { findMemoryV1, findV1, readCgroupMounts } from '../../src/cgroup/mounts.js';
import { MemcgEnvironment } from './memcg.js';

/** A memcg of cgroup v1: its tasks are parked by the kernel. */
export class MemcgV1 extends MemcgEnvironment {
  protected override readonly point = findMemoryV1(readCgroupMounts())?.point ?? '';
  readonly #freezer = findV1(readCgroupMounts(), 'freezer')?.point ?? '';
  protected override readonly limit = 'memory.limit_in_bytes';
  override readonly holds = true;
  override readonly parks = true;
  override readonly leak = 'leak --every 0';
  protected override readonly own = {};

  override kernelKills(): number {
    return this.below().reduce((sum, below) => sum + this.field(below, 'memory.oom_control', 'oom_kill'), 0);
  }

  override frozen(): string[] {
    return this.below().filter((below) => {
      const file = `${this.#freezer}${this.path}${below}/freezer.state`;
      return existsSync(file) && readFileSync(file, 'utf8').trim() !== 'THAWED';
    });
  }

  protected override settings(): Record<string, string> {
    const files = ['memory.oom_control', 'memory.limit_in_bytes', 'memory.memsw.limit_in_bytes'];
    const read = (below: string, name: string) => {
      const text = this.readIfThere(below, name).trim();
      return name === 'memory.oom_control' ? (/oom_kill_disable \d/.exec(text)?.[0] ?? '') : text;
    };
    return Object.fromEntries(
      this.below().flatMap((below) => files.map((name) => [`${name} of ${below}`, read(below, name)])),
    );
  }

  protected override release(directory: string): void {
    writeFileSync(`${directory}/memory.oom_control`, '0');
  }
}
