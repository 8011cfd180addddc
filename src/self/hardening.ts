import type { SystemError } from '../errors.js';
import { native } from '../native.js';

/** How the handler's thread is scheduled. */
export type Scheduling = 'realtime' | 'nice' | 'keep';

/** How the handler's thread is scheduled from one moment to the next. */
export interface Pace {
  /** Of great weight, but no longer before everybody: a victim needs the processor to die, and who lives on needs it too. */
  ease(): void;
  /** Before everybody again, where it was allowed. */
  raise(): void;
  /** Eased while it runs, and then as before. */
  eased<T>(run: () => T): T;
}

/** Nothing comes of it: in a drill, and in the simulation. */
export const NO_PACE: Pace = { ease() {}, raise() {}, eased: (run) => run() };

/** What became of an attempt to make the handler quicker or safer. */
export interface Hardening extends Pace {
  scheduling: { got: Scheduling; whyNot: string | null };
  /** Bytes of mapped files (program text) that stay in memory once touched; 0 with the reason if none. */
  lockedText: { bytes: number; whyNot: string | null };
  undo(): void;
}

let users = 0;
/** Of the thread, which several handlers may share. */
let eased = false;

/**
 * Raises the scheduling of the calling thread, since the tail of event to kill is the run queue, and locks the program
 * text. V8's heap is not locked: madvise(2) on locked pages fails there and V8 aborts on that.
 */
export function harden(wanted: Scheduling, lockText: boolean): Hardening {
  const scheduling = raise(wanted);
  const lockedText = lockText ? lock() : { bytes: 0, whyNot: 'not asked for' };
  users++;
  let undone = false;
  const hardening: Hardening = {
    scheduling,
    lockedText,
    ease() {
      if (eased || scheduling.got !== 'realtime') return;
      eased = true;
      native().raiseScheduling('nice');
    },
    raise() {
      if (!eased) return;
      eased = false;
      Object.assign(scheduling, raise(scheduling.got)); // what it was allowed once it may not be any more
    },
    eased(run) {
      if (eased) return run();
      hardening.ease();
      try {
        return run();
      } finally {
        hardening.raise();
      }
    },
    undo() {
      if (undone) return;
      undone = true;
      if (--users > 0) return; // another handler of this process stands on it
      native().restoreScheduling();
      native().unlockText();
    },
  };
  return hardening;
}

function raise(wanted: Scheduling): Hardening['scheduling'] {
  const whyNot: string[] = [];
  for (const step of ['realtime', 'nice'] as const) {
    if (wanted === 'keep' || (wanted === 'nice' && step === 'realtime')) continue;
    try {
      native().raiseScheduling(step);
      return { got: step, whyNot: whyNot.length > 0 ? whyNot.join('; ') : null };
    } catch (error) {
      whyNot.push((error as SystemError).message);
    }
  }
  return { got: 'keep', whyNot: wanted === 'keep' ? null : whyNot.join('; ') };
}

function lock(): Hardening['lockedText'] {
  const { bytes, failed } = native().lockText();
  return { bytes, whyNot: failed === 0 ? null : `${failed} mappings could not be locked (CAP_IPC_LOCK, ulimit -l)` };
}
