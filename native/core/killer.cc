#include "killer.h"

#include <fcntl.h>

#include <algorithm>
#include <charconv>
#include <csignal>

namespace reprieve {
namespace {

constexpr size_t kUsual = 64;

}  // namespace

Killer::Killer(std::shared_ptr<EventSet> events, int signal, std::shared_ptr<const SharedWords> words,
               std::shared_ptr<const KeptPidfds> kept)
    : events_(std::move(events)),
      words_(std::move(words)),
      kept_(std::move(kept)),
      signal_(signal),
      token_(events_->takeToken()) {
  members_.reserve(kUsual);
  found_.reserve(kUsual);
  listed_.reserve(kUsual);
  signalled_.reserve(kUsual);
  polled_.reserve(kUsual);
}

// Opened anew each time: a descriptor of v1's cgroup.procs that is kept and read often shows a stale list
// (cgroup_pidlist_start() in kernel/cgroup/cgroup-v1.c).
bool Killer::list(const Directory& directory, const std::string& file) {
  listed_.clear();
  auto fd = directory.openFile(file, O_RDONLY);
  if (!fd) {
    errno = fd.error().number;
    return false;
  }
  ReadBuffer buffer;
  const auto text = readWhole(fd->get(), buffer);
  if (!text) return false;
  for (const char *at = text->data(), *end = at + text->size(); at < end;) {
    pid_t pid = 0;
    const auto [next, problem] = std::from_chars(at, end, pid);
    if (problem == std::errc()) listed_.push_back(pid);
    at = next + 1;
  }
  return true;
}

bool Killer::known(pid_t pid) const {
  return std::any_of(members_.begin(), members_.end(),
                     [pid](const Member& member) { return member.pid == pid && !member.exited; });
}

// Looked at before each one: we may have been stopped after the one before, and the guard has acted since.
int Killer::deal(int pidfd) const {
  if (words_ && words_->revoked()) return ECANCELED;
  return sendSignal(pidfd, signal_);
}

// Whoever is listed under a number that a living process had when its descriptor was opened, and still has, is that
// process: no second listing is needed. ESRCH: nobody is kept under that number, or it is dead and the number
// another's.
int Killer::dealKept(pid_t pid) {
  const int kept = kept_ ? kept_->find(pid) : -1;
  if (kept < 0) return ESRCH;
  const int number = deal(kept);
  if (number != 0) return number;
  Fd pidfd(fcntl(kept, F_DUPFD_CLOEXEC, 0));
  if (pidfd) {
    members_.push_back({pid, std::move(pidfd), false});
  } else {
    unreachable_++;  // it has its signal, but cannot be followed
  }
  return 0;
}

void Killer::markExited() {
  polled_.clear();
  for (const Member& member : members_) polled_.push_back({member.exited ? -1 : member.pidfd.get(), POLLIN, 0});
  if (polled_.empty() || poll(polled_.data(), polled_.size(), 0) <= 0) return;
  for (size_t i = 0; i < polled_.size(); i++) {
    if (polled_[i].revents != 0) members_[i].exited = true;
  }
}

void Killer::follow(const Member& member) {
  signalled_.push_back(member.pid);
  // Where the set is closed or full, alive() still tells the truth.
  static_cast<void>(events_->watchExit(member.pidfd.get(), token_));
}

Result<int> Killer::serve(const Directory& directory, const std::string& file) {
  const auto failure = [&]() -> Result<int> {
    if (errno == ENOENT || errno == ENODEV) return 0;
    return lastError("read", directory.pathOf(file));
  };
  if (!list(directory, file)) return failure();

  found_.clear();
  const size_t first = members_.size();
  const pid_t self = getpid();
  for (const pid_t pid : listed_) {
    if (pid == self || known(pid)) continue;
    const int kept = dealKept(pid);
    if (kept == ECANCELED) return Error{kept, "pidfd_send_signal", directory.pathOf(file)};
    if (kept == 0) continue;
    Fd pidfd = pid > 0 ? openPidfd(pid) : Fd();
    if (pidfd) {
      found_.push_back({pid, std::move(pidfd), false});
    } else if (pid <= 0 || errno != ESRCH) {
      unreachable_++;
    }
  }
  // Followed only now that all of them have it.
  const auto followed = [&] {
    for (size_t i = first; i < members_.size(); i++) follow(members_[i]);
    return static_cast<int>(members_.size() - first);
  };
  if (found_.empty()) return followed();

  // Between the listing and pidfd_open a process may die and its number go to a stranger. Whoever is listed once more,
  // now that the descriptor is held, was in the cgroup under this number or is dead.
  if (!list(directory, file)) {
    auto failed = failure();
    const int count = followed();
    if (failed) return count;
    return failed;
  }
  for (Member& member : found_) {
    if (std::find(listed_.begin(), listed_.end(), member.pid) == listed_.end()) continue;
    const int number = deal(member.pidfd.get());
    if (number == 0) {
      members_.push_back(std::move(member));
    } else if (number == ECANCELED) {
      return Error{number, "pidfd_send_signal", directory.pathOf(file)};
    } else if (number != ESRCH) {
      unreachable_++;
    }
  }
  found_.clear();
  return followed();
}

Result<int> Killer::round(std::span<const Directory* const> directories, const std::string& file) {
  unreachable_ = 0;
  markExited();
  int count = 0;
  std::optional<Error> first;
  for (const Directory* directory : directories) {
    auto served = serve(*directory, file);
    if (served) {
      count += *served;
    } else if (!first) {
      first = std::move(served.error());
    }
  }
  if (first) return std::move(*first);
  return count;
}

Result<int> Killer::signal(const Pidfd& process) {
  markExited();
  // One that has exited and waits for its parent takes a signal as well.
  if (process.pid() == getpid() || known(process.pid()) || process.exited()) return 0;
  Fd pidfd(fcntl(process.descriptor(), F_DUPFD_CLOEXEC, 0));
  if (!pidfd) return lastError("fcntl", "/proc/" + std::to_string(process.pid()));
  const int number = deal(pidfd.get());
  if (number == ESRCH) return 0;
  if (number != 0) return Error{number, "pidfd_send_signal", "/proc/" + std::to_string(process.pid())};
  members_.push_back({process.pid(), std::move(pidfd), false});
  follow(members_.back());
  return 1;
}

int Killer::alive() {
  markExited();
  // Only here, where the caller sees the number: dropped elsewhere, an exit might never be told.
  std::erase_if(members_, [this](const Member& member) {
    if (member.exited) events_->forgetExit(member.pidfd.get());
    return member.exited;
  });
  return static_cast<int>(members_.size());
}

Killer::Release Killer::release() {
  markExited();
  Release result{0, 0};
  for (const Member& member : members_) {
    if (member.exited) continue;
    if (releaseMemory(member.pidfd.get()) == 0) {
      result.reaped++;
    } else {
      result.refused++;
    }
  }
  return result;
}

void Killer::close() {
  closed_ = true;
  // Asked for by name: a duplicated pidfd shares its file, and closing one leaves the file in the set (epoll(7)).
  for (const Member& member : members_) events_->forgetExit(member.pidfd.get());
  members_.clear();
  found_.clear();
}

}  // namespace reprieve
