import type { Listener } from '../cgroup/cgroup.js';
import type { SystemError } from '../errors.js';
import { type Directory, native } from '../native.js';

/** Windows in microseconds that are tried: without CAP_SYS_RESOURCE only multiples of 2 s are allowed. */
const WINDOWS_US = [1_000_000, 2_000_000];
/** No PSI in this kernel, switched off (psi=0), or a cgroup file of a kernel that has none. */
const NONE = ['ENOENT', 'EOPNOTSUPP', 'ENODEV'];
/** It is there, and not for this user to write, or nobody's on a read-only mount. */
const REFUSED = ['EACCES', 'EPERM', 'EROFS'];

/**
 * Calls `pressed` when tasks stood still for want of memory (Documentation/accounting/psi.rst), at most once a window.
 * @param file `memory.pressure` of a cgroup, or `memory` of /proc/pressure
 * @param kind 'some' task, or all of them at once: 'full'
 * @param stallMs for how long within a second
 * @returns a listener that never calls where the kernel has no PSI, or where that may not be written: `refused` says so then
 */
export function openPressure(
  directory: Directory,
  file: string,
  kind: 'some' | 'full',
  stallMs: number,
  pressed: (atUs: number) => void,
): Listener & { refused?: string } {
  let refused: string | undefined;
  for (const windowUs of WINDOWS_US) {
    const stallUs = Math.round((stallMs / 1000) * windowUs);
    try {
      const trigger = new (native().PressureTrigger)(directory, file, `${kind} ${stallUs} ${windowUs}`, pressed);
      trigger.unref();
      return trigger;
    } catch (error) {
      const { code } = error as SystemError;
      if (NONE.includes(code ?? '')) break;
      if (REFUSED.includes(code ?? '')) refused = (error as SystemError).message;
      else if (code !== 'EINVAL') throw error;
    }
  }
  return { close() {}, ...(refused !== undefined && { refused }) };
}
