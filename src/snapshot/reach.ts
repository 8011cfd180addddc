import type { SystemError } from '../errors.js';

/** Processes of a job that are asked. */
const MOST_ASKED = 16;
/** Root may signal whom it likes, and is not to pay for asking. */
const ASKS = process.geteuid?.() !== 0;

/** Why a job with these processes cannot be killed by this user; null if it can, as far as was asked. */
export function whyOutOfReach(pids: readonly number[]): string | null {
  if (!ASKS) return null;
  return pids.slice(0, MOST_ASKED).some(isAnothers) ? 'it is of another user, and there is no CAP_KILL' : null;
}

function isAnothers(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return false;
  } catch (error) {
    return (error as SystemError).code === 'EPERM';
  }
}
