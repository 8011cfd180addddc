#pragma once

#include <sys/types.h>

#include <array>
#include <cstdint>
#include <string_view>

#include "account.h"
#include "core/process.h"
#include "port.h"
#include "protocol.h"
#include "record.h"
#include "slots.h"
#include "state.h"
#include "words.h"

namespace reprieve::guard {

/** How a guard was started. */
struct Settings {
  /** What the guard has for its own ladder before the kernel gets its turn. */
  uint32_t withinMs;
  /** How much later than promised the handler may be. */
  uint32_t silenceMs;
  /** End a handler that is there but does not act. */
  bool killHandler;
  const char* instance;
};

/** Where it began: a memcg by its inode, or a tended scope by its number; 0 where it was nowhere. */
struct Cause {
  uint64_t id = 0;
  std::string_view path;
};

/** What a takeover works on; all of it stays the guard's. */
struct Scene {
  const Settings& settings;
  Slots& slots;
  const Words& words;
  const Port& port;
  Account& account;
  int handler;
  pid_t handlerPid;
  int instance;
  int base;
  /** The guard's when it was ready: no page fault has come since, or its memory was not locked. */
  const ThreadUsage& atReady;
  /** There are scopes where nobody parks. */
  bool tends;
};

/** Whether jobs stand frozen that this instance froze. */
bool holdsFrozen(int instance);
/** The same, or tasks are throttled at a `memory.high` that it has lowered. */
bool holdsSomebody(int instance);

/**
 * What the guard does in place of a handler that cannot: who was announced dies, one after the other, while that is
 * needed; then the kernel gets the memcgs, and everything else is put back as it was.
 */
class Takeover {
 public:
  explicit Takeover(const Scene& scene) : scene_(scene) {}

  /** The exit code. */
  int run(Reason reason, const Cause& cause);

 private:
  void revoke(Reason reason, const Cause& cause);
  bool handlerGone(uint64_t waitUs) const;

  void climb();
  bool step(Slot& slot);
  bool needsVictim(const Slot& slot, const Look& look) const;
  bool strike(Slot& slot);
  void follow(Slot& slot);
  void thaw(size_t pids);
  void readHeld();

  bool somebodyWaits();
  void release();
  bool handOver(Slot& slot, const Look& look);
  bool settle(Slot& slot);
  void awaitWaiters(uint64_t mostUs);
  void putBackRest();
  void awaitParked();
  void finish();

  State::Counts putBack(unsigned parts, int settleMs = 0);
  Line lineOn(const Slot& slot, std::string_view before) const;
  void noteFailure(std::string_view what, int error);

  // A fork bomb has more, which are signalled as well: these only tell which frozen cgroups hold a victim.
  static constexpr size_t kMostPids = 256;

  const Scene scene_;
  State state_;
  bool hasState_ = false;
  uint64_t begun_ = 0;
  /** The handler is gone or will soon be. */
  bool ends_ = false;
  bool ownerLives_ = false;
  /** There is nobody left to kill, or no time for it. */
  bool exhausted_ = false;
  // What the handler did and is not undone yet: jobs frozen; a limit raised, and more in use than it goes back to.
  bool frozen_ = false;
  bool raised_ = false;
  uint64_t heldReadAt_ = 0;
  /** Memcgs in which nobody can be killed. */
  unsigned parked_ = 0;
  int restored_ = 0;
  int pending_ = 0;
  Line killed_;
  std::array<pid_t, kMostPids> pids_{};
};

}  // namespace reprieve::guard
