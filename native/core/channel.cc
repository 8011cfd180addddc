#include "channel.h"

#include <sys/socket.h>

#include <array>
#include <cstring>

namespace reprieve {

Result<std::pair<Channel, Fd>> Channel::make() {
  std::array<int, 2> ends{};
  if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends.data()) != 0) return lastError("socketpair");
  Channel channel;
  channel.fd_ = Fd(ends[0]);
  return std::pair(std::move(channel), Fd(ends[1]));
}

Result<void> Channel::send(std::span<const uint8_t> message, std::span<const int> descriptors) const {
  if (descriptors.size() > kMostDescriptors) return Error{EINVAL, "sendmsg", {}};
  iovec part{const_cast<uint8_t*>(message.data()), message.size()};
  msghdr header{};
  header.msg_iov = &part;
  header.msg_iovlen = 1;
  alignas(cmsghdr) std::array<char, CMSG_SPACE(kMostDescriptors * sizeof(int))> control{};
  if (!descriptors.empty()) {
    header.msg_control = control.data();
    header.msg_controllen = CMSG_SPACE(descriptors.size_bytes());
    cmsghdr* rights = CMSG_FIRSTHDR(&header);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(descriptors.size_bytes());
    std::memcpy(CMSG_DATA(rights), descriptors.data(), descriptors.size_bytes());
  }
  if (sendmsg(fd_.get(), &header, MSG_DONTWAIT | MSG_NOSIGNAL) < 0) return lastError("sendmsg");
  return {};
}

Result<std::optional<size_t>> Channel::receive(std::span<uint8_t> buffer) const {
  const ssize_t length = recv(fd_.get(), buffer.data(), buffer.size(), MSG_DONTWAIT);
  if (length >= 0) return std::optional(static_cast<size_t>(length));
  // The peer was killed with messages of ours unread.
  if (errno == ECONNRESET) return std::optional<size_t>(0);
  if (errno == EAGAIN || errno == EINTR) return std::optional<size_t>();
  return lastError("recv");
}

}  // namespace reprieve
