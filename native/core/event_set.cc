#include "event_set.h"

#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>

#include <algorithm>
#include <array>
#include <cstring>

namespace reprieve {
namespace {

constexpr uint32_t kCreated = IN_CREATE | IN_MOVED_TO;
constexpr uint32_t kRemoved = IN_DELETE | IN_MOVED_FROM;
constexpr uint32_t kWatched = kCreated | kRemoved | IN_ATTRIB | IN_DELETE_SELF | IN_ONLYDIR;

// What epoll hands back: the token, above it how the descriptor is drained, and above that the descriptor.
constexpr unsigned kDrainShift = 32;
constexpr unsigned kDescriptorShift = 34;
int32_t tokenOf(uint64_t data) { return static_cast<int32_t>(data & 0xffffffffU); }
int descriptorOf(uint64_t data) { return static_cast<int>(data >> kDescriptorShift); }

/** kernfs takes the count of what it has notified into the open file whenever it makes the text for it. */
bool readAnew(int fd) {
  std::array<char, 64> ignored;
  ssize_t length;
  do {
    length = pread(fd, ignored.data(), ignored.size(), 0);
  } while (length < 0 && errno == EINTR);
  return length >= 0;
}

}  // namespace

Result<std::shared_ptr<EventSet>> EventSet::create() {
  auto set = std::make_shared<EventSet>();
  set->epoll_ = Fd(epoll_create1(EPOLL_CLOEXEC));
  if (!set->epoll_) return lastError("epoll_create1");
  return set;
}

int32_t EventSet::takeToken() {
  // Ten registrations a second reach the end of the range after six years.
  return ++lastToken_;
}

// The largest descriptor that sysctl_nr_open allows has 30 bits.
uint64_t EventSet::pack(int32_t token, int fd, Drain how) {
  return static_cast<uint64_t>(fd) << kDescriptorShift | static_cast<uint64_t>(how) << kDrainShift |
         static_cast<uint32_t>(token);
}

Result<void> EventSet::add(int fd, uint32_t events, int32_t token, Drain how) {
  epoll_event event{};
  event.events = events;
  event.data.u64 = pack(token, fd, how);
  if (epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0) return lastError("epoll_ctl");
  return {};
}

Result<int32_t> EventSet::addEventfd(Fd eventfd) {
  const int32_t token = takeToken();
  if (auto added = add(eventfd.get(), EPOLLIN, token, Drain::kCounter); !added) return added.error();
  eventfds_.emplace(token, std::move(eventfd));
  return token;
}

Result<int32_t> EventSet::addCgroupEvent(const Directory& directory, const std::string& file,
                                         const std::string& argument) {
  auto watched = directory.openFile(file, O_RDONLY);
  if (!watched) return watched.error();
  auto control = directory.openFile("cgroup.event_control", O_WRONLY);
  if (!control) return control.error();
  Fd event(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  if (!event) return lastError("eventfd", directory.pathOf(file));

  std::string line = std::to_string(event.get()) + ' ' + std::to_string(watched->get());
  if (!argument.empty()) line += ' ' + argument;
  // The event holds the cgroup, not the control file (memcg_write_event_control() in mm/memcontrol-v1.c), so both files
  // may be closed afterwards.
  if (write(control->get(), line.data(), line.size()) < 0) return lastError("write", directory.pathOf(file));

  auto token = addEventfd(std::move(event));
  if (!token) token.error().path = directory.pathOf(file);
  return token;
}

Result<int32_t> EventSet::watchFile(const Directory& directory, const std::string& name) {
  auto file = directory.openFile(name, O_RDONLY);
  if (!file) return file.error();
  // A file that was opened counts as notified until it is read.
  if (!readAnew(file->get())) return lastError("pread", directory.pathOf(name));
  const int32_t token = takeToken();
  if (auto added = add(file->get(), EPOLLPRI, token, Drain::kFile); !added) {
    added.error().path = directory.pathOf(name);
    return added.error();
  }
  files_.emplace(token, std::move(*file));
  return token;
}

Result<int32_t> EventSet::watchDirectory(const Directory& directory) {
  if (!inotify_) {
    Fd inotify(inotify_init1(IN_NONBLOCK | IN_CLOEXEC));
    if (!inotify) return lastError("inotify_init1", directory.path());
    // One shot, armed again by reading: a listener that is not read must not keep the loop busy.
    if (auto added = add(inotify.get(), EPOLLIN | EPOLLONESHOT, kDirectoryToken, Drain::kNot); !added)
      return added.error();
    inotify_ = std::move(inotify);
  }
  // By descriptor, so that a directory renamed or made anew under the same path is not taken for this one.
  const std::string link = "/proc/self/fd/" + std::to_string(directory.descriptor());
  const int watch = inotify_add_watch(inotify_.get(), link.c_str(), kWatched);
  if (watch < 0) {
    Error error = lastError("inotify_add_watch", directory.path());
    if (watchOf_.empty()) inotify_.close();
    return error;
  }
  const int32_t token = takeToken();
  watchOf_.emplace(token, watch);
  tokensOf_.emplace(watch, token);
  return token;
}

bool EventSet::interpret(uint32_t mask, DirectoryEvent& event) const {
  const bool directory = (mask & IN_ISDIR) != 0;
  event.created = directory && (mask & kCreated) != 0;
  event.removed = (directory && (mask & kRemoved) != 0) || (mask & IN_DELETE_SELF) != 0;
  event.attributes = (mask & IN_ATTRIB) != 0;
  return event.created || event.removed || event.attributes;
}

Result<std::vector<DirectoryEvent>> EventSet::readDirectoryEvents() {
  std::vector<DirectoryEvent> events;
  if (!inotify_) return events;
  alignas(inotify_event) std::array<char, 16384> buffer;
  for (;;) {
    const ssize_t length = read(inotify_.get(), buffer.data(), buffer.size());
    if (length < 0 && errno == EINTR) continue;
    if (length < 0 && errno == EAGAIN) break;
    if (length < 0) return lastError("read", "inotify");
    for (const char* at = buffer.data(); at < buffer.data() + length;) {
      inotify_event raw;
      std::memcpy(&raw, at, sizeof raw);
      const char* name = at + sizeof raw;
      at = name + raw.len;
      if ((raw.mask & IN_Q_OVERFLOW) != 0) {
        events.push_back({-1, "", false, false, false, true});
        continue;
      }
      DirectoryEvent event{0, raw.len > 0 ? name : "", false, false, false, false};
      const bool told = interpret(raw.mask, event);
      const auto [first, last] = tokensOf_.equal_range(raw.wd);
      for (auto entry = first; told && entry != last; ++entry) {
        event.token = entry->second;
        events.push_back(event);
      }
      // The kernel has dropped the watch because the directory is gone.
      if ((raw.mask & IN_IGNORED) != 0) {
        for (auto entry = first; entry != last; ++entry) watchOf_.erase(entry->second);
        tokensOf_.erase(first, last);
      }
    }
  }
  if (watchOf_.empty()) {
    inotify_.close();
    return events;
  }
  epoll_event rearm{};
  rearm.events = EPOLLIN | EPOLLONESHOT;
  rearm.data.u64 = pack(kDirectoryToken, inotify_.get(), Drain::kNot);
  if (epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, inotify_.get(), &rearm) != 0) return lastError("epoll_ctl", "inotify");
  return events;
}

void EventSet::trigger(int32_t token) {
  const auto eventfd = eventfds_.find(token);
  // It cannot fail but by an overflow of the counter, and then the eventfd is ready already.
  if (eventfd != eventfds_.end()) eventfd_write(eventfd->second.get(), 1);
}

void EventSet::remove(int32_t token) {
  for (auto* const descriptors : {&eventfds_, &files_}) {
    const auto found = descriptors->find(token);
    if (found == descriptors->end()) continue;
    // Closing is enough unless a child that has not reached its exec yet holds a copy (epoll(7)).
    epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, found->second.get(), nullptr);
    descriptors->erase(found);
    return;
  }
  const auto watch = watchOf_.find(token);
  if (watch == watchOf_.end()) return;
  const int number = watch->second;
  watchOf_.erase(watch);
  const auto [first, last] = tokensOf_.equal_range(number);
  tokensOf_.erase(std::find_if(first, last, [token](const auto& entry) { return entry.second == token; }));
  if (!tokensOf_.contains(number)) inotify_rm_watch(inotify_.get(), number);
  if (watchOf_.empty()) inotify_.close();
}

