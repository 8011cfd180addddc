#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <utility>

#include "fd.h"
#include "result.h"

namespace reprieve {

/** One end of a SOCK_SEQPACKET pair: whole messages, with descriptors. Never blocks. */
class Channel {
 public:
  /** At most so many descriptors go with one message. */
  static constexpr size_t kMostDescriptors = 16;

  /** This end, and the one for the peer. */
  static Result<std::pair<Channel, Fd>> make();

  /** Queues a message. EAGAIN while the peer does not read, EPIPE when it is gone. */
  Result<void> send(std::span<const uint8_t> message, std::span<const int> descriptors) const;
  /** The length of the next message, cut to the buffer; 0 when the peer is gone; nothing when none waits. */
  Result<std::optional<size_t>> receive(std::span<uint8_t> buffer) const;

  int descriptor() const { return fd_.get(); }
  bool closed() const { return !fd_; }
  void close() { fd_.close(); }

 private:
  Fd fd_;
};

}  // namespace reprieve
