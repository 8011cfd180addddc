#include "pressure.h"

#include <fcntl.h>
#include <unistd.h>

namespace reprieve {

Result<Fd> openPressureTrigger(const Directory& directory, const std::string& name, const std::string& trigger) {
  auto file = directory.openFile(name, O_RDWR | O_NONBLOCK);
  if (!file) return file.error();
  // With its NUL: the kernel overwrites the last byte with one (psi_write() in kernel/sched/psi.c).
  const ssize_t written = write(file->get(), trigger.c_str(), trigger.size() + 1);
  if (written < 0) return lastError("write", directory.pathOf(name));
  return std::move(*file);
}

}  // namespace reprieve
