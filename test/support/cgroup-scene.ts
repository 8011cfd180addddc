import { existsSync, mkdirSync, readdirSync, readFileSync, rmdirSync, writeFileSync } from 'node:fs';
import { Scene } from './scene.js';

/** A scene with cgroups of its own below one directory. */
export abstract class CgroupScene extends Scene {
  /** Where the hierarchy is mounted. */
  protected abstract readonly point: string;

  /** The path of its topmost cgroup below the hierarchy. */
  get path(): string {
    return `/${this.name}`;
  }

  /** Makes the topmost cgroup, or one below it. */
  make(below = ''): string {
    mkdirSync(this.file(below, ''), { recursive: true });
    return `${this.path}${below === '' ? '' : `/${below}`}`;
  }

  file(below: string, name: string): string {
    return `${this.point}${this.path}/${below}/${name}`;
  }

  read(below: string, name: string): string {
    return readFileSync(this.file(below, name), 'utf8');
  }

  write(below: string, name: string, value: string | number): void {
    writeFileSync(this.file(below, name), String(value));
  }

  field(below: string, name: string, key: string): number {
    return Number(new RegExp(`^${key} (\\d+)$`, 'm').exec(this.read(below, name))?.[1]);
  }

  pids(below = ''): number[] {
    return this.read(below, 'cgroup.procs').split('\n').filter(Boolean).map(Number);
  }

  /** The same as text; empty where there is no such file. */
  readIfThere(below: string, name: string): string {
    return existsSync(this.file(below, name)) ? this.read(below, name) : '';
  }

  /** Its cgroups, the topmost one first, as paths below that. */
  below(): string[] {
    if (!existsSync(this.file('', ''))) return [];
    const entries = readdirSync(this.file('', ''), { withFileTypes: true, recursive: true });
    const under = (parent: string, name: string) => `${parent}/${name}`.slice(this.file('', '').length);
    return [
      '',
      ...entries.filter((entry) => entry.isDirectory()).map(({ parentPath, name }) => under(parentPath, name)),
    ];
  }

  protected override sweep(): Promise<void> {
    return this.#remove(`${this.point}${this.path}`);
  }

  /** Lets go whoever waits in a cgroup that is about to be removed. */
  protected abstract release(directory: string): void;

  /** Kills what is left in a cgroup of this test, and removes it. */
  async #remove(directory: string): Promise<void> {
    let names: string[];
    try {
      names = readdirSync(directory, { withFileTypes: true }).flatMap((entry) =>
        entry.isDirectory() ? [entry.name] : [],
      );
    } catch {
      return; // never made, or removed by the test
    }
    for (const name of names) await this.#remove(`${directory}/${name}`);
    this.release(directory);
    await this.until(() => {
      for (const pid of readFileSync(`${directory}/cgroup.procs`, 'utf8').split('\n').filter(Boolean)) {
        try {
          process.kill(Number(pid), 'SIGKILL'); // a child of a job of this test: nobody else is in its cgroup
        } catch {
          // gone meanwhile
        }
      }
      try {
        rmdirSync(directory);
        return true;
      } catch {
        return false;
      }
    }, `removing ${directory}`);
  }
}
