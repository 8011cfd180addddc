#include "guard.h"

#include <poll.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>

#include "clock.h"
#include "core/pidfd.h"
#include "hardening.h"
#include "memcg.h"
#include "restorer.h"
#include "state.h"

namespace reprieve::guard {
namespace {

/** How often it looks while somebody waits in a memcg, or a condition is open where nobody parks; else at nothing. */
constexpr uint64_t kLookEvery = 20 * kMillisecond;
/**
 * While nobody waits we are only woken by the handler's heartbeat, once a second. A handler that was not heard for as
 * long as this may have been stopped, and then nobody sees to memcgs that are made below an armed one.
 */
constexpr uint64_t kQuiet = 2 * kSecond;
/** under_oom falls for a moment whenever waiters are woken: once is not enough. */
constexpr unsigned kCalmLooks = 2;
/** Time in which we did not run ourselves counts for no more than this. */
constexpr uint64_t kMostAtOnce = 100 * kMillisecond;
/** Messages heard before the memcgs have their turn. What is left makes the next wait end at once. */
constexpr int kMostHeard = 256;

// What epoll hands back; from kFirstSlot on it is the place of a slot.
constexpr uint64_t kSocketToken = 0;
constexpr uint64_t kHandlerToken = 1;
constexpr uint64_t kFirstSlot = 2;

}  // namespace

Guard::Guard(const Settings& settings)
    : settings_(settings), port_(Fd(kSocket)), words_(kWords), instance_(kInstance), base_(kBase) {}

int Guard::open() {
  if (!words_) return errno;
  // Who made the socket pair is the handler, whatever became of it since.
  ucred peer{};
  socklen_t size = sizeof peer;
  if (getsockopt(kSocket, SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0) return errno;
  handlerPid_ = peer.pid;
  epoll_ = Fd(epoll_create1(EPOLL_CLOEXEC));
  if (!epoll_ || !follow(kSocket, kSocketToken)) return errno;
  if (const int failed = openHandler(); failed != 0) return failed;
  // So that the first memcgs cost nothing more.
  return slots_.makeRoom() ? 0 : ENOMEM;
}

/** If it is dead already, what it had armed before, with another guard, is ours to put back all the same. */
int Guard::openHandler() {
  handler_ = openPidfd(handlerPid_);
  if (!handler_ && errno != ESRCH) return errno;
  // Its child while the descriptor was opened: so it was alive, and the number was its own.
  handlerDied_ = getppid() != handlerPid_;
  if (handlerDied_) {
    handler_.close();
    return 0;
  }
  return follow(handler_.get(), kHandlerToken) ? 0 : errno;
}

bool Guard::follow(int fd, uint64_t token) {
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.u64 = token;
  return epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) == 0;
}

int Guard::run() {
  if (open() != 0) return 1;
  const uint32_t ready = harden();
  port_.reply({ReplyType::kReady, 0, ready, 0, 0});
  readAt_ = clockUs();
  atReady_ = readThreadUsage();
  for (;;) {
    std::array<epoll_event, 64> events;
    int timeout = static_cast<int>((running_ > 0 || tended_.anyOpen() ? kLookEvery : kQuiet) / kMillisecond);
    if (slots_.empty() && tended_.empty()) timeout = -1;
    if (handlerDied_) timeout = 0;
    const int count = epoll_wait(epoll_.get(), events.data(), static_cast<int>(events.size()), timeout);
    wakeUps_++;
    advance(timeout);
    for (int i = 0; i < count; i++) {
      const uint64_t token = events[static_cast<size_t>(i)].data.u64;
      if (token == kHandlerToken) handlerDied_ = true;
      if (token < kFirstSlot) continue;
      if (Slot* slot = slots_.at(token - kFirstSlot)) notice(*slot);
    }
    // Heard even if it is dead: it may have said goodbye, or who is to die.
    const Turn turn = hear();
    if (turn == Turn::kBye) return 0;
    if (turn == Turn::kLeave) return takeOver(Reason::kLeft, {});
    if (turn == Turn::kDied) return takeOver(Reason::kDied, {});
    lookAround();
    lookAtTended();
    lookBelow();
    if (cause_.id != 0) return takeOver(reason_, cause_);
  }
}

Guard::Turn Guard::hear() {
  for (int i = 0; i < kMostHeard || handlerDied_; i++) {
    Message message;
    switch (port_.receive(message)) {
      case Port::Heard::kNothing:
        return handlerDied_ ? Turn::kDied : Turn::kGoOn;
      case Port::Heard::kEnd:
        return Turn::kDied;
      case Port::Heard::kNonsense:
        refuse(Failure::kBadMessage, message.inode, EBADMSG);
        break;
      case Port::Heard::kMessage:
        if (message.type == MessageType::kBye) return Turn::kBye;
        if (message.type == MessageType::kLeave) return Turn::kLeave;
        obey(message);
        break;
    }
  }
  return Turn::kGoOn;
}

void Guard::obey(const Message& message) {
  if (message.type == MessageType::kArm) return arm(message);
  if (message.type == MessageType::kTend) return tend(message);
  if (message.type == MessageType::kHeartbeat) {
    return port_.reply({ReplyType::kAlive, message.seq, wakeUps_, 0, 0});
  }
  if (TendedScope* scope = tended_.find(message.inode)) return obeyTended(*scope, message.type);
  // Not known: it has vanished, and the handler will find that out.
  Slot* slot = slots_.find(message.inode);
  if (slot == nullptr) return;
  switch (message.type) {
    case MessageType::kPlan:
      return plan(message);
    case MessageType::kOpened:
      slot->condition = {true, false, time_};
      return notice(*slot);
    case MessageType::kParked:
      slot->condition = {true, true, time_};
      return;
    case MessageType::kResolved:
      slot->condition = {};
      stopClock(*slot);
      // The next wait may have begun already, and its signal have been read before this.
      return notice(*slot);
    case MessageType::kDisarm:
      return drop(*slot);
    default:
      return;
  }
}

void Guard::arm(const Message& message) {
  Failure failure{};
  Slot fresh;
  if (const int error = fresh.open(port_.take(0), message, failure); error != 0) {
    return refuse(failure, message.inode, error);
  }
  Slot* slot = slots_.find(message.inode);
  // Armed again: who is to die there and who waits is as before.
  if (slot == nullptr) {
    slot = slots_.makeRoom() ? slots_.take(message.inode) : nullptr;
    if (slot == nullptr) return refuse(Failure::kTooMany, message.inode, ENOSPC);
  } else {
    fresh.plan = std::move(slot->plan);
    fresh.condition = slot->condition;
    fresh.clock = slot->clock;
  }
  *slot = std::move(fresh);
  if (follow(slot->event.get(), kFirstSlot + slots_.indexOf(*slot))) return;
  const int error = errno;
  drop(*slot);
  refuse(Failure::kRegister, message.inode, error);
}

void Guard::tend(const Message& message) {
  // Two of one number could not be told apart by the messages that follow.
  if (slots_.find(message.inode) != nullptr) return refuse(Failure::kBadMessage, message.inode, EEXIST);
  if (!tended_.set(message)) refuse(Failure::kTooMany, message.inode, ENOSPC);
}

void Guard::obeyTended(TendedScope& scope, MessageType type) {
  if (type == MessageType::kDisarm) return tended_.drop(scope);
  if (type == MessageType::kResolved) scope.condition = {};
  const bool parked = type == MessageType::kParked;
  if (type == MessageType::kOpened || parked) scope.condition = {true, parked, time_};
}

void Guard::plan(const Message& message) {
  Slot* slot = slots_.find(message.inode);
  const int failed = slot->plan.set(message, [this](size_t i) { return port_.take(i); });
  if (failed != 0) refuse(Failure::kNotMemcg, message.inode, failed);
}

void Guard::refuse(Failure failure, uint64_t inode, int error) {
  port_.reply({ReplyType::kFailed, 0, static_cast<uint32_t>(failure), inode, static_cast<uint32_t>(error)});
}

/**
 * Brings the clock up to date. It stands still while we do not run ourselves, as when the whole machine was stopped:
 * the handler was as well, and gets its time.
 */
void Guard::advance(int timeoutMs) {
  const uint64_t now = clockUs();
  const uint64_t slept = static_cast<uint64_t>(std::max(0, timeoutMs)) * kMillisecond;
  time_ += std::min(now - readAt_, slept + kMostAtOnce);
  readAt_ = now;
}

/** Somebody may have begun to wait here. */
void Guard::notice(Slot& slot) {
  uint64_t signals = 0;
  [[maybe_unused]] const ssize_t got = read(slot.event.get(), &signals, sizeof signals);
  // Nothing is looked at yet, whether the memcg is still there included: the handler was woken by the same signal, and
  // is on its way. The looks that follow tell.
  startClock(slot);
}

void Guard::startClock(Slot& slot) {
  if (slot.clock.running) return;
  if (running_++ == 0) {
    beats_ = words_.beats();
    beatAt_ = time_;
    lookedAt_ = time_;
  }
  slot.clock = {};
  slot.clock.running = true;
  slot.clock.since = time_;
}

void Guard::stopClock(Slot& slot) {
  if (slot.clock.running) running_--;
  slot.clock = {};
}

void Guard::drop(Slot& slot) {
  stopClock(slot);
  slots_.drop(slot);
}

void Guard::lookAround() {
  if (running_ == 0 || time_ - lookedAt_ < kLookEvery) return;
  lookedAt_ = time_;
  countBeats();
  slots_.forEach([this](Slot& slot) {
    if (slot.clock.running && cause_.id == 0) examine(slot);
  });
}

/** True if the handler's event loop has turned since it was looked at before. */
bool Guard::countBeats() {
  const uint32_t beats = words_.beats();
  if (beats == beats_) return false;
  beats_ = beats;
  beatAt_ = time_;
  return true;
}

void Guard::examine(Slot& slot) {
  Look look;
  const int failed = slots_.look(slot, look);
  if (failed == ENODEV || failed == ENOENT) return drop(slot);
  if (failed != 0) return;
  Clock& clock = slot.clock;
  clock.calm = look.underOom ? 0 : clock.calm + 1;
  if (look.waits()) {
    clock.notFull = 0;
    if (clock.fullSince == 0) clock.fullSince = time_;
  } else if (++clock.notFull >= kCalmLooks) {
    clock.fullSince = 0;
  }
  // While the handler has jobs frozen, under_oom is 0 and they wait all the same.
  if (clock.calm >= kCalmLooks && !slot.condition.open && !holdsFrozen(instance_.get())) return stopClock(slot);
  const bool silent = isSilent(slot, look);
  if (!silent && !isOverdue(slot, look)) return;
  cause_ = {slot.inode, slot.pathText()};
  reason_ = silent ? Reason::kSilent : Reason::kOverdue;
}

bool Guard::isSilent(Slot& slot, const Look& look) {
  const uint64_t within = (uint64_t{slot.respondMs} + settings_.silenceMs) * kMillisecond;
  if (time_ - std::max(slot.clock.since, beatAt_) <= within) return false;
  if (look.underOom && look.killDisabled && look.owner == nullptr) return true;
  if (holdsFrozen(instance_.get())) return true;
  // Nobody waits for it, so there is nothing to take over, yet.
  slot.clock.since = time_;
  return false;
}

bool Guard::isOverdue(const Slot& slot, const Look& look) const {
  const auto& [open, parked, since] = slot.condition;
  // Where nobody may be killed the guard could do nothing either.
  if (parked) return false;
  const uint64_t within = (uint64_t{slot.handleMs} + settings_.silenceMs) * kMillisecond;
  if (look.waits() && slot.clock.fullSince != 0 && time_ - slot.clock.fullSince > within) return true;
  // Who is frozen waits as well, and no under_oom tells of it.
  return open && time_ - since > within && holdsFrozen(instance_.get());
}

bool Guard::isUnheardFor(uint32_t respondMs, uint64_t since) const {
  return time_ - std::max(beatAt_, since) > (uint64_t{respondMs} + settings_.silenceMs) * kMillisecond;
}

/** Where nobody parks only who was frozen, or is throttled, waits for the handler. */
void Guard::lookAtTended() {
  if (cause_.id != 0 || !tended_.anyOpen()) return;
  countBeats();
  const auto isSilent = [this](const TendedScope& scope) {
    return scope.condition.open && isUnheardFor(scope.respondMs, scope.condition.since);
  };
  const auto isOverdue = [this](const TendedScope& scope) {
    const auto& [open, parked, since] = scope.condition;
    return open && !parked && time_ - since > (uint64_t{scope.handleMs} + settings_.silenceMs) * kMillisecond;
  };
  const TendedScope* const silent = tended_.findDue(isSilent);
  const TendedScope* const due = silent != nullptr ? silent : tended_.findDue(isOverdue);
  if (due == nullptr || !holdsSomebody(instance_.get())) return;
  cause_ = {due->id, due->pathText()};
  reason_ = silent != nullptr ? Reason::kSilent : Reason::kOverdue;
}

/** One above it that is armed is looked below of, and so it is seen to. */
bool Guard::isCoveredBelow(const Slot& slot) {
  for (const uint64_t inode : slot.above) {
    const Slot* const above = slots_.find(inode);
    if (above != nullptr && !above->original) return true;
  }
  return false;
}

/**
 * A memcg that is made below an armed one is born with its 1. The handler arms it or writes 0; one that is silent does
 * neither, and nobody is signalled when it runs out of memory. Nor does one thaw what it had frozen.
 */
void Guard::lookBelow() {
  if (cause_.id != 0 || time_ - lookedBelowAt_ < kQuiet) return;
  lookedBelowAt_ = time_;
  if (countBeats()) return;
  State state;
  if (state.open(instance_.get()) != 0) return;
  const bool frozen = state.frozen();
  // Nothing is cleared: the handler lives, and may be in the midst of writing a line.
  const State::Options options{.dryRun = true};
  const Restorer restorer(state, options);
  slots_.forEach([&](Slot& slot) {
    if (cause_.id != 0 || !isUnheardFor(slot.respondMs)) return;
    const bool mayInherit = !slot.original && !isCoveredBelow(slot);
    if (!frozen && (!mayInherit || !restorer.waitsBelow(slot.directory.get()))) return;
    cause_ = {slot.inode, slot.pathText()};
    reason_ = Reason::kSilent;
  });
  if (cause_.id != 0 || !(frozen || state.braked())) return;
  const TendedScope* due = tended_.findDue([this](const TendedScope& scope) { return isUnheardFor(scope.respondMs); });
  if (due == nullptr) return;
  cause_ = {due->id, due->pathText()};
  reason_ = Reason::kSilent;
}

int Guard::takeOver(Reason reason, const Cause& cause) {
  goFirst();
  Takeover takeover({settings_, slots_, words_, port_, account_, handler_.get(), handlerPid_, instance_.get(),
                     base_.get(), atReady_, !tended_.empty()});
  return takeover.run(reason, cause);
}

}  // namespace reprieve::guard
