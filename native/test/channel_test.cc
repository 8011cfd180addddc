#include "core/channel.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cstring>
#include <vector>

#include "core/event_set.h"
#include "support.h"

namespace reprieve::test {
namespace {

std::span<const uint8_t> bytesOf(std::string_view text) {
  return {reinterpret_cast<const uint8_t*>(text.data()), text.size()};
}

TEST_CASE_FIXTURE(NoLeaks, "Channel carries whole messages and descriptors, and tells when the peer is gone") {
  auto pair = Channel::make();
  REQUIRE(pair);
  auto& [channel, peer] = *pair;
  const TemporaryDirectory temporary;
  const Directory directory = temporary.open();
  const std::array<int, 2> descriptors{directory.descriptor(), directory.descriptor()};
  CHECK(channel.send(bytesOf("first"), descriptors));
  CHECK(channel.send(bytesOf("second"), {}));

  std::array<char, 64> text{};
  iovec part{text.data(), text.size()};
  alignas(cmsghdr) std::array<char, 256> control{};
  msghdr header{};
  header.msg_iov = &part;
  header.msg_iovlen = 1;
  header.msg_control = control.data();
  header.msg_controllen = control.size();
  REQUIRE(recvmsg(peer.get(), &header, MSG_CMSG_CLOEXEC) == 5);
  const cmsghdr* rights = CMSG_FIRSTHDR(&header);
  REQUIRE(rights != nullptr);
  CHECK(rights->cmsg_len == CMSG_LEN(2 * sizeof(int)));
  std::array<int, 2> got{};
  std::memcpy(got.data(), CMSG_DATA(rights), sizeof got);
  struct stat status {};
  REQUIRE(fstat(got[0], &status) == 0);
  CHECK(status.st_ino == directory.inode());
  for (const int fd : got) close(fd);
  CHECK(recv(peer.get(), text.data(), text.size(), 0) == 6);

  std::array<uint8_t, 16> buffer{};
  auto none = channel.receive(buffer);
  REQUIRE(none);
  CHECK_FALSE(none->has_value());
  CHECK(send(peer.get(), "word", 4, 0) == 4);
  CHECK(**channel.receive(buffer) == 4);
  peer.close();
  CHECK(**channel.receive(buffer) == 0);
  auto sent = channel.send(bytesOf("too late"), {});
  REQUIRE_FALSE(sent);
  CHECK(sent.error().number == EPIPE);
}

TEST_CASE_FIXTURE(NoLeaks, "Channel does not wait for a peer that does not read") {
  auto pair = Channel::make();
  REQUIRE(pair);
  const std::vector<uint8_t> message(1024);
  int number = 0;
  for (int i = 0; i < 10'000 && number == 0; i++) {
    auto sent = pair->first.send(message, {});
    if (!sent) number = sent.error().number;
  }
  CHECK(number == EAGAIN);
  const std::vector<int> many(Channel::kMostDescriptors + 1, pair->second.get());
  auto refused = pair->first.send(message, many);
  REQUIRE_FALSE(refused);
  CHECK(refused.error().number == EINVAL);
}

TEST_CASE_FIXTURE(NoLeaks, "EventSet tells of a channel as long as messages wait") {
  auto set = *EventSet::create();
  auto pair = Channel::make();
  REQUIRE(pair);
  const int32_t token = set->takeToken();
  REQUIRE(set->watchReadable(pair->first.descriptor(), token));
  CHECK(send(pair->second.get(), "word", 4, 0) == 4);
  std::array<uint8_t, 16> buffer{};
  for (int round = 0; round < 2; round++) CHECK(waitReady(*set) == std::vector{token});
  CHECK(pair->first.receive(buffer));
  std::array<int32_t, 4> ready{};
  CHECK(set->drain(ready) == 0);
  pair->second.close();
  CHECK(waitReady(*set) == std::vector{token});
  set->forgetReadable(pair->first.descriptor());
  CHECK(set->size() == 0);
}

}  // namespace
}  // namespace reprieve::test
