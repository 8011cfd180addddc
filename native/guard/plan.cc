#include "plan.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <poll.h>
#include <sys/stat.h>
#include <sys/vfs.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <csignal>

#include "core/pidfd.h"

namespace reprieve::guard {
namespace {

/** Less than this is not worth a death: even a job that only fills the page cache has stacks and heaps. */
constexpr uint64_t kWorthKilling = 1 << 20;

/** The number after `key` at the start of a line; 0 where there is none. */
uint64_t fieldOf(std::string_view text, std::string_view key) {
  while (!text.empty()) {
    std::string_view line = text.substr(0, text.find('\n'));
    text.remove_prefix(std::min(line.size() + 1, text.size()));
    if (!line.starts_with(key)) continue;
    line.remove_prefix(key.size());
    line.remove_prefix(std::min(line.find_first_not_of(" \t"), line.size()));
    uint64_t value = 0;
    std::from_chars(line.data(), line.data() + line.size(), value);
    return value;
  }
  return 0;
}

/** What a memcg uses: `total` with those below, as far as the kernel has summed that up. */
struct Use {
  uint64_t own = 0;
  uint64_t total = 0;
};

Use readUse(int memoryStat) {
  // Too large for the stack of a walk, and only one is read at a time.
  static std::array<char, 4096> buffer;
  const ssize_t got = readSmall(memoryStat, buffer);
  if (got <= 0) return {};
  const std::string_view text(buffer.data(), static_cast<size_t>(got));
  return {fieldOf(text, "rss ") + fieldOf(text, "swap "), fieldOf(text, "total_rss ") + fieldOf(text, "total_swap ")};
}

bool addUse(void* sum, int directory, const char* /*name*/) {
  const Fd memory(openBeneath(directory, "memory.stat", O_RDONLY));
  if (memory) *static_cast<uint64_t*>(sum) += readUse(memory.get()).own;
  return true;
}

uint64_t usedByMemcg(int directory, int memoryStat) {
  const Use use = readUse(memoryStat);
  uint64_t sum = use.own;
  forEachDescendant(directory, addUse, &sum);
  // The kernel's total can be too low for up to two seconds, when a flush of the statistics met a child that grew.
  return std::max(sum, use.total);
}

uint64_t usedByProcess(int status) {
  std::array<char, 4096> buffer;
  const ssize_t got = readSmall(status, buffer);
  if (got <= 0) return 0;
  const std::string_view text(buffer.data(), static_cast<size_t>(got));
  return (fieldOf(text, "RssAnon:") + fieldOf(text, "VmSwap:")) << 10;
}

bool isMemcgOf(int directory, uint64_t inode) {
  struct stat status {};
  struct statfs system {};
  return fstat(directory, &status) == 0 && S_ISDIR(status.st_mode) && status.st_ino == inode &&
         fstatfs(directory, &system) == 0 && system.f_type == CGROUP_SUPER_MAGIC;
}

bool releaseOne(void* /*context*/, pid_t pid) {
  // Whoever got the number of one that has gone meanwhile is not dying, and the kernel refuses (EINVAL).
  if (pid > 0) {
    if (const Fd process = openPidfd(pid)) releaseMemory(process.get());
  }
  return true;
}

Rank rankOf(const Victim& victim, uint64_t diesWith) {
  const PlanEntry& job = victim.job;
  return {job.dying, diesWith, job.priority, job.overPriority, job.reservation, job.id};
}

}  // namespace

int Victim::open(const PlanEntry& entry, Fd descriptor) {
  job = entry;
  struck = false;
  fd = std::move(descriptor);
  if (isMemcg()) {
    if (!isMemcgOf(fd.get(), entry.id)) return EINVAL;
    memory = Fd(openBeneath(fd.get(), "memory.stat", O_RDONLY));
    return 0;
  }
  const Fd process(openProcess(static_cast<pid_t>(entry.pid)));
  memory = Fd(process ? openBeneath(process.get(), "status", O_RDONLY) : -1);
  // Only a pidfd can be asked like this; one that is alive now had the number all the while, so the file is its own.
  return sendSignal(fd.get(), 0);
}

uint64_t Victim::diesWith() const {
  if (!memory) return 0;
  return isMemcg() ? usedByMemcg(fd.get(), memory.get()) : usedByProcess(memory.get());
}

bool Victim::isDead() const { return isMemcg() ? isEmpty(fd.get()) : hasExited(fd.get()); }

Round Victim::kill(std::span<pid_t> pids, size_t& count) const {
  if (isMemcg()) return killRound(fd.get(), pids, count);
  if (hasExited(fd.get())) return {0, 0, 0};
  if (sendSignal(fd.get(), SIGKILL) != 0) return {0, 1, 1};
  const auto pid = static_cast<pid_t>(job.pid);
  const auto known = pids.first(count);
  if (count < pids.size() && std::find(known.begin(), known.end(), pid) == known.end()) pids[count++] = pid;
  return {1, 1, 0};
}

void Victim::release() const {
  if (isMemcg()) {
    forEachProcess(fd.get(), true, releaseOne, nullptr);
  } else {
    releaseMemory(fd.get());
  }
}

bool diesBefore(const Rank& a, const Rank& b) {
  if (a.dying != b.dying) return a.dying;
  // What brings nothing back dies only when nothing else is left.
  const bool worthA = a.diesWith >= kWorthKilling;
  const bool worthB = b.diesWith >= kWorthKilling;
  if (worthA != worthB) return worthA;
  const double overageA = std::max(0.0, static_cast<double>(a.diesWith) - a.reservation);
  const double overageB = std::max(0.0, static_cast<double>(b.diesWith) - b.reservation);
  const bool ownPriorityA = overageA > 0 && !std::isnan(a.overPriority);
  const bool ownPriorityB = overageB > 0 && !std::isnan(b.overPriority);
  // Above its reservation before within it; an overPriority places a job among those within.
  const bool aboveA = overageA > 0 && !ownPriorityA;
  const bool aboveB = overageB > 0 && !ownPriorityB;
  if (aboveA != aboveB) return aboveA;
  const double priorityA = ownPriorityA ? a.overPriority : a.priority;
  const double priorityB = ownPriorityB ? b.overPriority : b.priority;
  if (priorityA != priorityB) return priorityA < priorityB;
  if (overageA != overageB) return overageA > overageB;
  if (a.diesWith != b.diesWith) return a.diesWith > b.diesWith;
  return a.id > b.id;
}

void Plan::clear() {
  for (size_t i = 0; i < count_; i++) victims_[i] = Victim();
  count_ = 0;
}

Victim* Plan::next(int memcg) {
  for (;;) {
    Victim* first = nullptr;
    Rank best{};
    for (size_t i = 0; i < count_; i++) {
      Victim& victim = victims_[i];
      if (victim.struck || victim.isDead()) continue;
      const Rank rank = rankOf(victim, victim.diesWith());
      if (first != nullptr && !diesBefore(rank, best)) continue;
      first = &victim;
      best = rank;
    }
    // Its pidfd is held, so the number is its own as long as it lives.
    if (first == nullptr || first->isMemcg() || isListed(memcg, static_cast<pid_t>(first->job.pid))) return first;
    first->struck = true;
  }
}

}  // namespace reprieve::guard
