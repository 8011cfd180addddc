#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "result.h"

namespace reprieve {

/** CLOCK_MONOTONIC in microseconds. */
double nowUs();

/** What held a thread up so far: page faults, and how often it gave its CPU away or lost it. */
struct ThreadUsage {
  double minorFaults;
  double majorFaults;
  double voluntarySwitches;
  double involuntarySwitches;
};

/** That of the calling thread (getrusage(2)). */
ThreadUsage readThreadUsage();

/** The errno of process_mrelease(2) on ourselves: EINVAL where it exists, ENOSYS where not. */
int probeRelease();

enum class Raise { kRealtime, kNice };

/** sched_setattr(2)'s structure in its first version, which every kernel takes. */
struct SchedulingAttributes {
  uint32_t size;
  uint32_t policy;
  uint64_t flags;
  int32_t nice;
  uint32_t priority;
  uint64_t runtime;
  uint64_t deadline;
  uint64_t period;
};

/** The scheduling of one thread: call it from that thread only. */
class Scheduling {
 public:
  /** SCHED_RR 1 or nice -20, for this thread and not for its children; EPERM without CAP_SYS_NICE. */
  Result<void> raise(Raise to);
  /** Back to what was there before the first raise. */
  Result<void> restore();

 private:
  std::optional<SchedulingAttributes> before_;
};

/** A range of addresses that may be locked. */
struct Range {
  uintptr_t start;
  size_t bytes;
};

/** Ranges of program text and constants in a text of /proc/self/maps' form: files mapped r-x or r--. */
std::vector<Range> textRanges(std::string_view maps);

/**
 * Ranges of memory that the program writes, in such a text: malloc's heap, and other private mappings of up to 2 MiB,
 * such as the data of libraries. Stacks of threads are larger, and most of one is never touched.
 */
std::vector<Range> writableRanges(std::string_view maps);

/**
 * Faults in, for writing, what is mapped of writableRanges and not there: pages that V8 and malloc have taken and not
 * touched, and those that are shared with a child since a fork. Changes no contents. EINVAL before Linux 5.14
 * (MADV_POPULATE_WRITE, madvise(2)). How many bytes are there then: a mapping that another thread changes meanwhile is
 * passed over. It goes no further than 32 MiB.
 */
Result<size_t> populate();

/**
 * Has malloc take 1 MiB more than it needs whenever its heap grows, and keep as much: populate() then finds those
 * pages, and what is allocated next grows nothing. For good, and for the whole process; only in glibc (mallopt(3)).
 */
void padMalloc();

/** Keeps the program's text resident once it has been faulted in. */
class TextLock {
 public:
  struct Outcome {
    size_t bytes;
    int failed;
  };
  /** mlock2(MLOCK_ONFAULT) of all textRanges; a range that cannot be locked counts as failed. */
  Result<Outcome> lock();
  /** munlock(2) of what was locked. */
  void unlock();

 private:
  std::vector<Range> locked_;
};

}  // namespace reprieve
