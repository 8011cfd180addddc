import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { onTestFailed } from 'vitest';
import type { Scene } from './scene.js';

const dist = fileURLToPath(new URL('../../dist/index.js', import.meta.url));

/** A handler in a process of its own, so that something can happen to it. */
export interface HandlerProcess {
  child: ChildProcess;
  pid: number;
  guardPid: number;
  /** Lines that it has printed: 'event' and what belongs to it, or whatever the program prints. */
  lines: string[];
  gone: Promise<unknown>;
}

/**
 * Starts one that watches, and resolves when it does. `body` runs after `handler` is open and before it watches; it may
 * set `policy` and `options` (of the watch).
 * @param inside the name of the jobs among which it is started
 */
export async function startHandler(
  scene: Scene,
  open: object,
  body = '',
  scope = scene.scope,
  inside?: string,
): Promise<HandlerProcess> {
  const text = `
    import { writeFileSync } from 'node:fs';
    import { lowestPriority, OomHandler } from ${JSON.stringify(dist)};
    for (const cgroup of ${JSON.stringify(inside === undefined ? [] : scene.cgroupsOf(inside))})
      writeFileSync(cgroup + '/cgroup.procs', '0');
    const say = (...words) => console.log(words.join(' '));
    const handler = await OomHandler.open(${JSON.stringify({ reserve: 0, ...open })});
    for (const name of ['alarm', 'warning', 'revoked']) handler.on(name, (message) => say(name, message));
    handler.on('guard', ({ pid }) => say('guard', pid));
    handler.on('report', ({ outcome, victims }) => say('report', outcome, ...victims.map(({ name }) => name)));
    let policy = () => new Promise(() => {});
    let options = {};
    ${body}
    await handler.watch(${JSON.stringify(scope)}, { policy, ...options });
    say('watching', handler.guard?.pid ?? 0);
    setInterval(() => {}, 1000);`;
  const child = spawn(process.execPath, ['--max-old-space-size=256', '--input-type=module', '-e', text], {
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  // One that hangs, at a raised priority, would take a processor from every test after it.
  scene.onClear(() => child.kill('SIGKILL'));
  const lines: string[] = [];
  let errors = '';
  child.stderr.setEncoding('utf8').on('data', (chunk: string) => {
    errors = `${errors}${chunk}`.slice(-2_000);
  });
  onTestFailed(() => console.log(`handler ${child.pid} said last:\n${lines.slice(-8).join('\n')}`));
  const gone = once(child, 'exit');
  const watching = new Promise<void>((resolve, reject) => {
    let rest = '';
    child.stdout.setEncoding('utf8').on('data', (chunk: string) => {
      const parts = (rest + chunk).split('\n');
      rest = parts.pop() ?? '';
      lines.push(...parts);
      if (lines.some((line) => line.startsWith('watching'))) resolve();
    });
    gone.then(([code, signal]) =>
      reject(new Error(`the handler ended before it watched (${signal ?? code}): ${lines.join('; ')} ${errors}`)),
    );
  });
  await watching;
  const guardPid = Number(/^watching (\d+)$/m.exec(lines.join('\n'))?.[1]);
  return { child, pid: child.pid as number, guardPid, lines, gone };
}

/** True while there is such a process; a zombie counts as gone. */
export function isRunning(pid: number): boolean {
  try {
    return !/^State:\s*Z/m.test(readFileSync(`/proc/${pid}/status`, 'utf8'));
  } catch {
    return false;
  }
}
