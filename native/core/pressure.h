#pragma once

#include <string>

#include "directory.h"
#include "fd.h"
#include "result.h"

namespace reprieve {

/**
 * Opens a file of pressure stall information (`memory` of /proc/pressure, `memory.pressure` of a v2 cgroup) and sets
 * its trigger, "some|full <stall us> <window us>" (Documentation/accounting/psi.rst). The descriptor polls EPOLLPRI
 * once for each event, and EPOLLERR for ever when the cgroup is gone. Poll it directly: where an epoll set lies within
 * another one, the outer one takes the event and the inner one reports nothing.
 */
Result<Fd> openPressureTrigger(const Directory& directory, const std::string& name, const std::string& trigger);

}  // namespace reprieve
