#include "port.h"

#include <poll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include <cerrno>
#include <cstring>
#include <span>

namespace reprieve::guard {
namespace {

constexpr size_t kDescriptorBytes = sizeof(int);

}  // namespace

bool Port::ended() const {
  // recvmsg(2) gives 0 for an empty message too, and messages may still stand behind that one.
  pollfd entry{socket_.get(), POLLRDHUP, 0};
  int waiting = 0;
  return poll(&entry, 1, 0) == 1 && (entry.revents & (POLLHUP | POLLRDHUP)) != 0 &&
         (ioctl(socket_.get(), FIONREAD, &waiting) != 0 || waiting == 0);
}

Port::Heard Port::receive(Message& out) {
  for (Fd& descriptor : descriptors_) descriptor.close();
  alignas(cmsghdr) std::array<char, CMSG_SPACE(kMostDescriptors * kDescriptorBytes)> control{};
  iovec part{bytes_.data(), bytes_.size()};
  msghdr header{};
  header.msg_iov = &part;
  header.msg_iovlen = 1;
  header.msg_control = control.data();
  header.msg_controllen = control.size();
  ssize_t got;
  do {
    got = recvmsg(socket_.get(), &header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    // Said once, before what was sent, by a peer that closed without having read all replies.
  } while (got < 0 && (errno == EINTR || errno == ECONNRESET));
  if (got < 0) return errno == EAGAIN ? Heard::kNothing : Heard::kEnd;

  size_t count = 0;
  for (cmsghdr* piece = CMSG_FIRSTHDR(&header); piece != nullptr; piece = CMSG_NXTHDR(&header, piece)) {
    if (piece->cmsg_level != SOL_SOCKET || piece->cmsg_type != SCM_RIGHTS) continue;
    const size_t here = (piece->cmsg_len - CMSG_LEN(0)) / kDescriptorBytes;
    for (size_t i = 0; i < here && count < descriptors_.size(); i++) {
      int descriptor = -1;
      std::memcpy(&descriptor, CMSG_DATA(piece) + i * kDescriptorBytes, kDescriptorBytes);
      descriptors_[count++] = Fd(descriptor);
    }
  }
  if (got == 0 && ended()) return Heard::kEnd;
  const std::span<const std::byte> bytes(bytes_.data(), static_cast<size_t>(got));
  const bool whole = (header.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) == 0;
  return parseMessage(bytes, count, out) && whole ? Heard::kMessage : Heard::kNonsense;
}

void Port::reply(const Reply& reply) const {
  const auto bytes = encodeReply(reply);
  send(socket_.get(), bytes.data(), bytes.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
}

}  // namespace reprieve::guard
