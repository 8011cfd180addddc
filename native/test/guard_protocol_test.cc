#include <doctest/doctest.h>

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "guard/plan.h"
#include "guard/protocol.h"
#include "guard/tended.h"

namespace reprieve::guard {
namespace {

constexpr double kNone = std::numeric_limits<double>::quiet_NaN();

/** A message as the handler makes it. */
class Bytes {
 public:
  explicit Bytes(MessageType type) : bytes_(kHeaderBytes) {
    put<uint32_t>(0, 0x31475052);
    put<uint16_t>(4, kProtocolVersion);
    put<uint16_t>(6, static_cast<uint16_t>(type));
    put<uint32_t>(8, 7);
    put<uint64_t>(16, 4711);
  }

  template <typename Number>
  Bytes& put(size_t at, Number number) {
    if (bytes_.size() < at + sizeof number) bytes_.resize(at + sizeof number);
    memcpy(bytes_.data() + at, &number, sizeof number);
    return *this;
  }
  Bytes& text(size_t at, std::string_view text) {
    bytes_.resize(std::max(bytes_.size(), at + text.size()));
    memcpy(bytes_.data() + at, text.data(), text.size());
    return *this;
  }
  Bytes& resize(size_t size) {
    bytes_.resize(size);
    return *this;
  }
  bool parse(size_t descriptors, Message& out) const { return parseMessage(bytes_, descriptors, out); }
  bool parse(size_t descriptors) const {
    Message out;
    return parse(descriptors, out);
  }

