#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>

#include "core/fd.h"
#include "lines.h"
#include "restorer.h"

// The second step of putting back oom_kill_disable: what was born below an armed memcg, and who still waits.
namespace reprieve::guard {
namespace {

struct Inherited {
  Restorer* restorer;
  const FileRecord* above;
  bool pending;
};

struct Waiting {
  const Restorer* restorer;
  bool found;
};

}  // namespace

bool isClaimed(int directory) {
  if (flock(directory, LOCK_SH | LOCK_NB) != 0) return true;
  flock(directory, LOCK_UN);
  return false;
}

/** A memcg that was made below an armed one was born with its 1, and nobody wrote that down. */
bool Restorer::hasInherited(int directory, Fd& control, OomState& state) const {
  struct stat status {};
  control = Fd(openBeneath(directory, kOomControl.data(), O_RDWR));
  if (!control || readOomState(control.get(), state) != 0 || !state.killDisabled) return false;
  return fstat(directory, &status) == 0 && !isRecorded(status.st_ino) && !isClaimed(directory);
}

bool Restorer::findWaiting(void* context, int directory, const char* /*name*/) {
  auto& waiting = *static_cast<Waiting*>(context);
  Fd control;
  OomState state{};
  waiting.found = waiting.restorer->hasInherited(directory, control, state) && state.underOom;
  return !waiting.found;
}

bool Restorer::waitsBelow(int directory) const {
  Waiting waiting{this, false};
  forEachDescendant(directory, findWaiting, &waiting);
  return waiting.found;
}

/** Since Linux 6.5 one that decided to wait just before the 0 can sleep on: another 0 wakes it. */
void Restorer::poke(int control, OomState& state) {
  waiters_ = waiters_ || state.underOom;
  while (state.underOom && !options_.dryRun && clockUs() < deadline_) {
    sleepUs(kStepUs);
    if (writeText(control, "0") != 0 || readOomState(control, state) != 0) break;
  }
}

bool Restorer::releaseInherited(void* context, int directory, const char* name) {
  auto& inherited = *static_cast<Inherited*>(context);
  Restorer& self = *inherited.restorer;
  OomState state{};
  Fd file;
  if (!self.hasInherited(directory, file, state)) return true;
  if (isParked(directory, state)) {
    inherited.pending = true;
    return true;
  }
  const int number = self.change(file.get(), *inherited.above, "0");
  if (number != 0) {
    inherited.pending = inherited.pending || !isGone(number);
    return true;
  }
  self.counts_.restored++;
  Line line = self.begin(self.verb(), *inherited.above);
  self.say(line.add(": 0 in ").add(name).add(" below it, which inherited 1"));
  self.poke(file.get(), state);
  return true;
}

/** The second step of an oom_control, once all that are recorded have their value. */
bool Restorer::finishKiller(size_t slot, const Held& held) {
  Fd directory;
  int number = 0;
  OomState state{};
  const State::Found found = state_.openGroup(held.record, directory, number);
  if (found == State::Found::kFailed) return later(held.record, "cannot be opened: ", number);
  const Fd file(found == State::Found::kHere ? openBeneath(directory.get(), kOomControl.data(), O_RDWR) : -1);
  if (!file || readOomState(file.get(), state) != 0) {
    clear(slot);
    return true;
  }
  // It was 1 before us: what is below has it from then.
  if (state.killDisabled && !options_.dryRun) return true;
  Inherited inherited{this, &held.record, false};
  number = forEachDescendant(directory.get(), releaseInherited, &inherited);
  if (inherited.pending) return later(held.record, "tasks wait below it, and the kernel may kill none of them");
  if (number != 0) return later(held.record, "what is below cannot be listed: ", number);
  poke(file.get(), state);
  clear(slot);
  return true;
}

void Restorer::finishKillers(int pendingBefore) {
  Held held;
  for (size_t slot = 0; slot < lines_; slot++) {
    if (isHandled(slot) && reload(slot, held) && held.record.kind == Kind::kFile && held.record.name == kOomControl) {
      finishKiller(slot, held);
    }
  }
  // The rest says what is to be left alone below those, so it goes last.
  if (counts_.pending > pendingBefore) return;
  for (size_t slot = 0; slot < lines_; slot++) {
    if (reload(slot, held) && held.record.name == kOomControl) clear(slot);
  }
}

}  // namespace reprieve::guard
