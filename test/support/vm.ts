import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { text } from 'node:stream/consumers';
import { fileURLToPath } from 'node:url';
import { describe, onTestFailed } from 'vitest';

const script = fileURLToPath(new URL('../../scripts/vm.mjs', import.meta.url));

/** Tests in virtual machines: skipped with the reason where there can be none, unless REPRIEVE_REQUIRE asks for them. */
export function describeVm(name: string, tests: () => void): void {
  const { status, stderr } = spawnSync(process.execPath, [script, '--check', '--systemd'], { encoding: 'utf8' });
  const skip = status === 0 ? null : stderr.trim();
  const required = (process.env.REPRIEVE_REQUIRE ?? '').split(',').includes('vm');
  if (skip !== null && required) throw new Error(`REPRIEVE_REQUIRE asks for tests in virtual machines: ${skip}`);
  describe.skipIf(skip !== null)(skip === null ? name : `${name} [skipped: ${skip}]`, tests);
}

/** What a machine has told outside. */
export interface Told {
  code: number | null;
  stdout: string;
  stderr: string;
}

/** Starts a machine. @param options of scripts/vm.mjs */
export function startVm(options: string[], command: string[]): { child: ChildProcess; told: Promise<Told> } {
  const child = spawn(process.execPath, [script, ...options, '--', ...command], { stdio: ['ignore', 'pipe', 'pipe'] });
  const code = new Promise<number | null>((resolve, reject) => {
    child.on('error', reject);
    child.on('close', resolve);
  });
  const told = Promise.all([code, text(child.stdout), text(child.stderr)]).then(([code, stdout, stderr]) => {
    onTestFailed(() => console.log(`the machine's exit code was ${code}\n${stdout}\n${stderr}`));
    return { code, stdout, stderr };
  });
  return { child, told };
}

/** Runs a shell script (bash) in a machine. @param options of scripts/vm.mjs */
export function inVm(options: string[], script: string): Promise<Told> {
  return startVm(options, ['bash', '-euc', script]).told;
}
