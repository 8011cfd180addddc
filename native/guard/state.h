#pragma once

#include <sys/types.h>

#include <cstdint>
#include <span>

#include "core/fd.h"
#include "record.h"

namespace reprieve::guard {

/**
 * What an instance changed, as it was written down before each change (`files` and `scores` of its directory), and the
 * one way back. A line is cleared once its change is undone, or is nobody's to undo; what cannot be undone yet stays,
 * and may be tried again at any time. Nothing is done twice.
 */
class State {
 public:
  enum Part : unsigned { kWindows = 1, kLimits = 2, kFreezers = 4, kKillers = 8, kScores = 16, kMade = 32, kAll = 63 };
  /** More lines of `files` than these are not looked at, and count as one that is pending. */
  static constexpr size_t kMaxFiles = 32768;

  using Say = void (*)(void* context, const char* line);
  struct Options {
    bool dryRun = false;
    /** One line a change; no end of line in it. */
    Say say = nullptr;
    void* context = nullptr;
    /** How long to wait for waiters to be gone, and to try again what is pending. With 0 it never waits. */
    int settleMs = 0;
    /** Where the handler lives on, it may live in the memcg that it made: only one that it has removed itself is
     * forgotten. */
    bool ownerLives = false;
    /** A recorded memcg that is claimed is another handler's now, and waits until that one has left it. */
    bool sparesClaimed = false;
  };
  struct Counts {
    int restored;
    /** Gone, already as it was, another cgroup now, or changed by somebody else. */
    int skipped;
    int pending;
    int torn;
  };

  /** The directory stays the caller's and must stay open. 0 or an errno; ENOTSUP for another version's state. */
  int open(int directory);

  /** Puts back, in the order of Part whatever their number. Errors of one never stop the others. */
  Counts restore(unsigned parts, const Options& options);
  /** Thaws what we froze and what holds one of these processes; how many cgroups. */
  int thawHolding(std::span<const pid_t> pids, const Options& options);

  /** Whether something that we froze is still written down. */
  bool frozen() const;
  /** A `memory.high` that the handler has lowered is used up: tasks are throttled there. */
  bool braked() const;
  /**
   * Whether more is in use than a limit that is to be put back allows, so that someone has to die first; in the memcg
   * of that inode, or with 0 anywhere.
   */
  bool limitRaised(uint64_t inode) const;
  /** Whether no record is left. Torn lines are none. */
  bool empty() const;

  pid_t ownerPid() const { return pid_; }
  /** False also where `owner` does not tell. */
  bool ownerAlive() const;

  /** Unlinks the files and the directory `name` in `base`. 0 or an errno; ESTALE if it is another directory now. */
  int remove(int base, const char* name);

 private:
  friend class Restorer;
  enum class Found { kHere, kGone, kAnother, kFailed };

  int hierarchyOf(const FileRecord& record) const;
  /** Opens the cgroup of a record, if it is still that one. `number` is an errno where it failed. */
  Found openGroup(const FileRecord& record, Fd& out, int& number) const;
  /** Whether `matches(record, was, wrote, usage)` of a limit of a memcg that is there. */
  template <typename Matches>
  bool anyLimit(Matches matches) const;

  int directory_ = -1;
  pid_t pid_ = 0;
  uint64_t started_ = 0;
  Fd files_;
  Fd scores_;
  Fd memory_;
  Fd freezer_;
  Fd unified_;
};

}  // namespace reprieve::guard
