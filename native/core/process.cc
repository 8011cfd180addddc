#include "process.h"

#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <charconv>
#include <ctime>

#include "control_file.h"
#include "fd.h"
#include "pidfd.h"

namespace reprieve {
namespace {

// SCHED_FLAG_RESET_ON_FORK of <linux/sched.h>, which does not go together with <sched.h>.
constexpr uint64_t kResetOnFork = 1;

}  // namespace

double nowUs() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) * 1e6 + static_cast<double>(now.tv_nsec) / 1e3;
}

Faults readFaults() {
  rusage usage{};
  getrusage(RUSAGE_THREAD, &usage);
  return {static_cast<double>(usage.ru_minflt), static_cast<double>(usage.ru_majflt)};
}

int probeRelease() {
  const Fd self = openPidfd(getpid());
  return self ? releaseMemory(self.get()) : errno;
}

Result<void> Scheduling::raise(Raise to) {
  SchedulingAttributes now{};
  if (syscall(SYS_sched_getattr, 0, &now, sizeof now, 0) != 0) return lastError("sched_getattr");
  SchedulingAttributes wanted{};
  wanted.size = sizeof wanted;
  // Children must not run above everything only because the handler does.
  wanted.flags = kResetOnFork;
  wanted.policy = to == Raise::kRealtime ? SCHED_RR : SCHED_OTHER;
  wanted.priority = to == Raise::kRealtime ? 1 : 0;
  wanted.nice = to == Raise::kNice ? -20 : 0;
  if (syscall(SYS_sched_setattr, 0, &wanted, 0) != 0) return lastError("sched_setattr");
  if (!before_) before_ = now;
  return {};
}

Result<void> Scheduling::restore() {
  if (!before_) return {};
  before_->size = sizeof *before_;
  if (syscall(SYS_sched_setattr, 0, &*before_, 0) != 0) return lastError("sched_setattr");
  before_.reset();
  return {};
}

std::vector<Range> textRanges(std::string_view maps) {
  std::vector<Range> ranges;
  while (!maps.empty()) {
    // proc(5): "start-end perms offset dev inode   path"; blanks within the line only before the path.
    const std::string_view line = maps.substr(0, maps.find('\n'));
    maps.remove_prefix(std::min(line.size() + 1, maps.size()));
    const size_t blank = line.find(' ');
    const size_t slash = line.find('/');
    if (blank == std::string_view::npos || slash == std::string_view::npos) continue;
    const std::string_view mode = line.substr(blank + 1, 4);
    const std::string_view path = line.substr(slash);
    if (mode != "r-xp" && mode != "r--p") continue;
    if (path.ends_with(" (deleted)") || path.starts_with("/dev/") || path.starts_with("/memfd:")) continue;
    uintptr_t start = 0;
    uintptr_t end = 0;
    const char* limit = line.data() + blank;
    const auto [dash, first] = std::from_chars(line.data(), limit, start, 16);
    if (first != std::errc() || dash == limit || *dash != '-') continue;
    const auto [stop, second] = std::from_chars(dash + 1, limit, end, 16);
    if (second != std::errc() || stop != limit || end <= start) continue;
    ranges.push_back({start, end - start});
  }
  return ranges;
}

Result<TextLock::Outcome> TextLock::lock() {
  const Fd maps(open("/proc/self/maps", O_RDONLY | O_CLOEXEC));
  if (!maps) return lastError("open", "/proc/self/maps");
  ReadBuffer buffer;
  const auto text = readWhole(maps.get(), buffer);
  if (!text) return lastError("pread", "/proc/self/maps");
  Outcome outcome{0, 0};
  locked_.clear();
  for (const Range& range : textRanges(*text)) {
    // On fault only: locking at once would read in the whole of a 100 MB program, most of which never runs.
    if (mlock2(reinterpret_cast<void*>(range.start), range.bytes, MLOCK_ONFAULT) == 0) {
      outcome.bytes += range.bytes;
      locked_.push_back(range);
    } else {
      outcome.failed++;
    }
  }
  return outcome;
}

void TextLock::unlock() {
  for (const Range& range : locked_) munlock(reinterpret_cast<void*>(range.start), range.bytes);
  locked_.clear();
}

}  // namespace reprieve
