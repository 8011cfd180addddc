#pragma once

#include <array>
#include <cstddef>
#include <utility>

#include "core/fd.h"
#include "protocol.h"

namespace reprieve::guard {

/** The guard's end of the socket to its handler. Never blocks. */
class Port {
 public:
  enum class Heard { kNothing, kMessage, kNonsense, kEnd };

  explicit Port(Fd socket) : socket_(std::move(socket)) {}

  /**
   * The next message, and with it its descriptors: those not taken are closed by the next call. kEnd when the handler's
   * end is closed and all that it said before has been heard.
   */
  Heard receive(Message& out);
  /** The descriptor that came with entry `i` of the last message. */
  Fd take(size_t i) { return std::move(descriptors_[i]); }
  /** A handler that does not read goes without. */
  void reply(const Reply& reply) const;

  int descriptor() const { return socket_.get(); }

 private:
  // More than fit are closed by the kernel, which says so (MSG_CTRUNC).
  static constexpr size_t kMostDescriptors = 16;

  bool ended() const;

  Fd socket_;
  // One byte more than the longest message: a longer one shows as such.
  std::array<std::byte, kMostMessageBytes + 1> bytes_{};
  std::array<Fd, kMostDescriptors> descriptors_;
};

}  // namespace reprieve::guard