 private:
  std::vector<std::byte> bytes_;
};

Bytes arm() { return Bytes(MessageType::kArm).put<uint32_t>(24, 500).put<uint32_t>(28, 20000).put<uint32_t>(32, 1); }

Bytes plan(uint32_t count) {
  Bytes bytes(MessageType::kPlan);
  bytes.put(12, count);
  for (uint32_t i = 0; i < count; i++) {
    const size_t at = kHeaderBytes + i * kEntryBytes;
    bytes.resize(at + kEntryBytes);
    bytes.put<uint16_t>(at, i % 2 == 0 ? 1 : 2).put<uint16_t>(at + 2, i == 1 ? 1 : 0).put<uint32_t>(at + 4, i);
    bytes.put<uint64_t>(at + 8, 100 + i).put(at + 16, i + 0.5).put(at + 24, kNone).put(at + 32, 1e9);
    bytes.text(at + 40, "job-" + std::to_string(i));
  }
  return bytes;
}

TEST_CASE("parseMessage reads what arms a memcg") {
  Message message;
  const Bytes bytes = arm().text(kHeaderBytes, "/jobs/web");
  REQUIRE(bytes.parse(1, message));
  CHECK(message.type == MessageType::kArm);
  CHECK(message.seq == 7);
  CHECK(message.inode == 4711);
  CHECK(message.respondMs == 500);
  CHECK(message.handleMs == 20000);
  CHECK(message.original);
  CHECK(message.path == "/jobs/web");
  CHECK(message.planned == 0);

  CHECK(arm().parse(1));
  CHECK_FALSE(arm().parse(0));
  CHECK_FALSE(arm().parse(2));
  CHECK(arm().resize(kHeaderBytes + kMostPathBytes).parse(1));
  CHECK_FALSE(arm().resize(kHeaderBytes + kMostPathBytes + 1).parse(1));
  CHECK_FALSE(arm().put<uint32_t>(32, 2).parse(1));
}

TEST_CASE("parseMessage reads what is to be tended") {
  const auto tend = [] { return Bytes(MessageType::kTend).put<uint32_t>(24, 500).put<uint32_t>(28, 20000); };
  Message message;
  const Bytes bytes = tend().text(kHeaderBytes, "system");
  REQUIRE(bytes.parse(0, message));
  CHECK(message.inode == 4711);
  CHECK(message.respondMs == 500);
  CHECK(message.handleMs == 20000);
  CHECK(message.path == "system");
  CHECK_FALSE(tend().parse(1));
  CHECK_FALSE(tend().put<uint64_t>(16, 0).parse(0));
  CHECK_FALSE(tend().resize(kHeaderBytes + kMostPathBytes + 1).parse(0));
}

TEST_CASE("Tended keeps so many scopes, each under its number") {
  Tended tended;
  Message message{};
  message.path = "/a";
  CHECK(tended.empty());
  size_t taken = 0;
  for (message.inode = 1; tended.set(message); message.inode++) taken++;
  CHECK(taken == 128);
  tended.find(5)->condition.open = true;
  message.inode = 5;
  message.handleMs = 7;
  CHECK(tended.set(message));
  CHECK(tended.find(5)->handleMs == 7);
  CHECK(tended.find(5)->condition.open);
  CHECK(tended.find(0) == nullptr);
  CHECK(tended.findDue([](const TendedScope& scope) { return scope.condition.open; }) == tended.find(5));
  CHECK(tended.anyOpen());
  for (uint64_t id = 1; id <= taken; id++) tended.drop(*tended.find(id));
  CHECK(tended.empty());
  CHECK(tended.find(5) == nullptr);
}

TEST_CASE("parseMessage reads a plan") {
  Message message;
  REQUIRE(plan(3).parse(3, message));
  REQUIRE(message.planned == 3);
  CHECK(message.plan[0].kind == PlanEntry::Kind::kMemcg);
  CHECK_FALSE(message.plan[0].dying);
  CHECK(message.plan[1].kind == PlanEntry::Kind::kProcess);
  CHECK(message.plan[1].dying);
  CHECK(message.plan[1].pid == 1);
  CHECK(message.plan[2].id == 102);
  CHECK(message.plan[2].priority == 2.5);
  CHECK(std::isnan(message.plan[2].overPriority));
  CHECK(message.plan[2].reservation == 1e9);
  CHECK(std::string_view(message.plan[2].name.data()) == "job-2");

  CHECK(plan(0).parse(0));
  CHECK(plan(kMostPlanned).parse(kMostPlanned));
  CHECK_FALSE(plan(kMostPlanned + 1).parse(kMostPlanned + 1));
  CHECK_FALSE(plan(2).parse(1));
  CHECK_FALSE(plan(2).put<uint32_t>(12, 3).parse(3));
  CHECK_FALSE(plan(2).put<uint32_t>(12, std::numeric_limits<uint32_t>::max()).parse(2));
  CHECK_FALSE(plan(1).put<uint16_t>(kHeaderBytes, 3).parse(1));
  CHECK_FALSE(plan(1).put(kHeaderBytes + 16, kNone).parse(1));
  CHECK_FALSE(plan(1).put(kHeaderBytes + 32, kNone).parse(1));
}

TEST_CASE("parseMessage ends a name that fills its field") {
  Message message;
  REQUIRE(plan(1).text(kHeaderBytes + 40, std::string(56, 'x')).parse(1, message));
  CHECK(std::string_view(message.plan[0].name.data()) == std::string(55, 'x'));
}

TEST_CASE("parseMessage refuses what is no message") {
  for (const auto type : {MessageType::kOpened, MessageType::kResolved, MessageType::kHeartbeat, MessageType::kDisarm,
                          MessageType::kBye, MessageType::kParked, MessageType::kLeave}) {
    Message message;
    CHECK(Bytes(type).parse(0, message));
    CHECK(message.type == type);
    CHECK_FALSE(Bytes(type).parse(1));
    CHECK_FALSE(Bytes(type).resize(kHeaderBytes + 1).parse(0));
    CHECK_FALSE(Bytes(type).resize(kHeaderBytes - 1).parse(0));
  }
  CHECK_FALSE(Bytes(MessageType::kBye).resize(0).parse(0));
  CHECK_FALSE(Bytes(MessageType::kBye).put<uint32_t>(0, 0x31475053).parse(0));
  CHECK_FALSE(Bytes(MessageType::kBye).put<uint16_t>(4, 2).parse(0));
  CHECK_FALSE(Bytes(static_cast<MessageType>(0)).parse(0));
  CHECK_FALSE(Bytes(static_cast<MessageType>(11)).parse(0));
}

TEST_CASE("parseMessage tells whose a message was that it refuses") {
  Message message;
  CHECK_FALSE(Bytes(MessageType::kArm).put<uint64_t>(16, 4711).parse(0, message));
  CHECK(message.inode == 4711);
  CHECK_FALSE(Bytes(MessageType::kArm).resize(12).parse(0, message));
  CHECK(message.inode == 0);
}

TEST_CASE("encodeReply puts each field in its place") {
  const auto bytes = encodeReply({ReplyType::kFailed, 0x01020304, 3, 0x1122334455667788, 12});
  constexpr std::array<uint8_t, kReplyBytes> kExpected{'R',  'P',  'G',  '1',  1,    0,    103,  0,     //
                                                       4,    3,    2,    1,    3,    0,    0,    0,     //
                                                       0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11,  //
                                                       12,   0,    0,    0,    0,    0,    0,    0};
  CHECK(memcmp(bytes.data(), kExpected.data(), kReplyBytes) == 0);
}

constexpr uint64_t kMiB = 1 << 20;
/** Priority 10, 64 MiB, no reservation. */
constexpr Rank kJob{false, 64 * kMiB, 10, kNone, 0, 5};

TEST_CASE("diesBefore goes by what is dying, priority, size and age") {
  Rank other = kJob;
  other.priority = 20;
  CHECK(diesBefore(kJob, other));
  CHECK_FALSE(diesBefore(other, kJob));
  other.dying = true;
  CHECK(diesBefore(other, kJob));
  other = kJob;
  other.diesWith = 65 * kMiB;
  CHECK(diesBefore(other, kJob));
  other = kJob;
  other.id = 6;
  CHECK(diesBefore(other, kJob));
  CHECK_FALSE(diesBefore(kJob, kJob));
}

TEST_CASE("diesBefore takes a job above its reservation before one within it") {
  Rank within = kJob;
  within.priority = 1;
  within.reservation = 64.0 * kMiB;
  CHECK(diesBefore(kJob, within));
  Rank over = within;
  over.reservation = 63.0 * kMiB;
  CHECK(diesBefore(over, within));
  // An overPriority ranks it among those within.
  over.overPriority = 2;
  CHECK(diesBefore(within, over));
  over.overPriority = 0;
  CHECK(diesBefore(over, within));
  CHECK(diesBefore(kJob, over));
}

TEST_CASE("diesBefore leaves what brings nothing back for the end") {
  Rank empty = kJob;
  empty.priority = 0;
  empty.diesWith = kMiB - 1;
  CHECK(diesBefore(kJob, empty));
  CHECK_FALSE(diesBefore(empty, kJob));
}

TEST_CASE("diesBefore is a total order") {
  uint64_t state = 1;
  // The same ones in each run (Knuth's MMIX generator).
  const auto random = [&] { return (state = state * 6364136223846793005 + 1442695040888963407) >> 33; };
  const auto pick = [&](auto... values) {
    const std::array<double, sizeof...(values)> all{static_cast<double>(values)...};
    return all[random() % all.size()];
  };
  std::vector<Rank> ranks;
  for (uint64_t id = 0; id < 60; id++) {
    ranks.push_back({random() % 8 == 0, static_cast<uint64_t>(pick(0, 1000, 2e6, 8e6, 9e6)), pick(0, 1, 10),
                     pick(kNone, kNone, 0, 5), pick(0, 5e6, 1e7, std::numeric_limits<double>::infinity()), id});
  }
  for (const Rank& a : ranks) {
    for (const Rank& b : ranks) {
      REQUIRE(diesBefore(a, b) + diesBefore(b, a) == (a.id == b.id ? 0 : 1));
      for (const Rank& c : ranks) {
        if (diesBefore(a, b) && diesBefore(b, c)) REQUIRE(diesBefore(a, c));
      }
    }
  }
}

}  // namespace
}  // namespace reprieve::guard
