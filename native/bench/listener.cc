// reprieve-listener: the yardstick. It registers for the out-of-memory events of one cgroup v1
// memcg, reads who is in the victim cgroup, kills them by pidfd, and nothing else: no policy, no
// reserve, no deadline, one pass over cgroup.procs. What a real handler takes longer than this is
// the price of what it does more.
//
// It stands outside the memcg it watches. All times are CLOCK_MONOTONIC in microseconds.
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cinttypes>
#include <climits>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <initializer_list>

namespace {

constexpr size_t kMostPids = 1024;

int oomControl = -1;
pollfd victims[kMostPids];
pid_t pids[kMostPids];
char text[64 << 10];

[[noreturn]] void fail(const char* what) {
  const int error = errno;
  // Nobody is to stay parked because of a listener that could not go on.
  if (oomControl >= 0 && pwrite(oomControl, "0", 1, 0) < 0) perror("oom_kill_disable stays 1");
  fprintf(stderr, "reprieve-listener: %s: %s\n", what, strerror(error));
  exit(1);
}

void restoreAndLeave(int) {  // only async-signal-safe calls
  _exit(pwrite(oomControl, "0", 1, 0) == 1 ? 0 : 1);
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

int registerFor(const char* memcg) {
  oomControl = openIn(memcg, "memory.oom_control", O_RDWR);
  const int event = eventfd(0, EFD_CLOEXEC);
  if (event < 0) fail("eventfd");
  const int control = openIn(memcg, "cgroup.event_control", O_WRONLY);
  const int length = snprintf(text, sizeof text, "%d %d", event, oomControl);
  if (write(control, text, static_cast<size_t>(length)) != length) fail("cgroup.event_control");
  close(control);

  // Before the kernel's killer is switched off, so that it is on again however we are ended,
  // SIGKILL alone excepted; also by the death of our parent.
  struct sigaction action {};
  action.sa_handler = restoreAndLeave;
  for (const int signal : {SIGTERM, SIGINT, SIGHUP, SIGPIPE}) sigaction(signal, &action, nullptr);
  prctl(PR_SET_PDEATHSIG, SIGTERM);
  if (pwrite(oomControl, "1", 1, 0) != 1) fail("oom_kill_disable");
  return event;
}

bool isUnderOom() {
  char state[256];
  const ssize_t length = pread(oomControl, state, sizeof state - 1, 0);
  if (length < 0) fail("memory.oom_control");
  state[length] = '\0';
  return strstr(state, "under_oom 1") != nullptr;
}

// Opened anew each time: a descriptor that is kept may show a list that is out of date.
size_t killAll(const char* victim) {
  const int fd = openIn(victim, "cgroup.procs", O_RDONLY);
  size_t filled = 0;
  ssize_t got;
  while (filled < sizeof text - 1 && (got = read(fd, text + filled, sizeof text - 1 - filled)) > 0)
    filled += static_cast<size_t>(got);
  close(fd);
  text[filled] = '\0';

  size_t count = 0;
  char* next = text;
  while (count < kMostPids) {
    char* end;
    const long pid = strtol(next, &end, 10);
    if (end == next) break;
    next = end;
    const long pidfd = syscall(SYS_pidfd_open, pid, 0);
    if (pidfd < 0) continue;  // gone by itself
    syscall(SYS_pidfd_send_signal, pidfd, SIGKILL, nullptr, 0);
    pids[count] = static_cast<pid_t>(pid);
    victims[count++] = {static_cast<int>(pidfd), POLLIN, 0};
  }
  return count;
}

void awaitDeath(size_t count) {
  for (size_t alive = count; alive > 0;) {
    if (poll(victims, count, -1) < 0 && errno != EINTR) fail("poll");
    for (size_t i = 0; i < count; ++i) {
      if (victims[i].fd < 0 || victims[i].revents == 0) continue;
      close(victims[i].fd);
      victims[i].fd = -1;  // poll leaves it out
      --alive;
    }
  }
}

void report(uint64_t woken, uint64_t killed, uint64_t dead, size_t count) {
  printf("{\"wokenAtUs\":%" PRIu64 ",\"killedAtUs\":%" PRIu64 ",\"deadAtUs\":%" PRIu64 ",\"pids\":[", woken, killed,
         dead);
  for (size_t i = 0; i < count; ++i) printf("%s%d", i > 0 ? "," : "", pids[i]);
  printf("]}\n");
  fflush(stdout);
}

int usage() {
  fprintf(stderr, "Usage: reprieve-listener --memcg DIR --victim DIR [--once] [--realtime]\n");
  return 2;
}

}  // namespace

int main(int argc, char** argv) {
  const char* memcg = nullptr;
  const char* victim = nullptr;
  bool once = false;
  bool realtime = false;
  for (int i = 1; i < argc; ++i) {
    if (strcmp(argv[i], "--once") == 0)
      once = true;
    else if (strcmp(argv[i], "--realtime") == 0)
      realtime = true;
    else if (strcmp(argv[i], "--memcg") == 0 && i + 1 < argc)
      memcg = argv[++i];
    else if (strcmp(argv[i], "--victim") == 0 && i + 1 < argc)
      victim = argv[++i];
    else
      return usage();
  }
  if (memcg == nullptr || victim == nullptr) return usage();

  const sched_param priority{.sched_priority = 1};
  if (realtime && sched_setscheduler(0, SCHED_RR | SCHED_RESET_ON_FORK, &priority) != 0) fail("SCHED_RR");
  const int event = registerFor(memcg);
  puts("ready");
  fflush(stdout);

  for (;;) {
    uint64_t events;
    if (read(event, &events, sizeof events) != sizeof events) fail("eventfd");
    const uint64_t woken = nowUs();
    if (!isUnderOom()) continue;  // over already, or the cgroup is being removed
    const size_t count = killAll(victim);
    const uint64_t killed = nowUs();
    if (count == 0) continue;
    awaitDeath(count);
    report(woken, killed, nowUs(), count);
    if (once) restoreAndLeave(0);
  }
}