Result<void> EventSet::watchExit(int pidfd, int32_t token) {
  auto added = add(pidfd, EPOLLIN | EPOLLONESHOT, token, Drain::kNot);
  if (added) others_++;
  return added;
}

void EventSet::forgetExit(int pidfd) {
  if (epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, pidfd, nullptr) == 0) others_--;
}

Result<void> EventSet::watchReadable(int fd, int32_t token) {
  auto added = add(fd, EPOLLIN, token, Drain::kNot);
  if (added) others_++;
  return added;
}

void EventSet::forgetReadable(int fd) { forgetExit(fd); }

void EventSet::makeUnready(uint64_t data) {
  const int fd = descriptorOf(data);
  switch (static_cast<Drain>(data >> kDrainShift & 3)) {
    case Drain::kNot:
      break;
    case Drain::kCounter: {
      uint64_t counter = 0;
      // The counter says nothing ("look now").
      [[maybe_unused]] const ssize_t length = read(fd, &counter, sizeof counter);
      break;
    }
    case Drain::kFile:
      // One that cannot be read any more, as its cgroup is gone, would be ready for ever.
      if (!readAnew(fd)) epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr);
      break;
  }
}

size_t EventSet::drain(std::span<int32_t> ready) {
  std::array<epoll_event, 64> events;
  size_t count = 0;
  while (count < ready.size()) {
    const size_t room = std::min(events.size(), ready.size() - count);
    const int got = epoll_wait(epoll_.get(), events.data(), static_cast<int>(room), 0);
    for (int i = 0; i < got; i++) {
      const uint64_t data = events[static_cast<size_t>(i)].data.u64;
      makeUnready(data);
      const auto end = ready.begin() + static_cast<std::ptrdiff_t>(count);
      if (std::find(ready.begin(), end, tokenOf(data)) == end) ready[count++] = tokenOf(data);
    }
    if (got < static_cast<int>(room)) break;
  }
  return count;
}

void EventSet::close() {
  epoll_.close();
  inotify_.close();
  eventfds_.clear();
  files_.clear();
  watchOf_.clear();
  tokensOf_.clear();
  others_ = 0;
}

}  // namespace reprieve
