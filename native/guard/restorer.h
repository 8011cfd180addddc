#pragma once

#include <sys/types.h>

#include <array>
#include <cstdint>
#include <span>
#include <string_view>

#include "clock.h"
#include "memcg.h"
#include "record.h"
#include "state.h"

namespace reprieve::guard {

inline constexpr std::string_view kOomControl = "memory.oom_control";

/** Which part of putting back a record is. */
State::Part partOf(const FileRecord& record);
/** ENOENT, or ENODEV of a control file that is open: its cgroup is gone. */
bool isGone(int number);
/** Waiters would spin if they were handed to the kernel: somebody is there, and it may kill none of them. */
bool isParked(int directory, const OomState& state);
/** Who arms a memcg claims its directory: whether somebody does, by another descriptor than this one. */
bool isClaimed(int directory);
/** How much is in use of what `limit` limits: 0 or an errno. */
int readUsage(int directory, std::string_view limit, uint64_t& out);
void addError(Line& line, int number);
/** Between two looks at something that is waited for. */
constexpr uint64_t kStepUs = 20 * kMillisecond;

/** One go over the records. */
class Restorer {
 public:
  Restorer(State& state, const State::Options& options) : state_(state), options_(options) { index(); }

  State::Counts run(unsigned parts);
  int thawHolding(std::span<const pid_t> pids);
  /** Whether tasks wait in a memcg below, made since, which inherited oom_kill_disable; false where that cannot be
   * told. */
  bool waitsBelow(int directory) const;

 private:
  /** A record with the line that its texts lie in. */
  struct Held {
    std::array<char, kFileLine> line;
    FileRecord record;
  };
  /** Changes of one control file, in the order of their lines; more than these are looked at in the next pass. */
  static constexpr size_t kGroup = 16;
  struct Group {
    size_t size = 0;
    std::array<size_t, kGroup> slots;
    std::array<uint64_t, kGroup> was;
    std::array<uint64_t, kGroup> wrote;
  };

  void index();
  bool reload(size_t slot, Held& out) const;
  bool load(size_t slot, Held& out) const;
  bool gather(size_t slot, const FileRecord& record, Group& out) const;
  static size_t chooseTarget(const Group& group, uint64_t current);
  bool isRecorded(uint64_t inode) const;
  bool isHandled(size_t slot) const;

  void say(Line& line) const;
  const char* verb() const { return options_.dryRun ? "would put back" : "put back"; }
  Line begin(const char* did, const FileRecord& record) const;
  void done(const FileRecord& record, std::string_view to);
  void skip(const FileRecord& record, const char* why);
  bool later(const FileRecord& record, const char* why, int number = 0);

  void clear(size_t slot);
  bool settle(const Group& group);
  int change(int fd, const FileRecord& record, std::string_view text) const;
  bool putBack(size_t slot, const Held& held);
  bool putBackHere(size_t slot, const Held& held, const Group& group, int directory);

  size_t pass(State::Part part);
  void sweep(State::Part part);
  void finishKillers(int pendingBefore);
  bool finishKiller(size_t slot, const Held& held);
  bool hasInherited(int directory, Fd& control, OomState& state) const;
  static bool releaseInherited(void* context, int directory, const char* name);
  static bool findWaiting(void* context, int directory, const char* name);
  void poke(int control, OomState& state);

  void restoreScores();
  bool restoreScore(const ScoreRecord& record);
  bool restoreBornSince(const FileRecord& home);
  static bool restoreBorn(void* context, pid_t pid);
  bool giveBack(pid_t pid, int process, int inherited, int was);
  static bool descendsFrom(const ScoreRecord& record, Lineage lineage);
  bool restoreBornHomeless();
  static bool restoreBornHomeless(void* context, pid_t pid);
  bool isRecordedScore(pid_t pid, uint64_t started) const;

  void undoMade(State::Part part);
  bool undoMade(const FileRecord& record);
  int empty(const FileRecord& record, int directory) const;

  State& state_;
  const State::Options& options_;
  State::Counts counts_{0, 0, 0, 0};
  size_t lines_ = 0;
  uint64_t deadline_ = 0;
  /** There is no time left to try again. */
  bool last_ = true;
  /** Tasks waited, or were frozen and may have waited. */
  bool waiters_ = false;
  /** In the pass that tells what stays pending. */
  bool loud_ = true;
};

}  // namespace reprieve::guard
