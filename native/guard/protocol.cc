#include "protocol.h"

#include <algorithm>
#include <bit>
#include <cmath>

namespace reprieve::guard {
namespace {

constexpr uint32_t kMagic = 0x31475052;
/** A flag of a plan's entry. */
constexpr uint16_t kDying = 1;

template <typename Number>
Number readAt(std::span<const std::byte> bytes, size_t at) {
  Number number = 0;
  for (size_t i = 0; i < sizeof number; i++) {
    number = static_cast<Number>(number | static_cast<Number>(std::to_integer<Number>(bytes[at + i]) << 8 * i));
  }
  return number;
}

double readDouble(std::span<const std::byte> bytes, size_t at) {
  return std::bit_cast<double>(readAt<uint64_t>(bytes, at));
}

template <typename Number>
void writeAt(std::span<std::byte> bytes, size_t at, Number number) {
  for (size_t i = 0; i < sizeof number; i++) bytes[at + i] = static_cast<std::byte>(number >> 8 * i & 0xff);
}

std::string_view textOf(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

bool parseScope(std::span<const std::byte> bytes, Message& out) {
  const auto path = bytes.subspan(kHeaderBytes);
  if (path.size() > kMostPathBytes) return false;
  out.respondMs = readAt<uint32_t>(bytes, 24);
  out.handleMs = readAt<uint32_t>(bytes, 28);
  out.path = textOf(path);
  return true;
}

bool parseArm(std::span<const std::byte> bytes, size_t descriptors, Message& out) {
  const uint32_t original = readAt<uint32_t>(bytes, 32);
  if (descriptors != 1 || original > 1) return false;
  out.original = original == 1;
  return parseScope(bytes, out);
}

bool parsePlan(std::span<const std::byte> bytes, size_t descriptors, Message& out) {
  const uint32_t count = readAt<uint32_t>(bytes, 12);
  if (count > kMostPlanned || descriptors != count || bytes.size() != kHeaderBytes + count * kEntryBytes) return false;
  for (size_t i = 0; i < count; i++) {
    const auto from = bytes.subspan(kHeaderBytes + i * kEntryBytes, kEntryBytes);
    PlanEntry& entry = out.plan[i];
    entry.kind = static_cast<PlanEntry::Kind>(readAt<uint16_t>(from, 0));
    if (entry.kind != PlanEntry::Kind::kMemcg && entry.kind != PlanEntry::Kind::kProcess) return false;
    entry.dying = (readAt<uint16_t>(from, 2) & kDying) != 0;
    entry.pid = readAt<uint32_t>(from, 4);
    entry.id = readAt<uint64_t>(from, 8);
    entry.priority = readDouble(from, 16);
    entry.overPriority = readDouble(from, 24);
    entry.reservation = readDouble(from, 32);
    // The order of victims must be total.
    if (std::isnan(entry.priority) || std::isnan(entry.reservation)) return false;
    const std::string_view name = textOf(from.subspan(40));
    std::copy(name.begin(), name.end() - 1, entry.name.begin());
  }
  out.planned = count;
  return true;
}

}  // namespace

bool parseMessage(std::span<const std::byte> bytes, size_t descriptors, Message& out) {
  out = {};
  if (bytes.size() < kHeaderBytes) return false;
  if (readAt<uint32_t>(bytes, 0) != kMagic || readAt<uint16_t>(bytes, 4) != kProtocolVersion) return false;
  out.type = static_cast<MessageType>(readAt<uint16_t>(bytes, 6));
  out.seq = readAt<uint32_t>(bytes, 8);
  out.inode = readAt<uint64_t>(bytes, 16);
  switch (out.type) {
    case MessageType::kArm:
      return parseArm(bytes, descriptors, out);
    case MessageType::kPlan:
      return parsePlan(bytes, descriptors, out);
    case MessageType::kTend:
      return descriptors == 0 && out.inode != 0 && parseScope(bytes, out);
    case MessageType::kOpened:
    case MessageType::kResolved:
    case MessageType::kHeartbeat:
    case MessageType::kDisarm:
    case MessageType::kBye:
    case MessageType::kParked:
    case MessageType::kLeave:
      return descriptors == 0 && bytes.size() == kHeaderBytes;
  }
  return false;
}

std::array<std::byte, kReplyBytes> encodeReply(const Reply& reply) {
  std::array<std::byte, kReplyBytes> bytes{};
  writeAt(std::span(bytes), 0, kMagic);
  writeAt(std::span(bytes), 4, kProtocolVersion);
  writeAt(std::span(bytes), 6, static_cast<uint16_t>(reply.type));
  writeAt(std::span(bytes), 8, reply.seq);
  writeAt(std::span(bytes), 12, reply.code);
  writeAt(std::span(bytes), 16, reply.inode);
  writeAt(std::span(bytes), 24, reply.error);
  return bytes;
}

}  // namespace reprieve::guard
