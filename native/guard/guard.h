#pragma once

#include <sys/types.h>

#include <cstdint>

#include "account.h"
#include "core/fd.h"
#include "core/process.h"
#include "port.h"
#include "protocol.h"
#include "slots.h"
#include "takeover.h"
#include "tended.h"
#include "words.h"

namespace reprieve::guard {

/**
 * Watches over a handler: hears from it which memcgs are armed, sleeps until one of them is out of memory, and takes
 * over when the handler dies, or does not do its part in time.
 */
class Guard {
 public:
  /** The descriptors that the handler hands over. */
  static constexpr int kSocket = 3;
  static constexpr int kWords = 4;
  static constexpr int kInstance = 5;
  static constexpr int kBase = 6;

  explicit Guard(const Settings& settings);

  /** Until the handler says goodbye or was replaced by us: the exit code. */
  int run();

 private:
  enum class Turn { kGoOn, kBye, kLeave, kDied };

  int open();
  int openHandler();
  Turn hear();
  void obey(const Message& message);
  void arm(const Message& message);
  void tend(const Message& message);
  void obeyTended(TendedScope& scope, MessageType type);
  void plan(const Message& message);
  void refuse(Failure failure, uint64_t inode, int error);
  bool follow(int fd, uint64_t token);

  void advance(int timeoutMs);
  void notice(Slot& slot);
  void startClock(Slot& slot);
  void stopClock(Slot& slot);
  void drop(Slot& slot);
  void lookAround();
  void examine(Slot& slot);
  void lookBelow();
  void lookAtTended();
  bool isUnheardFor(uint32_t respondMs, uint64_t since = 0) const;
  bool countBeats();
  bool isSilent(Slot& slot, const Look& look);
  bool isOverdue(const Slot& slot, const Look& look) const;
  bool isCoveredBelow(const Slot& slot);
  int takeOver(Reason reason, const Cause& cause);

  const Settings settings_;
  Port port_;
  Words words_;
  const Fd instance_;
  const Fd base_;
  Account account_;
  Fd handler_;
  pid_t handlerPid_ = 0;
  bool handlerDied_ = false;
  Fd epoll_;
  Slots slots_;
  Tended tended_;
  uint32_t wakeUps_ = 0;
  ThreadUsage atReady_{};

  // The guard's own clock, see advance(), and when CLOCK_MONOTONIC was read for it.
  uint64_t time_ = 1;
  uint64_t readAt_ = 0;
  uint64_t lookedAt_ = 0;
  uint64_t lookedBelowAt_ = 0;
  unsigned running_ = 0;
  uint32_t beats_ = 0;
  uint64_t beatAt_ = 0;
  /** For which the handler was found silent or overdue; nowhere as long as it was not. */
  Cause cause_;
  Reason reason_ = Reason::kDied;
};

}  // namespace reprieve::guard
