#pragma once

#include <sys/types.h>

#include "fd.h"
#include "result.h"

namespace reprieve {

/** pidfd_open(2); errno is set when the result is not open. */
Fd openPidfd(pid_t pid);
/** pidfd_send_signal(2): 0 or an errno. */
int sendSignal(int pidfd, int signal);
/** True once the process has exited, reaped or not. */
bool hasExited(int pidfd);
/** process_mrelease(2): 0 or an errno. */
int releaseMemory(int pidfd);

/** A process by its descriptor: whoever gets its number later is somebody else. */
class Pidfd {
 public:
  /** ESRCH when there is no such process. */
  static Result<Pidfd> open(pid_t pid);

  /** True once the process has exited, reaped or not. */
  bool exited() const;
  /** False when the process is gone (ESRCH). */
  Result<bool> signal(int signal) const;

  pid_t pid() const { return pid_; }
  int descriptor() const { return fd_.get(); }
  bool closed() const { return !fd_; }
  void close() { fd_.close(); }

 private:
  pid_t pid_ = 0;
  Fd fd_;
};

}  // namespace reprieve
