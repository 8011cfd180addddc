// work: an important service. It keeps a working set and, each round, computes on fresh scratch
// memory: it stalls when its memcg is full, and it finds out when its memory is not what it was.
#include <sys/mman.h>

#include <cerrno>
#include <cinttypes>
#include <csignal>
#include <ctime>

#include "workload.h"

namespace workload {

namespace {

uint64_t mix(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

// The checksum is linear, modulo 2^64: one over scratch words `key * set[i]` is key times the one
// over the set's words. So what to expect of any round follows from one number a block, known
// from the formula that filled the set and not from the memory under test.
uint64_t weight(uint64_t j) { return 2 * j + 1; }

class Service {
 public:
  explicit Service(const Options& options)
      : setWords_(options.set / 8),
        scratchBytes_(options.scratch),
        scratchWords_(options.scratch / 8),
        sweepPages_(options.sweep / pageSize()),
        blocks_(setWords_ > scratchWords_ ? setWords_ / scratchWords_ : 1),
        set_(map(options.set)),
        expected_(map(blocks_ * 8)) {
    const size_t wordsPerPage = pageSize() / 8;
    for (uint64_t i = 0; i < setWords_; ++i) {
      if (i % wordsPerPage == 0) stampBefore(nowUs());
      set_[i] = mix(i);
    }
    stats->bytesTouched += options.set;
    for (uint64_t block = 0; block < blocks_; ++block) {
      uint64_t i = block * scratchWords_;
      for (uint64_t j = 0; j < scratchWords_; ++j) {
        expected_[block] += mix(i) * weight(j);
        if (++i == setWords_) i = 0;
      }
    }
  }

  // False if there was no memory to work on.
  bool round(uint64_t number) {
    auto* scratch = reinterpret_cast<uint64_t*>(mapAnonymous(scratchBytes_));
    if (scratch == nullptr) return false;
    sweep();
    const uint64_t key = mix(number) | 1;
    const uint64_t block = number % blocks_;
    const size_t wordsPerPage = pageSize() / 8;
    uint64_t i = block * scratchWords_;
    for (uint64_t j = 0; j < scratchWords_; ++j) {
      if (j % wordsPerPage == 0) stampBefore(nowUs());
      scratch[j] = key * set_[i];
      if (++i == setWords_) i = 0;
    }
    uint64_t sum = 0;
    for (uint64_t j = 0; j < scratchWords_; ++j) sum += scratch[j] * weight(j);
    if (sum != key * expected_[block]) ++stats->errors;
    while (munmap(scratch, scratchBytes_) != 0) {  // to go on without would be to leak
      noteRefusal();
      sleepUs(1000);
    }
    stats->bytesTouched += scratchBytes_;
    return true;
  }

 private:
  static uint64_t* map(size_t bytes) {
    char* area = mapAnonymous(bytes);
    if (area == nullptr) fail("cannot map", "the working set");
    // Makes it another kind of mapping than scratch, which the kernel would else merge with it:
    // each unmapping had then to split the two, and that is refused (ENOMEM) at a full memcg.
    madvise(area, bytes, MADV_DONTFORK);
    return reinterpret_cast<uint64_t*>(area);
  }

  // Computing on all of a large set takes long. To the kernel, what is read now and then is in use just as well.
  void sweep() {
    const size_t wordsPerPage = pageSize() / 8;
    for (uint64_t page = 0; page < sweepPages_; ++page) {
      static_cast<void>(*static_cast<const volatile uint64_t*>(set_ + swept_));
      swept_ += wordsPerPage;
      if (swept_ >= setWords_) swept_ = 0;
    }
  }

  uint64_t setWords_;
  uint64_t scratchBytes_;
  uint64_t scratchWords_;
  uint64_t sweepPages_;
  uint64_t swept_ = 0;
  uint64_t blocks_;
  uint64_t* set_;
  uint64_t* expected_;
};

// The pause doubles as the place where SIGTERM is taken: blocked elsewhere, it never interrupts.
bool pausedUntilTerminated(const sigset_t& signals, uint64_t us) {
  const timespec time{static_cast<time_t>(us / 1'000'000), static_cast<long>(us % 1'000'000) * 1000};
  return sigtimedwait(&signals, nullptr, &time) == SIGTERM;
}

}  // namespace

int work(const Options& options) {
  Service service(options);
  awaitStart(options);

  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigprocmask(SIG_BLOCK, &signals, nullptr);

  // A stall is the time from the end of one round to the end of the next: it holds the pause and
  // whatever the system made the service wait for, also rounds that found no memory.
  uint64_t last = nowUs();
  for (uint64_t number = 0;; ++number) {
    if (service.round(number)) {
      const uint64_t now = nowUs();
      ++stats->iterations;
      stats->endedAtUs = now;
      noteStall(now - last, now);
      last = now;
    } else {
      noteRefusal();
    }
    if (pausedUntilTerminated(signals, options.pauseUs)) break;
  }
  say("{\"iterations\":%" PRIu64 ",\"longestStallUs\":%" PRIu64 ",\"stallEndedAtUs\":%" PRIu64 ",\"errors\":%" PRIu64
      ",\"refused\":%" PRIu64 "}\n",
      stats->iterations.load(), stats->longestStallUs.load(), stats->stallEndedAtUs.load(), stats->errors.load(),
      stats->refused.load());
  return 0;
}

}  // namespace workload
