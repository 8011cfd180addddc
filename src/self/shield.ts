import { readFileSync, writeFileSync } from 'node:fs';

/** The kernel takes everybody else first, but one who is left alone with a machine without memory. */
const LAST_TO_DIE = -999;

/**
 * Lowers the `oom_score_adj` of these processes, so that the kernel's killer does not take those who are to handle. What they
 * start inherits it.
 * @returns what puts it back, and why it could not be lowered (CAP_SYS_RESOURCE is needed), or null
 */
export function shield(pids: readonly number[]): { undo: () => void; whyNot: string | null } {
  const before = new Map<number, string>();
  let whyNot: string | null = null;
  for (const pid of pids) {
    const file = `/proc/${pid}/oom_score_adj`;
    try {
      const was = readFileSync(file, 'utf8').trim();
      if (Number(was) <= LAST_TO_DIE) continue;
      writeFileSync(file, String(LAST_TO_DIE));
      before.set(pid, was);
    } catch (error) {
      whyNot = (error as Error).message;
    }
  }
  const undo = () => {
    for (const [pid, was] of before) {
      try {
        writeFileSync(`/proc/${pid}/oom_score_adj`, was);
      } catch {
        // a guard that is gone
      }
    }
  };
  return { undo, whyNot };
}
