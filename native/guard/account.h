#pragma once

#include <sys/types.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "core/fd.h"
#include "protocol.h"

namespace reprieve::guard {

/**
 * What the guard did and when, kept in memory until there is time to write it down: the record in the directory
 * `records`, and a line in the kernel's log.
 */
class Account {
 public:
  /** Opens the kernel's log while that is easy. */
  Account();

  void begin(std::string_view instance, pid_t handler, Reason reason, std::string_view path);
  /** One line, with the time since begin(). */
  void note(std::string_view what);
  /** A line in the kernel's log. */
  void tellKernel(std::string_view what) const;

  /** Writes what was noted to `record` in the instance's directory: 0 or an errno. May be called again. */
  int write(int instance) const;
  /** Moves the record to `records` in the base directory: 0 or an errno. */
  int publish(int instance, int base, const char* name) const;

 private:
  void put(std::string_view text);

  Fd kernelLog_;
  uint64_t begun_ = 0;
  size_t length_ = 0;
  bool full_ = false;
  std::array<char, 16384> text_{};
};

}  // namespace reprieve::guard
