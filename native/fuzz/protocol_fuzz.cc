#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <span>

#include "guard/protocol.h"

using reprieve::guard::Message;
using reprieve::guard::MessageType;
using reprieve::guard::parseMessage;

namespace guard = reprieve::guard;

/** The first byte tells how many descriptors come with the message. */
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const auto bytes = std::as_bytes(std::span(data + 1, size - 1));
  const size_t descriptors = data[0] % 20;
  Message message;
  if (!parseMessage(bytes, descriptors, message)) return 0;
  // What the guard takes for granted.
  const auto within = [](bool holds) {
    if (!holds) std::abort();
  };
  within(message.planned <= guard::kMostPlanned && message.path.size() <= guard::kMostPathBytes);
  within(bytes.size() <= guard::kMostMessageBytes);
  if (message.type == MessageType::kArm) within(descriptors == 1);
  if (message.type != MessageType::kArm) within(descriptors == message.planned);
  for (size_t i = 0; i < message.planned; i++) {
    const auto& entry = message.plan[i];
    within(memchr(entry.name.data(), '\0', entry.name.size()) != nullptr);
    within(entry.priority == entry.priority && entry.reservation == entry.reservation);
  }
  return 0;
}
