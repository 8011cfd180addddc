#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace reprieve::guard {

/**
 * What a handler and its guard say to each other: one message a datagram, little endian. The other end is
 * src/guard/protocol.ts.
 */
constexpr uint16_t kProtocolVersion = 1;

constexpr size_t kHeaderBytes = 48;
constexpr size_t kEntryBytes = 96;
constexpr size_t kReplyBytes = 32;
constexpr size_t kMostPathBytes = 255;
/** Victims of one plan, at most. */
constexpr size_t kMostPlanned = 16;
constexpr size_t kMostMessageBytes = kHeaderBytes + kMostPlanned * kEntryBytes;
static_assert(kMostMessageBytes >= kHeaderBytes + kMostPathBytes);

enum class MessageType : uint16_t {
  kArm = 1,
  kPlan = 2,
  kOpened = 3,
  kResolved = 4,
  kHeartbeat = 5,
  kDisarm = 6,
  kBye = 7,
  /** The handler waits for somebody else: nobody may be killed there. */
  kParked = 8,
  /** Like kBye, but not everything was put back: that is left to the guard. */
  kLeave = 9,
  /** Like kArm where nobody parks: no memcg comes with it, and `inode` is a number of the handler's own, not 0. */
  kTend = 10,
};

/** A job that may be killed, as it is announced; its descriptor comes beside the message. */
struct PlanEntry {
  enum class Kind : uint16_t { kMemcg = 1, kProcess = 2 };

  Kind kind;
  /** The handler has sent SIGKILL already: it goes before all others. */
  bool dying;
  /** 0 for a memcg. */
  uint32_t pid;
  /** The inode of a memcg, the start time of a process. */
  uint64_t id;
  double priority;
  /** Its priority while it is above its reservation; NaN for none. */
  double overPriority;
  /** Bytes. */
  double reservation;
  /** Ends with a NUL. */
  std::array<char, 56> name;
};

/** A message of the handler. What its type does not use is 0 or empty. */
struct Message {
  MessageType type;
  uint32_t seq;
  uint64_t inode;
  uint32_t respondMs;
  uint32_t handleMs;
  /** oom_kill_disable as it was before the handler came. */
  bool original;
  /** For the record only. Lives as long as the bytes that were parsed. */
  std::string_view path;
  uint32_t planned;
  std::array<PlanEntry, kMostPlanned> plan;
};

/**
 * False for what is no message of this version, or does not go with so many descriptors; of one that has a header
 * `inode` is told all the same.
 */
bool parseMessage(std::span<const std::byte> bytes, size_t descriptors, Message& out);

enum class ReplyType : uint16_t { kReady = 101, kAlive = 102, kFailed = 103, kActing = 104 };

/** Bits of the code of kReady. */
enum Readiness : uint32_t { kMemoryLocked = 1, kRealtime = 2 };
/** The code of kFailed. */
enum class Failure : uint32_t { kBadMessage = 1, kNotMemcg = 2, kOpen = 3, kRegister = 4, kTooMany = 5 };
/** The code of kActing. */
enum class Reason : uint32_t { kDied = 1, kSilent = 2, kOverdue = 3, kLeft = 4 };

struct Reply {
  ReplyType type;
  uint32_t seq = 0;
  uint32_t code = 0;
  uint64_t inode = 0;
  uint32_t error = 0;
};

std::array<std::byte, kReplyBytes> encodeReply(const Reply& reply);

}  // namespace reprieve::guard
