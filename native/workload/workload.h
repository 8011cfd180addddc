// reprieve-workload: small, bounded programs that behave like the jobs found on a machine that
// runs out of memory. Used by the demo, the tests and the benchmark.
//
// The loops never allocate in user space and keep their bookkeeping in pages that were touched at
// the start: what is seen under memory pressure is then the behaviour of the mode, not of a heap.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>

namespace workload {

// The live numbers, at offset 0 of the file given with --stats. All slots are little-endian
// uint64; times are CLOCK_MONOTONIC in microseconds.
struct Stats {
  std::atomic<uint64_t> magic;           // [0] kMagic, written last: before it, nothing is valid
  std::atomic<uint64_t> pid;             // [1] of the first process
  std::atomic<uint64_t> iterations;      // [2] chunks, rounds, forks or passes, by mode
  std::atomic<uint64_t> longestStallUs;  // [3] a stall that is still going on is not in here
  std::atomic<uint64_t> stallEndedAtUs;  // [4]
  std::atomic<uint64_t> bytesTouched;    // [5] cumulative, over all processes and threads
  std::atomic<uint64_t> touchBeganAtUs;  // [6] stamped just before the latest page is touched
  std::atomic<uint64_t> errors;          // [7] wrong checksums and refused system calls
  std::atomic<uint64_t> endedAtUs;       // [8] when the latest iteration or touch finished
  std::atomic<uint64_t> refused;         // [9] of the errors: system calls refused, as a full memcg
                                         //     does; whatever is left is damage
};
constexpr uint64_t kMagic = 0x7265707269657665;  // "reprieve"
constexpr size_t kStatsBytes = 4096;
static_assert(sizeof(Stats) == 10 * 8 && std::atomic<uint64_t>::is_always_lock_free);
static_assert(std::endian::native == std::endian::little);

struct JoinList {
  static constexpr size_t kMost = 16;
  const char* paths[kMost];
  size_t count = 0;
};

struct Options {
  JoinList join;
  const char* statsFile = nullptr;
  const char* name = nullptr;
  const char* file = nullptr;
  bool gate = false;
  bool outliveParent = false;
  bool huge = false;
  uint64_t delayUs = 0;
  uint64_t timeoutUs = 60'000'000;
  uint64_t chunk = 256 << 10;
  uint64_t everyUs = 1000;
  uint64_t cap = UINT64_MAX;
  uint64_t processes = 1;
  uint64_t threads = 1;
  uint64_t set = 24 << 20;
  uint64_t scratch = 2 << 20;
  uint64_t pauseUs = 200;
  uint64_t sweep = 0;
  uint64_t bytes = 0;
  uint64_t children = 0;
  uint64_t secondsUs = 0;
};

// The modes. Each returns the exit code, or never.
int leak(const Options&);
int work(const Options&);
int hold(const Options&);
int forkOut(const Options&);
int populate(const Options&);
int stream(const Options&);
int writeOn(const Options&);
int readOn(const Options&);
int stuck(const Options&);

// Never null: an anonymous page stands in when there is no --stats.
extern Stats* stats;

uint64_t nowUs();
void sleepUs(uint64_t us);
[[noreturn]] void rest();  // sleeps until killed

// printf to stdout (say) or stderr (complain). Retries where a full memcg makes a pipe refuse.
[[gnu::format(printf, 1, 2)]] void say(const char* format, ...);
[[gnu::format(printf, 1, 2)]] void complain(const char* format, ...);
[[noreturn]] void fail(const char* what, const char* object);  // with the text of errno; exit 1

// Ties this process to its parent, arms the time limit, opens the stats, joins the cgroups.
void prepare(const Options&);
// To be called by each mode when its setup is done: --gate, then --delay.
void awaitStart(const Options&);

char* mapAnonymous(size_t bytes);  // nullptr on failure
char* mapHuge(size_t bytes);       // the same, where huge pages fit
size_t pageSize();
void stampBefore(uint64_t us);
void noteRefusal();
void noteStall(uint64_t us, uint64_t endedAtUs);
void touch(char* begin, size_t bytes);   // writes to each page, keeping the stats
std::atomic<uint64_t>& sharedCounter();  // one for all processes, starts at 0; call before forking

// fork() with the child tied to its parent and to the time limit again. A `sibling` becomes a
// child of the caller's parent instead: the death of the caller then takes nobody with it.
enum class Kin { child, sibling };
pid_t spawn(Kin);

}  // namespace workload
