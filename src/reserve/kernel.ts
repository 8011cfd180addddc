import type { Memcg } from '../cgroup/cgroup.js';
import { isVanished } from '../errors.js';
import type { Ledger } from '../guard/ledger.js';

/**
 * The kernel's own reserve, on a kernel with the userspace OOM patchset: how far a process that waits for
 * out-of-memory notifications may charge the memcg above its limit. Null on a kernel without it.
 * @returns puts back what was there
 */
export function setKernelReserve(memcg: Memcg, bytes: number, ledger: Ledger): (() => void) | null {
  const reserve = memcg.kernelReserve();
  if (reserve === null) return null;
  const original = reserve.read();
  const entry = ledger.file(memcg, 'memory.oom_reserve_in_bytes', String(original), String(bytes));
  reserve.write(bytes);
  const written = reserve.read(); // the kernel rounds up to pages
  return () => {
    try {
      if (reserve.read() === written) reserve.write(original);
    } catch (error) {
      if (!isVanished(error)) throw error;
    }
    entry.clear();
  };
}
