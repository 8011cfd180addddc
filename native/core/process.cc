#include "process.h"

#include <fcntl.h>
#include <malloc.h>
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

/** V8's pages lie in pieces of 256 KiB, some side by side. What is larger is a thread's stack, or a program's own. */
constexpr size_t kLargest = size_t{2} << 20;
/** A program that has more than this in such pieces is not to be faulted in as a whole. */
constexpr size_t kMost = size_t{32} << 20;

/** V8's optimising compiler takes a few 100 KiB at a time. */
[[maybe_unused]] constexpr int kPad = 1 << 20;

// Since Linux 5.14; Debian 11's headers do not have it.
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

Result<std::string_view> readMaps(ReadBuffer& buffer) {
  const Fd maps(open("/proc/self/maps", O_RDONLY | O_CLOEXEC));
  if (!maps) return lastError("open", "/proc/self/maps");
  const auto text = readWhole(maps.get(), buffer);
  if (!text) return lastError("pread", "/proc/self/maps");
  return *text;
}

/** Calls `visit(range, mode, path)` for each line of a text of /proc/self/maps' form that is whole. */
template <typename Visit>
void forEachMapping(std::string_view maps, Visit visit) {
  while (!maps.empty()) {
    // proc(5): "start-end perms offset dev inode   path"; blanks within the line only before the path.
    const std::string_view line = maps.substr(0, maps.find('\n'));
    maps.remove_prefix(std::min(line.size() + 1, maps.size()));
    const size_t blank = line.find(' ');
    if (blank == std::string_view::npos) continue;
    uintptr_t start = 0;
    uintptr_t end = 0;
    const char* limit = line.data() + blank;
    const auto [dash, first] = std::from_chars(line.data(), limit, start, 16);
    if (first != std::errc() || dash == limit || *dash != '-') continue;
    const auto [stop, second] = std::from_chars(dash + 1, limit, end, 16);
    if (second != std::errc() || stop != limit || end <= start) continue;
    const size_t name = line.find_first_of("/[");
    visit(Range{start, end - start}, line.substr(blank + 1, 4),
          name == std::string_view::npos ? std::string_view() : line.substr(name));
  }
}

}  // namespace

double nowUs() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) * 1e6 + static_cast<double>(now.tv_nsec) / 1e3;
}

ThreadUsage readThreadUsage() {
  rusage usage{};
  getrusage(RUSAGE_THREAD, &usage);
  return {static_cast<double>(usage.ru_minflt), static_cast<double>(usage.ru_majflt),
          static_cast<double>(usage.ru_nvcsw), static_cast<double>(usage.ru_nivcsw)};
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
  forEachMapping(maps, [&](const Range& range, std::string_view mode, std::string_view path) {
    if (mode != "r-xp" && mode != "r--p") return;
    if (!path.starts_with('/') || path.ends_with(" (deleted)")) return;
    if (path.starts_with("/dev/") || path.starts_with("/memfd:")) return;
    ranges.push_back(range);
  });
  return ranges;
}

std::vector<Range> writableRanges(std::string_view maps) {
  std::vector<Range> ranges;
  forEachMapping(maps, [&](const Range& range, std::string_view mode, std::string_view name) {
    if (mode != "rw-p" && mode != "rwxp") return;
    if (name == "[heap]" || range.bytes <= kLargest) ranges.push_back(range);
  });
  return ranges;
}

Result<size_t> populate() {
  // Of nothing, it says whether the kernel knows the advice (madvise_behavior_valid()).
  if (madvise(nullptr, 0, MADV_POPULATE_WRITE) != 0) return lastError("madvise");
  ReadBuffer buffer;
  auto text = readMaps(buffer);
  if (!text) return text.error();
  size_t bytes = 0;
  for (const Range& range : writableRanges(*text)) {
    if (bytes > kMost) break;
    // Fails where another thread has unmapped or protected something of it since the text was made.
    if (madvise(reinterpret_cast<void*>(range.start), range.bytes, MADV_POPULATE_WRITE) == 0) bytes += range.bytes;
  }
  return bytes;
}

void padMalloc() {
#ifdef M_TOP_PAD
  mallopt(M_TOP_PAD, kPad);
  mallopt(M_TRIM_THRESHOLD, 2 * kPad);
#endif
}

Result<TextLock::Outcome> TextLock::lock() {
  ReadBuffer buffer;
  auto text = readMaps(buffer);
  if (!text) return text.error();
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
