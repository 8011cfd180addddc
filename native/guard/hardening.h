#pragma once

#include <cstdint>

namespace reprieve::guard {

/** Nothing that is sent to the handler's group or terminal ends or stops the guard; only its handler does, or SIGKILL.
 */
void standApart();
/** Closes what was inherited but the descriptors 0 to `last`; 0 to 2 become /dev/null. As many as allowed may be open.
 */
void keepDescriptors(int last);
/** Locks all memory, never to be killed by the kernel, scheduled like the handler: Readiness bits of what was had. */
uint32_t harden();
/** Scheduled before the handler, where that is allowed: it is not to act any more. */
void goFirst();

}  // namespace reprieve::guard
