#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <limits>
#include <span>

#include "core/fd.h"
#include "lines.h"
#include "restorer.h"

// Putting back oom_score_adj.
namespace reprieve::guard {
namespace {

constexpr uint64_t kNever = std::numeric_limits<uint64_t>::max();
constexpr int kScoreMax = 1000;  // OOM_SCORE_ADJ_MAX of <linux/oom.h>

/** By the raised values of one home: since when a process may have been born with it, and the lowest that it was
 * before. */
struct Raised {
  Restorer* restorer;
  bool failed;
  std::array<uint64_t, 2 * kScoreMax + 1> since;
  std::array<int16_t, 2 * kScoreMax + 1> was;
};

struct Homeless {
  Restorer* restorer;
  bool failed;
};

/** Processes that were given their value in the first of two rounds: what they hold now is not to be looked at again.
 */
std::array<pid_t, 4096> given;
size_t givenCount = 0;

bool isGiven(pid_t pid) {
  const auto known = std::span(given).first(givenCount);
  return std::find(known.begin(), known.end(), pid) != known.end();
}

size_t placeOf(int score) {
  const int place = score + kScoreMax;
  return static_cast<size_t>(place);
}

}  // namespace

bool Restorer::restoreScore(const ScoreRecord& record) {
  const Fd process(openProcess(record.pid));
  uint64_t started = 0;
  int score = 0;
  const bool here = process && readStartTime(process.get(), started) == 0 && started == record.started &&
                    readScoreAdj(process.get(), score) == 0;
  if (!here || score != record.wrote || record.was == record.wrote) {
    counts_.skipped++;
    return true;
  }
  const int number = options_.dryRun ? 0 : writeScoreAdj(process.get(), record.was);
  if (number == ESRCH || isGone(number)) return true;
  Line line;
  line.add(number == 0 ? verb() : "pending").add(": oom_score_adj of process ").addSigned(record.pid).add(": ");
  line.addSigned(record.was);
  if (number == 0) {
    counts_.restored++;
  } else {
    counts_.pending++;
    addError(line.add(", "), number);
  }
  say(line);
  return number == 0;
}

bool Restorer::isRecordedScore(pid_t pid, uint64_t started) const {
  bool found = false;
  forEachScore(state_.scores_.get(), [&](size_t, const ScoreRecord& record) {
    found = record.pid == pid && record.started == started;
    return !found;
  });
  return found;
}

bool Restorer::restoreBorn(void* context, pid_t pid) {
  auto& raised = *static_cast<Raised*>(context);
  Restorer& self = *raised.restorer;
  const Fd process(openProcess(pid));
  int score = 0;
  uint64_t started = 0;
  if (!process || readScoreAdj(process.get(), score) != 0 || std::abs(score) > kScoreMax) return true;
  const uint64_t since = raised.since[placeOf(score)];
  const int was = raised.was[placeOf(score)];
  // One tick of tolerance: both are rounded down.
  if (since == kNever || readStartTime(process.get(), started) != 0 || started + 1 < since) return true;
  if (self.isRecordedScore(pid, started) || isGiven(pid)) return true;
  if (!self.giveBack(pid, process.get(), score, was)) raised.failed = true;
  return true;
}

/** False if it was refused. */
bool Restorer::giveBack(pid_t pid, int process, int inherited, int was) {
  const int number = options_.dryRun ? 0 : writeScoreAdj(process, was);
  if (number != 0) return number == ESRCH || isGone(number);
  if (givenCount < given.size()) given[givenCount++] = pid;
  counts_.restored++;
  Line line;
  line.add(verb()).add(": oom_score_adj of process ").addSigned(pid).add(": ").addSigned(was);
  say(line.add(", for the ").addSigned(inherited).add(" that it inherited"));
  return true;
}

/**
 * Whether a process can be seen to come from the recorded one: that one is still there and above it, or leads its
 * session, whose number nobody else can have as long as the session lives. What has done neither is left alone, as some
 * stranger may have the same value.
 */
bool Restorer::descendsFrom(const ScoreRecord& record, Lineage lineage) {
  const auto startOf = [](pid_t pid, Lineage& out) {
    const Fd process(openProcess(pid));
    return process && readLineage(process.get(), out) == 0;
  };
  Lineage above{};
  if (lineage.session == record.pid && (!startOf(record.pid, above) || above.started == record.started)) return true;
  for (size_t level = 0; level < kMaxDepth && lineage.parent > 1; level++) {
    // A parent is older than its child, or its number has gone to another one meanwhile.
    if (!startOf(lineage.parent, above) || above.started > lineage.started) return false;
    if (lineage.parent == record.pid) return above.started == record.started;
    lineage = above;
  }
  return false;
}

/** One that was born of a process that was raised without a home: as it may be anywhere, its descent has to be seen. */
bool Restorer::restoreBornHomeless(void* context, pid_t pid) {
  auto& homeless = *static_cast<Homeless*>(context);
  Restorer& self = *homeless.restorer;
  const Fd process(openProcess(pid));
  int score = 0;
  Lineage lineage{};
  if (!process || readScoreAdj(process.get(), score) != 0 || readLineage(process.get(), lineage) != 0) return true;
  int was = kScoreMax + 1;
  forEachScore(self.state_.scores_.get(), [&](size_t, const ScoreRecord& record) {
    // One tick of tolerance: both are rounded down.
    if (record.home != 0 || record.wrote != score || record.was == score || lineage.started + 1 < record.raisedAt) {
      return true;
    }
    if (descendsFrom(record, lineage)) was = std::min(was, record.was);
    return true;
  });
  if (was > kScoreMax || self.isRecordedScore(pid, lineage.started) || isGiven(pid)) return true;
  if (!self.giveBack(pid, process.get(), score, was)) homeless.failed = true;
  return true;
}

bool Restorer::restoreBornHomeless() {
  bool any = false;
  forEachScore(state_.scores_.get(), [&](size_t, const ScoreRecord& record) {
    any = record.home == 0 && record.was != record.wrote;
    return !any;
  });
  if (!any) return true;
  Homeless homeless{this, false};
  givenCount = 0;
  int number = 0;
  // Twice, as with those that have a home.
  for (int i = 0; i < (options_.dryRun ? 1 : 2) && number == 0; i++) {
    number = forEachProcess(restoreBornHomeless, &homeless);
  }
  if (number == 0 && !homeless.failed) return true;
  counts_.pending++;
  Line line;
  line.add("pending: ")
      .add(number == 0 ? "a process that inherited oom_score_adj refuses" : "/proc cannot be listed: ");
  if (number != 0) addError(line, number);
  say(line);
  return false;
}

bool Restorer::restoreBornSince(const FileRecord& home) {
  Fd directory;
  int number = 0;
  const State::Found found = state_.openGroup(home, directory, number);
  if (found == State::Found::kFailed) return later(home, "cannot be opened: ", number);
  if (found != State::Found::kHere) return true;
  Raised raised{this, false, {}, {}};
  raised.since.fill(kNever);
  raised.was.fill(kScoreMax);
  bool any = false;
  forEachScore(state_.scores_.get(), [&](size_t, const ScoreRecord& record) {
    if (record.home != home.inode || record.was == record.wrote) return true;
    uint64_t& since = raised.since[placeOf(record.wrote)];
    int16_t& was = raised.was[placeOf(record.wrote)];
    since = std::min(since, record.raisedAt);
    was = std::min(was, static_cast<int16_t>(record.was));
    any = true;
    return true;
  });
  if (!any) return true;
  givenCount = 0;
  // Twice: a child that is forked between the listing and the write to its parent inherits the raised value.
  for (int i = 0; i < (options_.dryRun ? 1 : 2) && number == 0; i++) {
    number = forEachProcess(directory.get(), home.name == "deep", restoreBorn, &raised);
  }
  if (number != 0) return later(home, "its processes cannot be listed: ", number);
  return !raised.failed || later(home, "a process that inherited oom_score_adj refuses");
}

void Restorer::restoreScores() {
  loud_ = true;
  forEachLine(state_.scores_.get(), kScoreLine, [this](size_t slot, std::string_view line) {
    ScoreRecord record{};
    if (parseScoreRecord(line, record)) return true;
    counts_.torn++;
    if (!options_.dryRun) clearLine(state_.scores_.get(), slot, kScoreLine);
    return true;
  });
  bool whole = true;
  forEachScore(state_.scores_.get(), [&](size_t, const ScoreRecord& record) {
    whole = restoreScore(record) && whole;
    return true;
  });
  Held held;
  for (size_t slot = 0; slot < lines_; slot++) {
    if (load(slot, held) && held.record.kind == Kind::kHome) whole = restoreBornSince(held.record) && whole;
  }
  whole = restoreBornHomeless() && whole;
  // As long as one is open all stay: what is to be put back on a home's children is known from all of its records.
  if (!whole || options_.dryRun) return;
  forEachScore(state_.scores_.get(), [this](size_t slot, const ScoreRecord&) {
    clearLine(state_.scores_.get(), slot, kScoreLine);
    return true;
  });
  for (size_t slot = 0; slot < lines_; slot++) {
    if (load(slot, held) && held.record.kind == Kind::kHome) clear(slot);
  }
}

}  // namespace reprieve::guard
