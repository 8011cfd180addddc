import { Environment } from './environment.js';

/** One memcg, whose jobs are the memcgs below it. */
export abstract class MemcgEnvironment extends Environment {
  /** Name of the file with its limit. */
  protected abstract readonly limit: string;

  override get scope(): string {
    return `memcg:${this.path}`;
  }

  override get owner(): string {
    return this.path;
  }

  override bound(bytes: number): void {
    this.make();
    this.write('', this.limit, bytes);
  }

  override boundBelow(below: string, bytes: number): string {
    this.make(below);
    this.write(below, this.limit, bytes);
    return `${this.scope}/${below}`;
  }

  override cgroupsOf(below: string): string[] {
    return [this.file(below, '')];
  }

  override nameOf(below: string): string {
    return below;
  }
}
