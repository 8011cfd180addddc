#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "core/fd.h"
#include "plan.h"
#include "protocol.h"

namespace reprieve::guard {

struct Slot;

/** How a memcg stands now. */
struct Look {
  bool killDisabled = false;
  bool underOom = false;
  /** Its usage is at its limit. Only read while under OOM, which shows in all memcgs below one that is out of memory.
   */
  bool full = false;
  /** The topmost armed memcg above that is full and under OOM itself: it is that one's condition, not this one's. */
  Slot* owner = nullptr;

  /** Tasks of this memcg's own condition wait, and nobody but us would end that. */
  bool waits() const { return mayWait() && owner == nullptr; }
  /** Tasks may wait at this memcg's limit. */
  bool mayWait() const { return underOom && killDisabled && full; }
};

/** What the handler has said of a memcg. */
struct Condition {
  bool open = false;
  /** It may kill nobody, and waits for somebody else. */
  bool parked = false;
  uint64_t since = 0;
};

/** The time for which somebody has waited in a memcg, by the guard's own clock. */
struct Clock {
  bool running = false;
  uint64_t since = 0;
  /** Looks in a row that found nobody waiting. */
  unsigned calm = 0;
  /** Since when it has been full as well; 0: it is not. */
  uint64_t fullSince = 0;
  unsigned notFull = 0;
};

/** How far the guard has come with a memcg that it took over. */
struct Climb {
  enum class Phase { kNone, kWatching, kKilling, kDone };

  Phase phase = Phase::kNone;
  /** Nobody is struck before. */
  uint64_t notBefore = 0;
  uint64_t struckAt = 0;
  uint64_t releaseAt = 0;
  /** Since when nobody has had to die; 0: somebody has to. */
  uint64_t calmSince = 0;
  Victim* victim = nullptr;
};

/** An armed memcg. */
struct Slot {
  uint64_t inode = 0;
  Fd directory;
  Fd control;
  Fd usage;
  Fd limit;
  // Of memory and swap together; closed where swap is not counted.
  Fd bothUsage;
  Fd bothLimit;
  Fd event;
  uint32_t respondMs = 0;
  uint32_t handleMs = 0;
  bool original = false;
  /** The inodes of the memcgs above, the nearest first; of more than these the nearest. */
  std::array<uint64_t, 32> above{};
  Condition condition;
  /** The memcg is the kernel's again. */
  bool handedOver = false;
  Clock clock;
  Climb climb;
  Plan plan;
  std::array<char, kMostPathBytes + 1> path{};

  std::string_view pathText() const { return {path.data()}; }
  /** Opens what is needed of the directory: 0 or an errno, and in `failure` what failed. The event is registered. */
  int open(Fd memcg, const Message& arm, Failure& failure);
  /** Whether the usage is at the limit: 0 or an errno. */
  int readFull(bool& full) const;
};

/** All armed memcgs. Their places never move. */
class Slots {
 public:
  Slots() = default;
  Slots(const Slots&) = delete;
  Slots& operator=(const Slots&) = delete;

  /** Maps more places if none is free; false when there is none afterwards. */
  bool makeRoom();
  Slot* find(uint64_t inode);
  bool empty() const { return free_ == chunks_ * kPerChunk; }
  /** 0 or an errno; ENODEV: the memcg is gone. */
  int look(const Slot& slot, Look& out);
  /** A free place, to be filled at once; null when there is none. */
  Slot* take(uint64_t inode);
  void drop(Slot& slot);
  /** What `indexOf` gave; null when it is free by now. */
  Slot* at(size_t index);
  size_t indexOf(const Slot& slot) const;

  template <typename Visit>
  void forEach(Visit visit) {
    for (size_t i = 0; i < chunks_; i++) {
      for (size_t k = 0; k < kPerChunk; k++) {
        if (chunk_[i]->inodes[k] != 0) visit(chunk_[i]->slots[k]);
      }
    }
  }

 private:
  static constexpr size_t kPerChunk = 16;
  static constexpr size_t kMostChunks = 1024;

  struct Chunk {
    // Apart from the places themselves, so that a search runs through little memory. 0: free.
    std::array<uint64_t, kPerChunk> inodes;
    std::array<Slot, kPerChunk> slots;
  };

  uint64_t* inodeOf(const Slot& slot);

  std::array<Chunk*, kMostChunks> chunk_{};
  size_t chunks_ = 0;
  size_t free_ = 0;
};

}  // namespace reprieve::guard
