#include <fcntl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cinttypes>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>

#include "workload.h"

namespace workload {

Stats* stats;

namespace {

bool tied;            // to the parent, by PR_SET_PDEATHSIG
uint64_t deadlineUs;  // nobody runs beyond it
// How much is touched between two looks at the clock: one fault, or so little of a huge page that a look is no burden.
size_t stretch;

timespec toTimespec(uint64_t us) {
  return {static_cast<time_t>(us / 1'000'000), static_cast<long>(us % 1'000'000) * 1000};
}

void atomicMax(std::atomic<uint64_t>& slot, uint64_t value) {
  uint64_t seen = slot.load(std::memory_order_relaxed);
  while (seen < value && !slot.compare_exchange_weak(seen, value, std::memory_order_relaxed)) {
  }
}

// A pipe whose memcg is full answers ENOMEM for a while: that is no reason to lose a line, the
// time limit bounds the wait.
void writeAll(int fd, const char* text, size_t length) {
  while (length > 0) {
    const ssize_t written = write(fd, text, length);
    if (written > 0) {
      text += written;
      length -= static_cast<size_t>(written);
    } else if (errno == ENOMEM || errno == EAGAIN) {
      sleepUs(1000);
    } else if (errno != EINTR) {
      return;
    }
  }
}

void printTo(int fd, const char* format, va_list arguments) {
  char line[512];
  const int length = vsnprintf(line, sizeof line, format, arguments);
  if (length <= 0) return;
  const size_t most = sizeof line - 1;
  writeAll(fd, line, static_cast<size_t>(length) < most ? static_cast<size_t>(length) : most);
}

// PR_SET_PDEATHSIG tells of a death that comes later; one that came before shows as another
// parent. The limit of time covers a parent that died before `parent` was read.
void tieTo(pid_t parent) {
  if (prctl(PR_SET_PDEATHSIG, SIGKILL) != 0) fail("cannot set", "PR_SET_PDEATHSIG");
  if (getppid() != parent) _exit(1);
}

// A signal frame is written by the kernel. Where that needs a new page at a full memcg it is a
// SIGSEGV instead, so the handler has a stack that is resident and that no fork makes shared.
void handleAlarmOnItsOwnStack() {
  constexpr size_t kBytes = 64 << 10;
  char* area = mapAnonymous(kBytes);
  const stack_t stack{.ss_sp = area, .ss_flags = 0, .ss_size = kBytes};
  if (area == nullptr || madvise(area, kBytes, MADV_DONTFORK) != 0 || sigaltstack(&stack, nullptr) != 0)
    fail("cannot set up", "the signal stack");
  memset(area, 1, kBytes);
  struct sigaction action {};
  action.sa_handler = [](int) { _exit(124); };
  action.sa_flags = SA_ONSTACK;
  sigaction(SIGALRM, &action, nullptr);
}

// A task parked in a full memcg runs no handler: only a fatal signal reaches it. So a timer that
// sends SIGKILL stands one second behind the alarm that exits in an orderly way.
void armTimeLimit() {
  handleAlarmOnItsOwnStack();
  const uint64_t left = deadlineUs - nowUs();
  alarm(static_cast<unsigned>((left + 999'999) / 1'000'000));

  sigevent event{};
  event.sigev_notify = SIGEV_SIGNAL;
  event.sigev_signo = SIGKILL;
  timer_t timer;
  itimerspec when{};
  when.it_value = toTimespec(left + 1'000'000);
  if (timer_create(CLOCK_MONOTONIC, &event, &timer) != 0 || timer_settime(timer, 0, &when, nullptr) != 0)
    fail("cannot arm", "the time limit");
}

void openStats(const char* path) {
  int fd = -1;
  if (path != nullptr) {
    fd = open(path, O_RDWR | O_CLOEXEC);
    struct stat status {};
    if (fd < 0 || fstat(fd, &status) != 0) fail("cannot open the stats file", path);
    // Beyond the end of the file the first store would be a SIGBUS.
    if (status.st_size < static_cast<off_t>(kStatsBytes)) {
      complain("the stats file %s has fewer than %zu bytes", path, kStatsBytes);
      exit(1);
    }
  }
  void* page = mmap(nullptr, kStatsBytes, PROT_READ | PROT_WRITE, MAP_SHARED | (fd < 0 ? MAP_ANONYMOUS : 0), fd, 0);
  if (page == MAP_FAILED) fail("cannot map", path != nullptr ? path : "the stats");
  if (fd >= 0) close(fd);
  memset(page, 0, sizeof(Stats));
  stats = static_cast<Stats*>(page);
  stats->pid = static_cast<uint64_t>(getpid());
  stats->magic.store(kMagic, std::memory_order_release);
}

void joinCgroup(const char* path) {
  char file[4096];
  if (snprintf(file, sizeof file, "%s/cgroup.procs", path) >= static_cast<int>(sizeof file)) {
    errno = ENAMETOOLONG;
    fail("cannot join", path);
  }
  const int fd = open(file, O_WRONLY | O_CLOEXEC);
  if (fd < 0 || write(fd, "0", 1) != 1) fail("cannot join", path);
  close(fd);
}

}  // namespace

uint64_t nowUs() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1'000'000 + static_cast<uint64_t>(now.tv_nsec) / 1000;
}

void sleepUs(uint64_t us) {
  timespec left = toTimespec(us);
  while (us > 0 && nanosleep(&left, &left) != 0 && errno == EINTR) {
  }
}

void rest() {
  for (;;) pause();
}

void say(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  printTo(STDOUT_FILENO, format, arguments);
  va_end(arguments);
}

void complain(const char* format, ...) {
  char text[400];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  char line[448];
  const int length = snprintf(line, sizeof line, "reprieve-workload: %s\n", text);
  writeAll(STDERR_FILENO, line, static_cast<size_t>(length));
}

void fail(const char* what, const char* object) {
  complain("%s %s: %s", what, object, strerror(errno));
  _exit(1);
}

void prepare(const Options& options) {
  const pid_t parent = getppid();
  tied = !options.outliveParent;
  if (tied) tieTo(parent);
  deadlineUs = nowUs() + options.timeoutUs;
  armTimeLimit();
  signal(SIGPIPE, SIG_IGN);
  // One fault is to be one page: a transparent huge page would make "256 KiB a millisecond" a
  // leap of 2 MiB. Inherited by children; a kernel without it has no huge pages to refuse.
  stretch = options.huge ? 256 << 10 : pageSize();
  if (!options.huge) prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0);
  // Before joining: what the stats cost is then not charged to the cgroup under test.
  openStats(options.statsFile);
  for (size_t i = 0; i < options.join.count; ++i) joinCgroup(options.join.paths[i]);
  if (options.name != nullptr) prctl(PR_SET_NAME, options.name);
}

void awaitStart(const Options& options) {
  if (options.gate) {
    say("ready\n");
    char byte;
    while (read(STDIN_FILENO, &byte, 1) < 0 && errno == EINTR) {
    }
  }
  sleepUs(options.delayUs);
}

char* mapAnonymous(size_t bytes) {
  void* area = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return area == MAP_FAILED ? nullptr : static_cast<char*>(area);
}

char* mapHuge(size_t bytes) {
  constexpr uintptr_t kHuge = 2 << 20;
  char* area = mapAnonymous(bytes + kHuge);
  if (area == nullptr) return nullptr;
  // The kernel gives no huge page where its boundaries lie outside of the mapping.
  const size_t before = -reinterpret_cast<uintptr_t>(area) % kHuge;
  if (before > 0) munmap(area, before);
  munmap(area + before + bytes, kHuge - before);
  return area + before;
}

size_t pageSize() {
  static const size_t size = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return size;
}

void stampBefore(uint64_t us) { atomicMax(stats->touchBeganAtUs, us); }

void noteRefusal() {
  ++stats->errors;
  ++stats->refused;
}

void noteStall(uint64_t us, uint64_t endedAtUs) {
  uint64_t longest = stats->longestStallUs.load(std::memory_order_relaxed);
  while (us > longest) {
    if (!stats->longestStallUs.compare_exchange_weak(longest, us)) continue;
    stats->stallEndedAtUs = endedAtUs;
    return;
  }
}

void touch(char* begin, size_t bytes) {
  const size_t step = pageSize();
  uint64_t before = nowUs();
  for (size_t offset = 0; offset < bytes; offset += stretch) {
    stampBefore(before);
    const size_t end = bytes - offset < stretch ? bytes : offset + stretch;
    for (size_t page = offset; page < end; page += step) *reinterpret_cast<volatile uint64_t*>(begin + page) = before;
    const uint64_t after = nowUs();
    stats->endedAtUs.store(after, std::memory_order_relaxed);
    stats->bytesTouched.fetch_add(end - offset, std::memory_order_relaxed);
    noteStall(after - before, after);
    before = after;
  }
}

std::atomic<uint64_t>& sharedCounter() {
  void* page = mmap(nullptr, sizeof(std::atomic<uint64_t>), PROT_READ | PROT_WRITE,
                    MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
  if (page == MAP_FAILED) fail("cannot map", "the shared counter");
  return *static_cast<std::atomic<uint64_t>*>(page);
}

pid_t spawn(Kin kin) {
  const pid_t parent = kin == Kin::sibling ? getppid() : getpid();
  // The bare call: the C library has no fork() with CLONE_PARENT, and nothing here needs its
  // handlers. The flag's value and SIGCHLD are all of the first argument, the others are 0.
  constexpr long kCloneParent = 0x00008000;
  const long flags = SIGCHLD | (kin == Kin::sibling ? kCloneParent : 0);
  const long pid = syscall(SYS_clone, flags, 0, 0, 0, 0);
  if (pid != 0) return static_cast<pid_t>(pid);

  if (tied) tieTo(parent);
  // Alarms and timers are not inherited. By default SIGALRM is fatal, so it also reaches a parked
  // child, and unlike a timer it needs no memory of a memcg that may be full by now.
  signal(SIGALRM, SIG_DFL);
  const uint64_t now = nowUs();
  alarm(now < deadlineUs ? static_cast<unsigned>((deadlineUs - now) / 1'000'000 + 1) : 1);
  return 0;
}

}  // namespace workload
