// leak: maps anonymous memory and writes to every page of it, chunk by chunk, for ever or up to a
// cap; by any number of processes and threads.
#include <limits.h>
#include <pthread.h>
#include <sys/wait.h>

#include <algorithm>
#include <cerrno>

#include "workload.h"

namespace workload {

namespace {

struct Leaker {
  const Options& options;
  // Claimed before it is touched, so that the cap holds over all processes and threads.
  std::atomic<uint64_t>& claimed;
};

[[noreturn]] void leakOn(const Leaker& leaker) {
  const Options& options = leaker.options;
  for (;;) {
    const uint64_t before = leaker.claimed.fetch_add(options.chunk);
    if (before >= options.cap) rest();
    const size_t size = std::min(options.chunk, options.cap - before);
    char* chunk;
    while ((chunk = options.huge ? mapHuge(size) : mapAnonymous(size)) ==
           nullptr) {  // the kernel's part did not fit either
      noteRefusal();
      sleepUs(1000);
    }
    touch(chunk, size);
    ++stats->iterations;
    sleepUs(options.everyUs);
  }
}

[[noreturn]] void leakByThreads(const Leaker& leaker) {
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, std::max<size_t>(64 << 10, PTHREAD_STACK_MIN));
  for (uint64_t i = 1; i < leaker.options.threads; ++i) {
    pthread_t thread;
    errno = pthread_create(
        &thread, &attributes, [](void* argument) -> void* { leakOn(*static_cast<const Leaker*>(argument)); },
        const_cast<Leaker*>(&leaker));
    if (errno != 0) fail("cannot start", "a thread");
  }
  leakOn(leaker);
}

}  // namespace

int leak(const Options& options) {
  const Leaker leaker{options, sharedCounter()};
  awaitStart(options);
  if (options.processes == 1) leakByThreads(leaker);

  for (uint64_t i = 0; i < options.processes; ++i) {
    const pid_t pid = spawn(Kin::child);
    if (pid == 0) leakByThreads(leaker);
    if (pid < 0) fail("cannot fork", "a leaking process");
  }
  while (wait(nullptr) > 0 || errno == EINTR) {  // until somebody has killed them all
  }
  return 0;
}

}  // namespace workload
