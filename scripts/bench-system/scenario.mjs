// The scenario: what runs on the machine, and how it is leaked full. Sizes are shares of the guest's own MemTotal.
export const MEMORY = '1GiB';
export const SWAP = '512MiB';
export const HIERARCHY = '/sys/fs/cgroup';
/** All jobs are children of this cgroup. */
export const SCOPE = '/bench';
export const HANDLER_CGROUP = '/handler';
const INNOCENTS = 5;
/** The largest process until the last twentieth of memory, where the one that leaks alone has overtaken it. */
const SERVICE_SHARE = 0.4;

/** Below this share of memory and swap the machine is short of memory; below the other it is all but out of it. */
export const MARK_PERMILLE = 100;
export const CRITICAL_PERMILLE = 20;
/** A shortage that lasts longer is said not to have ended. */
export const SHORT_LIMIT_MS = 20_000;

/** Processes that leak, and those of the job in all; each shape has another reason to be difficult. */
export const SHAPES = {
  steady: { processes: 1, words: ['--chunk', '2MiB', '--every', '20ms'] },
  burst: { processes: 1, words: ['--chunk', '16MiB', '--every', '0'] },
  eight: { processes: 9, words: ['--processes', '8', '--chunk', '2MiB', '--every', '160ms'] },
};

/** The service comes by all of its memory every one or two seconds; the innocents do little, so that all fit on two processors. */
const SERVICE = ['--scratch', '16KiB', '--sweep', '512KiB', '--pause', '1000us'];
const INNOCENT = ['--scratch', '4KiB', '--pause', '4000us'];
/** Huge pages are what a program gets; and an emulated processor takes far longer for a page fault than for a page. */
const COMMON = ['--huge', '--outlive-parent', '--gate'];

/** The jobs before the leak: name and words for the workload program. */
export function jobsOn(memTotalBytes) {
  const work = (name, set, words) => ({
    name,
    words: ['work', '--name', name, '--set', String(set), ...words, '--timeout', '600s', ...COMMON],
  });
  const innocents = Array.from({ length: INNOCENTS }, (_, index) => work(`innocent-${index + 1}`, 4 << 20, INNOCENT));
  return [work('service', Math.floor((memTotalBytes * SERVICE_SHARE) / 4096) * 4096, SERVICE), ...innocents];
}

/** The leak ends by itself when a run has taken far too long. Each process may die alone: none is tied to its parent. */
export function leakOf(shape) {
  const words = ['leak', '--name', 'leaker', ...SHAPES[shape].words, '--timeout', '90s', ...COMMON];
  return { name: 'leak', words };
}
