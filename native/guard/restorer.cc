#include "restorer.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bitset>
#include <cerrno>

#include "core/fd.h"
#include "lines.h"

namespace reprieve::guard {
namespace {

// Which lines are in use, and by what, so that records of the same control file are found without reading all of the
// file again for each. Beside the State: only one restore runs at a time.
std::array<uint16_t, State::kMaxFiles> keys;
/** Lines that are done with and not cleared: in a dry run, and between the two steps of an oom_control. */
std::bitset<State::kMaxFiles> handled;

/** Never 0, which stands for a free line. Two that differ may have the same: the line itself decides. */
uint16_t keyOf(std::string_view name, uint64_t inode) {
  const uint64_t mixed = (inode + crc32(name)) * 0x9e3779b97f4a7c15U;
  return static_cast<uint16_t>((mixed >> 48) | 1);
}

struct Membership {
  std::span<const pid_t> pids;
  bool found;
};

bool isMember(void* context, pid_t pid) {
  auto& membership = *static_cast<Membership*>(context);
  membership.found = std::find(membership.pids.begin(), membership.pids.end(), pid) != membership.pids.end();
  return !membership.found;
}

/** The file that tells how much of a limit is in use; nullptr where it does not matter. */
const char* usageOf(std::string_view limit) {
  if (limit == "memory.limit_in_bytes") return "memory.usage_in_bytes";
  if (limit == "memory.memsw.limit_in_bytes") return "memory.memsw.usage_in_bytes";
  if (limit == "memory.max" || limit == "memory.high") return "memory.current";
  return nullptr;
}

/** Current value of a control file in parseValue's form. */
int readValue(int fd, std::string_view name, uint64_t& out) {
  if (name == kOomControl) {
    OomState state{};
    const int number = readOomState(fd, state);
    out = state.killDisabled ? 1 : 0;
    return number;
  }
  std::array<char, 64> buffer;
  const ssize_t got = readSmall(fd, buffer);
  if (got < 0) return errno;
  return parseValue(name, {buffer.data(), static_cast<size_t>(got)}, out) ? 0 : EINVAL;
}

}  // namespace

bool isGone(int number) { return number == ENOENT || number == ENODEV; }

State::Part partOf(const FileRecord& record) {
  if (record.kind == Kind::kMade) return record.name == "window" ? State::kWindows : State::kMade;
  if (record.kind == Kind::kHome) return State::kScores;
  if (record.name == kOomControl) return State::kKillers;
  if (record.name == "freezer.state" || record.name == "cgroup.freeze") return State::kFreezers;
  return State::kLimits;
}

bool isParked(int directory, const OomState& state) {
  return state.underOom && !hasKillableTask(directory) && !isEmpty(directory);
}

int readUsage(int directory, std::string_view limit, uint64_t& out) {
  const char* name = usageOf(limit);
  if (name == nullptr) return ENOENT;
  const Fd file(openBeneath(directory, name, O_RDONLY));
  return file ? readNumber(file.get(), out) : errno;
}

void addError(Line& line, int number) {
  switch (number) {
    case EBUSY:
      line.add("busy");
      break;
    case EINVAL:
      line.add("invalid");
      break;
    case EACCES:
    case EPERM:
      line.add("not allowed");
      break;
    case ENOMEM:
      line.add("no memory");
      break;
    default:
      line.add("error");
  }
  line.add(" (errno ").addSigned(number).add(")");
}

void Restorer::index() {
  lines_ = std::min(countLines(state_.files_.get(), kFileLine), State::kMaxFiles);
  std::fill_n(keys.begin(), lines_, 0);
  handled.reset();
  forEachLine(state_.files_.get(), kFileLine, [this](size_t slot, std::string_view line) {
    FileRecord record{};
    if (slot >= lines_) return false;
    if (parseFileRecord(line, record)) {
      keys[slot] = keyOf(record.name, record.inode);
    } else {
      // The change that it was to announce was never made.
      counts_.torn++;
      if (!options_.dryRun) clearLine(state_.files_.get(), slot, kFileLine);
    }
    return true;
  });
}

bool Restorer::reload(size_t slot, Held& out) const {
  return keys[slot] != 0 && parseFileRecord(readLine(state_.files_.get(), slot, out.line), out.record);
}

bool Restorer::load(size_t slot, Held& out) const { return !isHandled(slot) && reload(slot, out); }

bool Restorer::isHandled(size_t slot) const { return handled[slot]; }

/** All changes of the same control file. False if this line is not their first: then they have been looked at. */
bool Restorer::gather(size_t slot, const FileRecord& record, Group& out) const {
  const uint16_t key = keys[slot];
  Held other;
  for (size_t at = 0; at < lines_ && out.size < kGroup; at++) {
    if (keys[at] != key || !load(at, other)) continue;
    const FileRecord& found = other.record;
    if (found.kind != Kind::kFile || found.inode != record.inode || found.name != record.name ||
        found.path != record.path) {
      continue;
    }
    if (at < slot) return false;
    out.slots[out.size] = at;
    parseValue(found.name, found.was, out.was[out.size]);
    parseValue(found.name, found.wrote, out.wrote[out.size]);
    out.size++;
  }
  return true;
}

/**
 * Which of the changes holds the value to put back; the group's size if none made the current value. Back from the one
 * that did, over those that it was based on, to the oldest.
 */
size_t Restorer::chooseTarget(const Group& group, uint64_t current) {
  std::array<bool, kGroup> seen{};
  size_t oldest = group.size;
  for (uint64_t value = current;;) {
    size_t next = 0;
    while (next < group.size && (seen[next] || group.wrote[next] != value)) next++;
    if (next == group.size) return oldest;
    seen[next] = true;
    oldest = next;
    value = group.was[next];
    // There and back again: nobody knows which was first but by the line, and lines are taken from the lowest on.
    if (value == current) return group.was[0] == current ? oldest : 0;
  }
}

bool Restorer::isRecorded(uint64_t inode) const {
  const uint16_t key = keyOf(kOomControl, inode);
  Held held;
  for (size_t slot = 0; slot < lines_; slot++) {
    if (keys[slot] != key || !reload(slot, held)) continue;
    if (held.record.inode == inode && held.record.name == kOomControl) return true;
  }
  return false;
}

void Restorer::say(Line& line) const {
  if (options_.say != nullptr) options_.say(options_.context, line.text());
}

Line Restorer::begin(const char* did, const FileRecord& record) const {
  Line line;
  line.add(did).add(": ");
  if (record.kind == Kind::kFile) line.add(record.name).add(" of ");
  line.add(record.path);
  return line;
}

void Restorer::done(const FileRecord& record, std::string_view to) {
  counts_.restored++;
  Line line = begin(verb(), record);
  say(line.add(": ").add(to));
}

void Restorer::skip(const FileRecord& record, const char* why) {
  counts_.skipped++;
  Line line = begin("left alone", record);
  say(line.add(": ").add(why));
}

bool Restorer::later(const FileRecord& record, const char* why, int number) {
  counts_.pending++;
  if (!loud_) return false;
  Line line = begin("pending", record);
  line.add(": ").add(why);
  if (number != 0) addError(line, number);
  say(line);
  return false;
}

void Restorer::clear(size_t slot) {
  handled[slot] = true;
  if (options_.dryRun) return;
  keys[slot] = 0;
  clearLine(state_.files_.get(), slot, kFileLine);
}

bool Restorer::settle(const Group& group) {
  for (size_t i = 0; i < group.size; i++) clear(group.slots[i]);
  return true;
}

/** The write itself: 0 or an errno. */
int Restorer::change(int fd, const FileRecord& record, std::string_view text) const {
#ifdef REPRIEVE_MUTANT_NO_THAW
  if (partOf(record) == State::kFreezers) return 0;
#endif
  static_cast<void>(record);
  return options_.dryRun ? 0 : writeText(fd, text);
}

/** True if something came of it; false where it was done before, or has to wait. */
bool Restorer::putBack(size_t slot, const Held& held) {
  const FileRecord& record = held.record;
  Group group;
  if (!gather(slot, record, group)) return false;
  Fd directory;
  int number = 0;
  switch (state_.openGroup(record, directory, number)) {
    case State::Found::kHere:
      return putBackHere(slot, held, group, directory.get());
    case State::Found::kGone:
      skip(record, "gone");
      return settle(group);
    case State::Found::kAnother:
      skip(record, "another cgroup has that name now");
      return settle(group);
    case State::Found::kFailed:
      break;
  }
  return later(record, "cannot be opened: ", number);
}

bool Restorer::putBackHere(size_t slot, const Held& held, const Group& group, int directory) {
  const FileRecord& record = held.record;
  const auto given = [&](int number, const char* what) {
    if (!isGone(number)) return later(record, what, number);
    skip(record, "gone");
    return settle(group);
  };
  const std::string_view name = record.name;
  std::array<char, 256> path{};
  if (name.size() >= path.size()) return later(record, "no such file");
  name.copy(path.data(), name.size());
  const Fd file(openBeneath(directory, path.data(), O_RDWR));
  uint64_t current = 0;
  if (!file) return given(errno, "cannot be opened: ");
  if (const int number = readValue(file.get(), name, current); number != 0) return given(number, "cannot be read: ");

  const bool killer = partOf(record) == State::kKillers;
  const size_t chosen = chooseTarget(group, current);
  if (chosen == group.size || group.was[chosen] == current) {
    const bool already = chosen < group.size || std::count(group.was.begin(), group.was.begin() + group.size, current);
    skip(record, already ? "already as it was" : "changed by somebody else");
    // What was born below while it was 1 has still to be seen to.
    if (!killer) return settle(group);
    for (size_t i = 0; i < group.size; i++) handled[group.slots[i]] = true;
    return true;
  }

  Held target;
  const bool own = group.slots[chosen] == slot;
  if (!own && !load(group.slots[chosen], target)) return false;
  const FileRecord& wanted = own ? record : target.record;
  uint64_t usage = 0;
  if ((name == "memory.max" || name == "memory.high") && group.was[chosen] < current) {
    // v2 takes a limit below what is in use, and then kills at once, or throttles.
    if (const int number = readUsage(directory, name, usage); number != 0) return given(number, "no usage: ");
    if (usage > group.was[chosen]) return later(record, "more than that is in use");
  }
  OomState oom{};
  if (killer && options_.sparesClaimed && isClaimed(directory)) return later(record, "another handler has armed it");
  if (killer && group.was[chosen] == 0) {
    if (const int number = readOomState(file.get(), oom); number != 0) return given(number, "cannot be read: ");
    if (isParked(directory, oom)) return later(record, "tasks wait in it, and the kernel may kill none of them");
  }
  if (const int number = change(file.get(), record, wanted.was); number != 0) return given(number, "refused: ");
  done(record, wanted.was);
  waiters_ = waiters_ || oom.underOom || partOf(record) == State::kFreezers;
  if (!killer) return settle(group);
  for (size_t i = 0; i < group.size; i++) handled[group.slots[i]] = true;
  return true;
}

/** How many records got somewhere. */
size_t Restorer::pass(State::Part part) {
  size_t progress = 0;
  Held held;
  for (size_t slot = 0; slot < lines_; slot++) {
    if (!load(slot, held) || held.record.kind != Kind::kFile || partOf(held.record) != part) continue;
    if (putBack(slot, held)) progress++;
  }
  return progress;
}

void Restorer::sweep(State::Part part) {
  const int before = counts_.pending;
  loud_ = false;
  // A limit may wait for another one to be put back first, as v1's two do; so as long as one makes way.
  while (pass(part) > 0) counts_.pending = before;
  loud_ = last_;
  if (counts_.pending > before && last_) {
    counts_.pending = before;
    pass(part);
  }
  if (part == State::kKillers) finishKillers(before);
}

State::Counts Restorer::run(unsigned parts) {
  deadline_ = clockUs();
  if (!options_.dryRun) deadline_ += static_cast<uint64_t>(std::max(0, options_.settleMs)) * kMillisecond;
  // What runs in a window holds what its limit was raised by.
  if ((parts & State::kWindows) != 0) undoMade(State::kWindows);
  const int before = counts_.pending;
  for (;;) {
    last_ = clockUs() >= deadline_;
    counts_.pending = before;
    for (const State::Part part : {State::kLimits, State::kFreezers, State::kKillers}) {
      if ((parts & part) != 0) sweep(part);
    }
    if (counts_.pending == before || last_) break;
    sleepUs(kStepUs);
  }
  // A waiter that was woken makes the kernel choose only when it has run again; until then the scores count.
  if (waiters_ && clockUs() < deadline_) sleepUs(2 * kStepUs);
  if ((parts & State::kScores) != 0) restoreScores();
  if ((parts & State::kMade) != 0) undoMade(State::kMade);
  if (countLines(state_.files_.get(), kFileLine) > State::kMaxFiles) {
    counts_.pending++;
    Line line;
    say(line.add("pending: more records than are looked at"));
  }
  return counts_;
}

int Restorer::thawHolding(std::span<const pid_t> pids) {
  Held held;
  for (size_t slot = 0; slot < lines_; slot++) {
    if (!load(slot, held) || held.record.kind != Kind::kFile || partOf(held.record) != State::kFreezers) continue;
    Fd directory;
    int number = 0;
    Membership membership{pids, false};
    if (state_.openGroup(held.record, directory, number) != State::Found::kHere) continue;
    forEachProcess(directory.get(), true, isMember, &membership);
    if (membership.found) putBack(slot, held);
  }
  return counts_.restored;
}

}  // namespace reprieve::guard
