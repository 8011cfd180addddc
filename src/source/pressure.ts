import type { Listener } from '../cgroup/cgroup.js';
import type { SystemError } from '../errors.js';
import { type Directory, native } from '../native.js';

/** Windows in microseconds that are tried: without CAP_SYS_RESOURCE only multiples of 2 s are allowed. */
const WINDOWS_US = [1_000_000, 2_000_000];
/** No PSI in this kernel, switched off (psi=0), or a cgroup file of a kernel that has none. */
const NONE = ['ENOENT', 'EOPNOTSUPP', 'ENODEV'];

/**
 * Calls `pressed` when tasks stood still for want of memory (Documentation/accounting/psi.rst), at most once a window.
 * @param file `memory.pressure` of a cgroup, or `memory` of /proc/pressure
 * @param kind 'some' task, or all of them at once: 'full'
 * @param stallMs for how long within a second
 * @returns a listener that never calls where the kernel has no PSI
 */
export function openPressure(
  directory: Directory,
  file: string,
  kind: 'some' | 'full',
  stallMs: number,
  pressed: (atUs: number) => void,
): Listener {
  for (const windowUs of WINDOWS_US) {
    const stallUs = Math.round((stallMs / 1000) * windowUs);
    try {
      const trigger = new (native().PressureTrigger)(directory, file, `${kind} ${stallUs} ${windowUs}`, pressed);
      trigger.unref();
      return trigger;
    } catch (error) {
      const { code } = error as SystemError;
      if (NONE.includes(code ?? '')) break;
      if (code !== 'EINVAL' && code !== 'EPERM') throw error;
    }
  }
  return { close() {} };
}
