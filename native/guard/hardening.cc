#include "hardening.h"

#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <csignal>
#include <cstddef>

#include "core/fd.h"
#include "core/process.h"
#include "protocol.h"

#if defined(__SANITIZE_ADDRESS__)
#define REPRIEVE_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define REPRIEVE_ASAN 1
#endif
#endif

// Since Linux 5.9; the number is the same on every architecture.
#ifndef SYS_close_range
#define SYS_close_range 436
#endif

namespace reprieve::guard {
namespace {

/** More of the stack than is ever used: touched now, it is not to be found later. */
constexpr size_t kStackBytes = size_t{96} << 10;

bool lockMemory() {
#ifdef REPRIEVE_ASAN
  return false;  // its shadow is terabytes
#else
  volatile char stack[kStackBytes];
  for (size_t i = 0; i < sizeof stack; i += 1024) stack[i] = 0;
  return mlockall(MCL_CURRENT | MCL_FUTURE) == 0;
#endif
}

bool schedule(uint32_t policy, uint32_t priority, int32_t nice) {
  SchedulingAttributes wanted{};
  wanted.size = sizeof wanted;
  wanted.policy = policy;
  wanted.priority = priority;
  wanted.nice = nice;
  return syscall(SYS_sched_setattr, 0, &wanted, 0) == 0;
}

}  // namespace

void standApart() {
  for (int signal = 1; signal < SIGRTMAX; signal++) {
    // A fault of our own must end us, not go on for ever.
    if (signal == SIGSEGV || signal == SIGBUS || signal == SIGILL || signal == SIGFPE || signal == SIGABRT) continue;
    struct sigaction ignore {};
    ignore.sa_handler = SIG_IGN;
    sigaction(signal, &ignore, nullptr);
  }
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, nullptr);
  setsid();
  [[maybe_unused]] const int moved = chdir("/");
}

void keepDescriptors(int last) {
  rlimit files{};
  if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
  }
  if (syscall(SYS_close_range, last + 1, ~0U, 0) != 0) {
    for (int fd = last + 1; fd < 65536; fd++) close(fd);
  }
  for (int fd = STDERR_FILENO + 1; fd <= last; fd++) fcntl(fd, F_SETFD, FD_CLOEXEC);
  // Whoever reads the handler's output must not wait for us too.
  const int null = open("/dev/null", O_RDWR | O_CLOEXEC);
  for (int fd = STDIN_FILENO; fd <= STDERR_FILENO && null >= 0; fd++) dup2(null, fd);
  if (null > STDERR_FILENO) close(null);
}

uint32_t harden() {
  if (const Fd score{open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC)}) {
    [[maybe_unused]] const ssize_t written = write(score.get(), "-1000", 5);
  }
  uint32_t ready = 0;
  if (lockMemory()) ready |= kMemoryLocked;
  // Beside the handler, not before it: the same signal wakes both, and it would wait for us on its way to the kill. One
  // that never sleeps gives its CPU away all the same, once its time slice is over (sched(7), SCHED_RR).
  if (schedule(SCHED_RR, 1, 0)) {
    ready |= kRealtime;
  } else {
    schedule(SCHED_OTHER, 0, -20);
  }
  return ready;
}

void goFirst() { schedule(SCHED_RR, 2, 0); }

}  // namespace reprieve::guard
