// reprieve-observer: watches an out-of-memory episode of one cgroup v1 memcg from outside, the same way whoever handles
// it. It sleeps until the kernel tells it something, and notes when:
//   oomAtUs    the first out-of-memory signal of the memcg
//   belowAtUs  its usage fell below the threshold, and has stayed there
//   goneAtUs   the last process that held the write end of the FIFO is gone: the victim job was given it
// A line on stdin prints the account and starts a new one; the end of stdin ends the program. All times are
// CLOCK_MONOTONIC in microseconds, 0 for what did not happen.
#include <fcntl.h>
#include <sched.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cinttypes>
#include <climits>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>

namespace {

// Above who is watched: two cores are enough for both, and a stamp that waits for its turn is no stamp.
constexpr int kPriority = 2;

enum Source : uint32_t { kOom, kUsage, kFifo, kCommand };

struct Account {
  uint64_t oomAtUs;
  uint64_t crossedAtUs;
  uint64_t goneAtUs;
};

[[noreturn]] void fail(const char* what) {
  fprintf(stderr, "reprieve-observer: %s: %s\n", what, strerror(errno));
  exit(1);
}

uint64_t nowUs() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1'000'000 + static_cast<uint64_t>(now.tv_nsec) / 1000;
}

int openIn(const char* directory, const char* name, int flags) {
  char path[PATH_MAX];
  snprintf(path, sizeof path, "%s/%s", directory, name);
  const int fd = open(path, flags | O_CLOEXEC);
  if (fd < 0) fail(path);
  return fd;
}

// An eventfd that the memcg signals; `file` is one of its control files.
int listenTo(const char* memcg, int file, const char* argument) {
  const int event = eventfd(0, EFD_CLOEXEC);
  if (event < 0) fail("eventfd");
  const int control = openIn(memcg, "cgroup.event_control", O_WRONLY);
  char line[64];
  const int length = snprintf(line, sizeof line, "%d %d %s", event, file, argument);
  if (write(control, line, static_cast<size_t>(length)) != length) fail("cgroup.event_control");
  close(control);
  return event;
}

void add(int set, int fd, Source source, uint32_t events) {
  epoll_event event{};
  event.events = events;
  event.data.u32 = source;
  if (epoll_ctl(set, EPOLL_CTL_ADD, fd, &event) != 0) fail("epoll_ctl");
}

void drain(int event) {
  uint64_t count;
  if (read(event, &count, sizeof count) != sizeof count) fail("eventfd");
}

uint64_t numberIn(int file) {
  char text[32];
  const ssize_t length = pread(file, text, sizeof text - 1, 0);
  if (length < 0) fail("memory.usage_in_bytes");
  text[length] = '\0';
  return strtoull(text, nullptr, 10);
}

// False at the end of stdin.
bool answer(Account& account, bool below) {
  char command[16];
  if (read(STDIN_FILENO, command, sizeof command) <= 0) return false;
  // The threshold is told of both ways, so what is below now has been since it crossed last.
  const uint64_t belowAtUs = below ? account.crossedAtUs : 0;
  printf("{\"oomAtUs\":%" PRIu64 ",\"belowAtUs\":%" PRIu64 ",\"goneAtUs\":%" PRIu64 "}\n", account.oomAtUs, belowAtUs,
         account.goneAtUs);
  fflush(stdout);
  account = {};
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    fprintf(stderr, "Usage: reprieve-observer MEMCG BYTES FIFO\n");
    return 2;
  }
  const char* memcg = argv[1];
  const uint64_t threshold = strtoull(argv[2], nullptr, 10);

  const int usage = openIn(memcg, "memory.usage_in_bytes", O_RDONLY);
  const int oomControl = openIn(memcg, "memory.oom_control", O_RDONLY);
  const int oomEvent = listenTo(memcg, oomControl, "");
  const int usageEvent = listenTo(memcg, usage, argv[2]);
  const int fifo = open(argv[3], O_RDONLY | O_NONBLOCK | O_CLOEXEC);
  if (fifo < 0) fail(argv[3]);

  const int set = epoll_create1(EPOLL_CLOEXEC);
  if (set < 0) fail("epoll_create1");
  add(set, oomEvent, kOom, EPOLLIN);
  add(set, usageEvent, kUsage, EPOLLIN);
  add(set, fifo, kFifo, EPOLLET);  // hang-ups, each told once
  add(set, STDIN_FILENO, kCommand, EPOLLIN);

  const sched_param priority{.sched_priority = kPriority};
  if (sched_setscheduler(0, SCHED_RR | SCHED_RESET_ON_FORK, &priority) != 0) fail("SCHED_RR");
  if (mlockall(MCL_CURRENT | MCL_FUTURE) != 0) fail("mlockall");
  puts("ready");
  fflush(stdout);

  for (Account account{};;) {
    epoll_event event;
    if (epoll_wait(set, &event, 1, -1) != 1) {
      if (errno == EINTR) continue;
      fail("epoll_wait");
    }
    const uint64_t now = nowUs();
    switch (event.data.u32) {
      case kOom:
        drain(oomEvent);
        if (account.oomAtUs == 0) account.oomAtUs = now;
        break;
      case kUsage:
        drain(usageEvent);
        account.crossedAtUs = now;
        break;
      case kFifo:
        account.goneAtUs = now;
        break;
      default:
        if (!answer(account, numberIn(usage) < threshold)) return 0;
    }
  }
}
