#include "takeover.h"

#include <poll.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <span>

#include "clock.h"
#include "core/pidfd.h"
#include "memcg.h"

namespace reprieve::guard {
namespace {

constexpr uint64_t kStep = 5 * kMillisecond;
/** A victim of the handler may just be dying. */
constexpr uint64_t kGrace = 10 * kMillisecond;
/** What a death brings back is not there at once. */
constexpr uint64_t kAfterDeath = 20 * kMillisecond;
constexpr uint64_t kAfterThaw = 30 * kMillisecond;
constexpr uint64_t kLongestDeath = kSecond;
constexpr uint64_t kReleaseEvery = 50 * kMillisecond;
/** under_oom falls for a moment whenever waiters are woken. */
constexpr uint64_t kCleared = 10 * kMillisecond;
/** Waiters with room that were not woken: writing oom_kill_disable wakes them. */
constexpr uint64_t kRoom = 20 * kMillisecond;
constexpr uint64_t kHeldEvery = 20 * kMillisecond;
constexpr uint64_t kPokeEvery = 20 * kMillisecond;
/** So long those are woken again that inherited the setting, and do not wake up. */
constexpr int kPokeMs = 100;
constexpr uint64_t kLongestSettling = kSecond;
constexpr uint64_t kParkedEvery = kSecond;

// The test of the chaos runner: it has to find a guard that leaves this out.
#ifdef REPRIEVE_MUTANT_NO_THAW
constexpr bool kThaws = false;
#else
constexpr bool kThaws = true;
#endif
#ifdef REPRIEVE_MUTANT_NO_RESTORE
constexpr bool kRestores = false;
#else
constexpr bool kRestores = true;
#endif
#ifdef REPRIEVE_MUTANT_NO_KILLS
constexpr bool kKills = false;
#else
constexpr bool kKills = true;
#endif
#ifdef REPRIEVE_MUTANT_NO_RESTRAINT
constexpr bool kSpares = false;
#else
constexpr bool kSpares = true;
#endif

constexpr std::string_view whyActing(Reason reason) {
  switch (reason) {
    case Reason::kDied:
      return " died";
    case Reason::kSilent:
      return " is silent while somebody waits";
    case Reason::kOverdue:
      return " has let somebody wait for too long";
    case Reason::kLeft:
      return " has left the rest to its guard";
  }
  return "";
}

}  // namespace

bool holdsSomebody(int instance) {
  State state;
  return state.open(instance) == 0 && (state.frozen() || state.braked());
}

bool holdsFrozen(int instance) {
  State state;
  return state.open(instance) == 0 && state.frozen();
}

int Takeover::run(Reason reason, const Cause& cause) {
  begun_ = clockUs();
  scene_.account.begin(scene_.settings.instance, scene_.handlerPid, reason, cause.path);
  revoke(reason, cause);
  const int failed = state_.open(scene_.instance);
  hasState_ = failed == 0;
  if (!hasState_) noteFailure("reading what the handler had changed", failed);

  do {
    if (kKills) climb();
    putBack(State::kWindows | State::kLimits);
    // Those that are thawed may use up at once what has come back, and have to try for that to be seen.
    if (putBack(State::kFreezers).restored > 0) sleepUs(kAfterThaw);
  } while (kKills && !exhausted_ && somebodyWaits());
  release();
  awaitWaiters(kLongestSettling);
  putBackRest();
  if (parked_ > 0) awaitParked();
  finish();
  return 0;
}

/** From here on the handler does nothing any more. */
void Takeover::revoke(Reason reason, const Cause& cause) {
  scene_.words.revoke();
  const bool gone = handlerGone(0);
  const bool fails = reason == Reason::kSilent || reason == Reason::kOverdue;
  const bool kills = scene_.settings.killHandler && fails && !gone;
  // Who left may do so at the exit of its process.
  ends_ = kills || !fails;
  const int failed = kills ? sendSignal(scene_.handler, SIGKILL) : 0;
  scene_.port.reply({ReplyType::kActing, 0, static_cast<uint32_t>(reason), cause.id, 0});

  Line line;
  line.add("handler ").add(static_cast<uint64_t>(scene_.handlerPid)).add(whyActing(reason));
  if (kills) line.add("; it is killed");
  if (!gone && !kills && fails) line.add("; it lives, and may not act any more");
  scene_.account.note(line.view());
  if (failed != 0 && failed != ESRCH) noteFailure("killing the handler", failed);
}

bool Takeover::handlerGone(uint64_t waitUs) const {
  // Without a descriptor it was dead before the guard began.
  pollfd entry{scene_.handler, POLLIN, 0};
  return scene_.handler < 0 || poll(&entry, 1, static_cast<int>(waitUs / kMillisecond)) == 1;
}

/** Who was announced dies, in all memcgs at once, as long as that is needed and there is time. */
void Takeover::climb() {
  readHeld();
  if (frozen_ || raised_) {
    // First of all, as far as that is possible: page cache goes by itself when the limit falls, and nobody has to die
    // for it. And only against the true limit it shows whether somebody has to.
    putBack(State::kWindows | State::kLimits);
    heldReadAt_ = 0;
    readHeld();
  }
  bool climbing = false;
  scene_.slots.forEach([&](Slot& slot) {
    Look look;
    if (scene_.slots.look(slot, look) != 0) return;
    if (!look.underOom && !slot.clock.running && !slot.condition.open) return;
    slot.climb.phase = Climb::Phase::kWatching;
    slot.climb.notBefore = begun_ + kGrace;
    slot.climb.calmSince = 0;
    climbing = true;
  });
  const uint64_t until = begun_ + scene_.settings.withinMs * kMillisecond;
  while (climbing && clockUs() < until) {
    if (frozen_ || raised_) readHeld();
    climbing = false;
    scene_.slots.forEach([&](Slot& slot) {
      if (step(slot)) climbing = true;
    });
    if (climbing) sleepUs(kStep);
  }
  if (climbing) scene_.account.note("no time is left to kill anybody: the kernel's turn");
  exhausted_ = exhausted_ || climbing;
}

/** Goes on with one memcg; false when nothing is to be done there, any more. */
bool Takeover::step(Slot& slot) {
  Climb& climb = slot.climb;
  if (climb.phase == Climb::Phase::kNone || climb.phase == Climb::Phase::kDone) return false;
  if (climb.phase == Climb::Phase::kKilling) follow(slot);
  if (climb.phase == Climb::Phase::kKilling) return true;

  Look look;
  if (scene_.slots.look(slot, look) != 0) {
    climb.phase = Climb::Phase::kDone;
    return false;
  }
  const uint64_t now = clockUs();
  // As long as the one above is at it, which may have been calm at first. What is left then is this one's own.
  if (look.owner != nullptr && look.owner->climb.phase != Climb::Phase::kDone) {
    if (look.owner->climb.phase == Climb::Phase::kNone) look.owner->climb.phase = Climb::Phase::kWatching;
    climb.calmSince = 0;
    return true;
  }
  if (needsVictim(slot, look)) {
    climb.calmSince = 0;
    if (now < climb.notBefore || strike(slot)) return true;
    exhausted_ = true;
    scene_.account.note(lineOn(slot, "nobody is left to be killed in ").view());
    climb.phase = Climb::Phase::kDone;
    return false;
  }
  if (climb.calmSince == 0) climb.calmSince = now;
  if (now - climb.calmSince < (look.underOom ? kRoom : kCleared)) return true;
  climb.phase = Climb::Phase::kDone;
  return false;
}

bool Takeover::needsVictim(const Slot& slot, const Look& look) const {
  if (look.waits() || !kSpares) return true;
  // Frozen tasks do not count as waiting. Let go too early, they would use up what the limit was raised by.
  if (!slot.condition.open) return false;
  bool full = false;
  return (raised_ && state_.limitRaised(slot.inode)) || (frozen_ && slot.readFull(full) == 0 && full);
}

/** SIGKILL for who is next there; false when nobody is. */
bool Takeover::strike(Slot& slot) {
  Victim* victim = slot.plan.next(slot.directory.get());
  if (victim == nullptr) return false;
  const uint64_t brings = victim->diesWith();
  victim->struck = true;
  size_t pids = 0;
  const Round round = victim->kill(pids_, pids);
  thaw(pids);
  slot.climb.phase = Climb::Phase::kKilling;
  slot.climb.victim = victim;
  slot.climb.struckAt = clockUs();
  slot.climb.releaseAt = slot.climb.struckAt + kReleaseEvery;

  Line line = lineOn(slot, "in ");
  line.add(": kills ").add(victim->name()).add(" (").add(static_cast<uint64_t>(round.signalled));
  line.add(round.signalled == 1 ? " process, " : " processes, ").add(brings >> 20).add(" MiB)");
  if (round.unreachable > 0) line.add("; not to be reached: ").add(static_cast<uint64_t>(round.unreachable));
  scene_.account.note(line.view());
  killed_.add(killed_.view().empty() ? "" : ", ").add(victim->name());
  return true;
}

/** Until the victim is dead, or takes too long for that. */
void Takeover::follow(Slot& slot) {
  Climb& climb = slot.climb;
  const uint64_t now = clockUs();
  size_t pids = 0;
  // Again and again: it may fork while it is being killed.
  const Round round = climb.victim->kill(pids_, pids);
  const bool dead = round.listed == 0;
  if (!dead && round.listed > round.unreachable && now - climb.struckAt < kLongestDeath) {
    if (now < climb.releaseAt) return;
    climb.releaseAt = now + kReleaseEvery;
    thaw(pids);
    climb.victim->release();
    return;
  }
  Line line = lineOn(slot, "in ");
  line.add(": ").add(climb.victim->name()).add(dead ? " is dead" : " does not die");
  scene_.account.note(line.view());
  climb.phase = Climb::Phase::kWatching;
  climb.notBefore = dead ? now + kAfterDeath : now;
  climb.calmSince = 0;
}

/** A frozen task does not die: lets go of what holds the first `pids` of those just signalled. */
void Takeover::thaw(size_t pids) {
  if (kThaws && hasState_ && frozen_) {
    state_.thawHolding(std::span<const pid_t>(pids_.data(), pids), {});
  }
}

void Takeover::readHeld() {
  const uint64_t now = clockUs();
  if (!hasState_ || (heldReadAt_ != 0 && now - heldReadAt_ < kHeldEvery)) return;
  heldReadAt_ = now;
  frozen_ = state_.frozen();
  raised_ = state_.limitRaised(0);
}

bool Takeover::somebodyWaits() {
  bool waits = false;
  scene_.slots.forEach([&](const Slot& slot) {
    Look look;
    if (!waits && !slot.original) waits = scene_.slots.look(slot, look) == 0 && look.waits();
  });
  return waits;
}

/** Limits are back and jobs thawed: the memcgs are the kernel's again. */
void Takeover::release() {
  scene_.slots.forEach([this](Slot& slot) {
    Look look;
    if (scene_.slots.look(slot, look) == 0 && look.waits() && !slot.original) {
      scene_.account.note(lineOn(slot, "the kernel's turn in ").view());
    }
  });
  // Those below that inherited the setting when they were made as well.
  putBack(State::kKillers, kPokeMs);
  // What stands armed now was not written down, or there is nobody whom the kernel could kill.
  scene_.slots.forEach([this](Slot& slot) {
    Look look;
    if (scene_.slots.look(slot, look) == 0) handOver(slot, look);
  });
  if (const int failed = scene_.account.write(scene_.instance); failed != 0) noteFailure("writing the record", failed);
}

/** Gives a memcg back to the kernel's killer, if it was the kernel's; false as long as that is not possible. */
bool Takeover::handOver(Slot& slot, const Look& look) {
  if (!kRestores || slot.original || !look.killDisabled) {
    slot.handedOver = true;
    return true;
  }
  // With nobody there that the kernel can kill, its waiters would spin for ever.
  if (look.mayWait() && !isEmpty(slot.directory.get()) && !hasKillableTask(slot.directory.get())) {
    strike(slot);
    return false;
  }
  const int failed = writeText(slot.control.get(), "0");
  slot.handedOver = true;
  if (failed == 0) scene_.account.note(lineOn(slot, "put back: oom_kill_disable of ").view());
  if (failed != 0 && failed != ENODEV) noteFailure(lineOn(slot, "writing oom_kill_disable of ").view(), failed);
  return true;
}

/** Sees to it that nobody waits here; false as long as somebody does. */
bool Takeover::settle(Slot& slot) {
  Look look;
  if (scene_.slots.look(slot, look) != 0) {
    slot.handedOver = true;
    return true;
  }
  if (!slot.handedOver) {
    if (slot.climb.phase == Climb::Phase::kKilling) follow(slot);
    if (slot.climb.phase != Climb::Phase::kKilling && clockUs() >= slot.climb.notBefore) handOver(slot, look);
    return false;
  }
  if (!look.underOom || !kRestores) return true;
  if (!slot.original) {
    // Since Linux 6.5 a task that was just about to wait can have missed the first.
    writeText(slot.control.get(), "0");
  } else if (look.killDisabled && !look.full) {
    writeText(slot.control.get(), "0");
    writeText(slot.control.get(), "1");
  }
  // Whoever waits where waiting was wanted before the handler came is not ours to wake.
  return slot.original && look.full;
}

/** Until nobody waits any more; at most so long, but each memcg is seen to once. */
void Takeover::awaitWaiters(uint64_t mostUs) {
  const uint64_t until = clockUs() + mostUs;
  for (;;) {
    bool settled = true;
    parked_ = 0;
    scene_.slots.forEach([&](Slot& slot) {
      if (!settle(slot)) settled = false;
      if (!slot.handedOver) parked_++;
    });
    if (settled || clockUs() >= until) return;
    sleepUs(kPokeEvery);
  }
}

/** What has to wait until the kernel has killed whom it was to kill. */
void Takeover::putBackRest() {
  constexpr uint64_t kSettle = 200 * kMillisecond;
  ownerLives_ = !handlerGone(ends_ ? kLongestSettling : 0);
  // v2's limits have to wait until less is in use, for as long as there would be for killing somebody.
  const uint64_t until = scene_.tends ? begun_ + scene_.settings.withinMs * kMillisecond : 0;
  const uint64_t settle = std::max(kSettle, until - std::min(until, clockUs()));
  pending_ = putBack(State::kAll, static_cast<int>(settle / kMillisecond)).pending;
}

/** Nobody there can be killed, and to let the kernel try would hang a processor: it is said, and looked at again. */
void Takeover::awaitParked() {
  scene_.slots.forEach([this](Slot& slot) {
    if (slot.handedOver) return;
    const Line line =
        lineOn(slot, "ALARM: nobody can be killed, tasks wait until memory comes back or a limit is raised in ");
    scene_.account.note(line.view());
    scene_.account.tellKernel(line.view());
  });
  scene_.account.write(scene_.instance);
  scene_.account.publish(scene_.instance, scene_.base, scene_.settings.instance);
  do {
    sleepUs(kParkedEvery);
    awaitWaiters(0);
  } while (parked_ > 0);
  scene_.account.note("nobody is parked any more");
  awaitWaiters(kLongestSettling);
  putBackRest();
}

void Takeover::finish() {
  const bool gone = handlerGone(0);
  Line line;
  line.add("handler ").add(static_cast<uint64_t>(scene_.handlerPid)).add(" of ").add(scene_.settings.instance);
  line.add(gone ? " is gone; killed: " : " was replaced; killed: ");
  line.add(killed_.view().empty() ? "nobody" : killed_.view());
  line.add("; put back: ").add(static_cast<uint64_t>(restored_));
  line.add("; not possible yet: ").add(static_cast<uint64_t>(pending_));
  scene_.account.note(line.view());
  scene_.account.tellKernel(line.view());
  const ThreadUsage now = readThreadUsage();
  const double since = now.minorFaults - scene_.atReady.minorFaults + now.majorFaults - scene_.atReady.majorFaults;
  Line faults;
  faults.add("page faults of the guard since it was ready: ").add(static_cast<uint64_t>(since));
  scene_.account.note(faults.view());

  int failed = scene_.account.write(scene_.instance);
  if (failed == 0) failed = scene_.account.publish(scene_.instance, scene_.base, scene_.settings.instance);
  if (failed != 0) {
    Line problem;
    problem.add("no record: errno ").add(static_cast<uint64_t>(failed));
    scene_.account.tellKernel(problem.view());
  }
  // What could not be put back stays written down, for the next handler or `restore`.
  if (gone && hasState_ && state_.empty()) state_.remove(scene_.base, scene_.settings.instance);
}

State::Counts Takeover::putBack(unsigned parts, int settleMs) {
  if (!kThaws) parts &= ~static_cast<unsigned>(State::kFreezers);
  if (!kRestores) parts &= State::kFreezers;
  if (!hasState_ || parts == 0) return {};
  State::Options options;
  options.settleMs = settleMs;
  options.ownerLives = ownerLives_;
  options.context = &scene_.account;
  options.say = [](void* account, const char* line) { static_cast<Account*>(account)->note(line); };
  const State::Counts counts = state_.restore(parts, options);
  restored_ += counts.restored;
  return counts;
}

Line Takeover::lineOn(const Slot& slot, std::string_view before) const {
  Line line;
  line.add(before).add(slot.path[0] != '\0' ? slot.pathText() : "a memcg");
  return line;
}

void Takeover::noteFailure(std::string_view what, int error) {
  Line line;
  line.add("FAILED: ").add(what).add(": errno ").add(static_cast<uint64_t>(error));
  scene_.account.note(line.view());
}

}  // namespace reprieve::guard
