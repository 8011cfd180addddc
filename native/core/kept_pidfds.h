#pragma once

#include <sys/types.h>

#include <cstddef>
#include <span>
#include <vector>

#include "fd.h"

namespace reprieve {

/**
 * Descriptors of processes that may have to be killed, opened before that is needed. Each means the process that had
 * its number when it was opened, and no other.
 */
class KeptPidfds {
 public:
  /**
   * From now on those of `pids`, each once: what is held of them stays, if it has not exited. Whom no descriptor can be
   * had of is left out. How many there are then.
   */
  size_t keep(std::span<const pid_t> pids);
  /** The descriptor of who had that number, -1 if none is kept; valid until `keep` or `close`. */
  int find(pid_t pid) const;
  void close() { kept_.clear(); }

 private:
  struct Kept {
    pid_t pid;
    Fd pidfd;
  };

  std::vector<Kept> kept_;  // by number
};

}  // namespace reprieve
