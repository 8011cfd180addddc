#include "pidfd.h"

#include <poll.h>
#include <sys/syscall.h>

#include <string>

// Since Linux 5.15; the number is the same on every architecture, Debian 11's headers do not have it.
#ifndef SYS_process_mrelease
#define SYS_process_mrelease 448
#endif

namespace reprieve {
namespace {

std::string pathOf(pid_t pid) { return "/proc/" + std::to_string(pid); }

}  // namespace

// The kernel makes every pidfd close-on-exec (pidfd_open(2)).
Fd openPidfd(pid_t pid) { return Fd(static_cast<int>(syscall(SYS_pidfd_open, pid, 0))); }

int sendSignal(int pidfd, int signal) {
  return syscall(SYS_pidfd_send_signal, pidfd, signal, nullptr, 0) == 0 ? 0 : errno;
}

bool hasExited(int pidfd) {
  pollfd entry{pidfd, POLLIN, 0};
  return poll(&entry, 1, 0) == 1;
}

int releaseMemory(int pidfd) { return syscall(SYS_process_mrelease, pidfd, 0) == 0 ? 0 : errno; }

Result<Pidfd> Pidfd::open(pid_t pid) {
  Pidfd process;
  process.pid_ = pid;
  process.fd_ = openPidfd(pid);
  if (!process.fd_) return lastError("pidfd_open", pathOf(pid));
  return process;
}

bool Pidfd::exited() const { return hasExited(fd_.get()); }

Result<bool> Pidfd::signal(int signal) const {
  const int number = sendSignal(fd_.get(), signal);
  if (number == 0) return true;
  if (number == ESRCH) return false;
  return Error{number, "pidfd_send_signal", pathOf(pid_)};
}

}  // namespace reprieve
