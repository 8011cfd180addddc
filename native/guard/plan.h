#pragma once

#include <sys/types.h>

#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "core/fd.h"
#include "memcg.h"
#include "protocol.h"

namespace reprieve::guard {

/** A job that may be killed, with what is needed to look at it and to end it. */
struct Victim {
  /** The directory of a memcg, or a pidfd. */
  Fd fd;
  /** What it uses is read here: memory.stat, or /proc/PID/status. */
  Fd memory;
  PlanEntry job{};
  /** We have sent SIGKILL, or it has left: not to be chosen again. */
  bool struck = false;

  bool isMemcg() const { return job.kind == PlanEntry::Kind::kMemcg; }
  std::string_view name() const { return {job.name.data()}; }

  /** Takes over the descriptor if it is what the entry says: 0 or an errno. */
  int open(const PlanEntry& entry, Fd descriptor);
  /** Bytes that come back when it dies: anonymous memory and swap. 0 when it cannot be told. */
  uint64_t diesWith() const;
  /** Nobody is left to be signalled. */
  bool isDead() const;
  /** SIGKILL to all of it; whom it reached is appended to pids[0..count). */
  Round kill(std::span<pid_t> pids, size_t& count) const;
  /** process_mrelease(2) on all of it. */
  void release() const;
};

/** What of a job counts for its rank. */
struct Rank {
  bool dying;
  uint64_t diesWith;
  double priority;
  double overPriority;
  double reservation;
  uint64_t id;
};

/** True if `a` has to die before `b`: as compareJobs() in src/policy/lowest-priority.ts, with the dying ones first. */
bool diesBefore(const Rank& a, const Rank& b);

/** Who may be killed in a memcg. */
class Plan {
 public:
  void clear();
  /**
   * Takes the place of what was planned. Entries whose descriptor is not what it should be are left out: 0, or the last
   * errno. A process that has gone meanwhile is no error.
   */
  template <typename Take>
  int set(const Message& message, Take take) {
    clear();
    int failed = 0;
    for (size_t i = 0; i < message.planned; i++) {
      const int error = victims_[count_].open(message.plan[i], take(i));
      if (error == 0) {
        count_++;
        continue;
      }
      victims_[count_] = Victim();
      if (error != ESRCH) failed = error;
    }
    return failed;
  }

  /**
   * The next to die by what each uses now, among those alive that were not struck yet; null when there is none. A
   * process has to be in `memcg` still: elsewhere its death would bring nothing back.
   */
  Victim* next(int memcg);

 private:
  std::array<Victim, kMostPlanned> victims_;
  size_t count_ = 0;
};

}  // namespace reprieve::guard
