/** What must be put back when the process ends without having closed everything: the same for all handlers. */

/** Signals that end a process which does not listen to them, without an `exit` event: systemd stops a daemon so. */
const ENDING = ['SIGTERM', 'SIGINT', 'SIGHUP'] as const;

const steps = new Set<() => void>();

function runAll(): void {
  for (const step of [...steps]) step();
}

/** Whoever listens to the signal as well decides by himself what it means, and closes or exits. */
function onSignal(signal: NodeJS.Signals): void {
  if (process.listenerCount(signal) > 1) return;
  runAll();
  process.off(signal, onSignal);
  process.kill(process.pid, signal);
}

/** Runs `step`, synchronously, when the process exits or is ended by a signal. Returns what takes that back. */
export function onProcessEnd(step: () => void): () => void {
  if (steps.size === 0) {
    process.on('exit', runAll);
    for (const signal of ENDING) process.on(signal, onSignal);
  }
  steps.add(step);
  return () => {
    if (!steps.delete(step) || steps.size > 0) return;
    process.off('exit', runAll);
    for (const signal of ENDING) process.off(signal, onSignal);
  };
}
