// reprieve-sampler: watches a shortage of memory of the whole machine from outside, the same way whoever handles it.
// It looks every millisecond or two, from locked memory and above every other priority, so that it sees on while the
// rest of the machine waits for memory; nothing in the loop allocates or writes to a file.
//
// What is `left` is MemAvailable plus SwapFree, in per mille of MemTotal plus SwapTotal: how far the machine is from
// having nothing. It is short of memory below --mark, and has recovered when the leaking job is gone and it has been
// above the mark for a second.
//
// Prints "ready", then, after --rest, "go": the leak is to start now. The account follows as one line of JSON; moments
// are milliseconds from "go", null for what did not happen.
#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cinttypes>
#include <climits>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>

#include "workload/workload.h"

namespace {

using workload::Stats;

constexpr int kPriority = 50;
constexpr uint64_t kTickUs = 2000;
constexpr uint64_t kStaysUs = 1'000'000;
constexpr size_t kMostJobs = 16;
constexpr size_t kMostProcesses = 64;
constexpr size_t kNobody = SIZE_MAX;

struct Job {
  const char* name;
  const char* cgroup;
  size_t processes;  // expected; those of the leak are born after the start
  Stats* stats;
  uint64_t restStallUs;
};

struct Process {
  size_t job;
  pid_t pid;
  uint64_t diedAtUs;
  int64_t leftThen;
};

struct Memory {
  uint64_t total, available, swapTotal, swapFree;  // KiB
  int64_t left() const { return static_cast<int64_t>((available + swapFree) * 1000 / (total + swapTotal)); }
};

Job jobs[kMostJobs];
size_t jobCount;
Process processes[kMostProcesses];
pollfd handles[kMostProcesses];  // of the processes, in the same order; -1 when dead
size_t processCount;
int meminfo;

[[noreturn]] void fail(const char* what) {
  fprintf(stderr, "reprieve-sampler: %s: %s\n", what, strerror(errno));
  exit(1);
}

uint64_t nowUs() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1'000'000 + static_cast<uint64_t>(now.tv_nsec) / 1000;
}

void sleepUntil(uint64_t us) {
  const timespec when{static_cast<time_t>(us / 1'000'000), static_cast<long>(us % 1'000'000) * 1000};
  clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &when, nullptr);
}

uint64_t lineOf(const char* text, const char* name) {
  const char* line = strstr(text, name);
  return line == nullptr ? 0 : strtoull(line + strlen(name), nullptr, 10);
}

Memory look() {
  static char text[4096];
  const ssize_t length = pread(meminfo, text, sizeof text - 1, 0);
  if (length <= 0) fail("/proc/meminfo");
  text[length] = '\0';
  return {lineOf(text, "MemTotal:"), lineOf(text, "MemAvailable:"), lineOf(text, "SwapTotal:"),
          lineOf(text, "SwapFree:")};
}

// Takes in processes of the job that are not known yet.
void findProcesses(size_t job) {
  char path[PATH_MAX];
  snprintf(path, sizeof path, "%s/cgroup.procs", jobs[job].cgroup);
  const int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) fail(path);
  char text[2048];
  const ssize_t length = read(fd, text, sizeof text - 1);
  if (length < 0) fail(path);
  close(fd);
  text[length] = '\0';
  for (char* at = text; *at != '\0';) {
    const pid_t pid = static_cast<pid_t>(strtol(at, &at, 10));
    while (*at == '\n') ++at;
    const auto known = [&](const Process& process) { return process.pid == pid; };
    if (std::any_of(processes, processes + processCount, known)) continue;
    const int handle = static_cast<int>(syscall(SYS_pidfd_open, pid, 0));
    if (handle < 0 && errno == ESRCH) continue;
    if (handle < 0 || processCount == kMostProcesses) fail("pidfd_open");
    processes[processCount] = {.job = job, .pid = pid, .diedAtUs = 0, .leftThen = 0};
    handles[processCount++] = {.fd = handle, .events = POLLIN, .revents = 0};
  }
}

size_t countOf(size_t job, bool onlyAlive) {
  size_t count = 0;
  for (size_t i = 0; i < processCount; ++i)
    count += static_cast<size_t>(processes[i].job == job && (!onlyAlive || handles[i].fd >= 0));
  return count;
}

// How many have died since the last time.
size_t noteDeaths(uint64_t now, int64_t left) {
  if (poll(handles, processCount, 0) <= 0) return 0;
  size_t died = 0;
  for (size_t i = 0; i < processCount; ++i) {
    if (handles[i].fd < 0 || handles[i].revents == 0) continue;
    close(handles[i].fd);
    handles[i].fd = -1;
    processes[i].diedAtUs = now;
    processes[i].leftThen = left;
    ++died;
  }
  return died;
}

// The longest since the last time, one that goes on included.
uint64_t takeStall(Job& job) {
  const uint64_t longest = job.stats->longestStallUs.exchange(0);
  const uint64_t now = nowUs();
  const uint64_t ended = job.stats->endedAtUs;
  return std::max(longest, now > ended ? now - ended : 0);
}

Stats* openStats(const char* path) {
  const int fd = open(path, O_RDWR | O_CLOEXEC);
  void* page = fd < 0 ? MAP_FAILED : mmap(nullptr, workload::kStatsBytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (page == MAP_FAILED) fail(path);
  return static_cast<Stats*>(page);
}

struct Account {
  uint64_t startUs = 0;
  uint64_t shortUs = 0;       // first below the mark
  uint64_t aboveUs = 0;       // above it since
  uint64_t criticalUs = 0;    // how long below --critical, in all
  uint64_t latestTickUs = 0;  // the longest time between two looks: what the account may have missed
  int64_t least = INT64_MAX;
  int64_t leastBeforeDeath = INT64_MAX;
  bool anyDeath = false;
  bool recovered = false;
};

struct Bounds {
  int64_t mark = 100;
  int64_t critical = 20;
  uint64_t restUs = 1'000'000;
  uint64_t shortLimitUs = 20'000'000;
  uint64_t limitUs = 60'000'000;
};

void watch(const Bounds& bounds, size_t leak, Account& account) {
  account.startUs = nowUs();
  uint64_t before = account.startUs;
  for (uint64_t tick = before;; tick += kTickUs) {
    sleepUntil(tick);
    const int64_t left = look().left();
    const uint64_t now = nowUs();
    if (countOf(leak, false) < jobs[leak].processes) findProcesses(leak);

    account.latestTickUs = std::max(account.latestTickUs, now - before);
    if (left < bounds.critical) account.criticalUs += now - before;
    before = now;
    tick = std::max(tick, now - std::min(now, kTickUs));  // late: no looks to catch up with

    account.least = std::min(account.least, left);
    // Memory is given back before a process counts as dead: how much there was when it was killed is the least until
    // then.
    if (!account.anyDeath) account.leastBeforeDeath = account.least;
    if (noteDeaths(now, left) > 0) account.anyDeath = true;

    if (left < bounds.mark) {
      if (account.shortUs == 0) account.shortUs = now;
      account.aboveUs = 0;
    } else if (account.aboveUs == 0) {
      account.aboveUs = now;
    }
    const bool gone = countOf(leak, false) == jobs[leak].processes && countOf(leak, true) == 0;
    if (gone && account.aboveUs != 0 && now - account.aboveUs >= kStaysUs) {
      account.recovered = true;
      return;
    }
    if (account.shortUs != 0 && now - account.shortUs > bounds.shortLimitUs) return;
    if (now - account.startUs > bounds.limitUs) return;
  }
}

void printMoment(const char* name, uint64_t us, const Account& account) {
  if (us == 0)
    printf("\"%s\":null,", name);
  else
    printf("\"%s\":%.1f,", name, static_cast<double>(us - account.startUs) / 1000);
}

void print(const Account& account) {
  const Memory memory = look();
  printf("{\"recovered\":%s,", account.recovered ? "true" : "false");
  printMoment("shortAt", account.shortUs, account);
  printMoment("aboveAt", account.recovered ? account.aboveUs : 0, account);
  printf("\"criticalMs\":%.1f,\"least\":%.1f,\"leftAtKill\":", static_cast<double>(account.criticalUs) / 1000,
         static_cast<double>(account.least) / 10);
  if (account.anyDeath)
    printf("%.1f", static_cast<double>(account.leastBeforeDeath) / 10);
  else
    printf("null");
  printf(",\"longestTickMs\":%.1f,\"memTotalKiB\":%" PRIu64 ",\"swapTotalKiB\":%" PRIu64 ",\"stalls\":{",
         static_cast<double>(account.latestTickUs) / 1000, memory.total, memory.swapTotal);
  const char* separator = "";
  for (size_t i = 0; i < jobCount; ++i) {
    if (jobs[i].stats == nullptr) continue;
    printf("%s\"%s\":{\"rest\":%.1f,\"longest\":%.1f}", separator, jobs[i].name,
           static_cast<double>(jobs[i].restStallUs) / 1000, static_cast<double>(takeStall(jobs[i])) / 1000);
    separator = ",";
  }
  printf("},\"deaths\":[");
  separator = "";
  for (size_t i = 0; i < processCount; ++i) {
    const Process& process = processes[i];
    if (process.diedAtUs == 0) continue;
    printf("%s{\"job\":\"%s\",\"pid\":%d,\"at\":%.1f,\"left\":%.1f}", separator, jobs[process.job].name, process.pid,
           static_cast<double>(process.diedAtUs - account.startUs) / 1000, static_cast<double>(process.leftThen) / 10);
    separator = ",";
  }
  printf("]}\n");
  fflush(stdout);
}

int usage() {
  fprintf(
      stderr,
      "Usage: reprieve-sampler [--mark PERMILLE] [--critical PERMILLE] [--rest MS] [--short-limit MS] [--limit MS]\n"
      "         --job NAME CGROUP STATS ... --leak CGROUP PROCESSES\n");
  return 2;
}

}  // namespace

int main(int argc, char** argv) {
  Bounds bounds;
  size_t leak = kNobody;
  for (int i = 1; i < argc;) {
    const auto is = [&](const char* name, int values) { return strcmp(argv[i], name) == 0 && i + values < argc; };
    if (jobCount == kMostJobs) return usage();
    if (is("--job", 3)) {
      jobs[jobCount++] = {argv[i + 1], argv[i + 2], 1, openStats(argv[i + 3]), 0};
      i += 4;
    } else if (is("--leak", 2)) {
      leak = jobCount;
      jobs[jobCount++] = {"leak", argv[i + 1], strtoull(argv[i + 2], nullptr, 10), nullptr, 0};
      i += 3;
    } else if (is("--mark", 1) || is("--critical", 1)) {
      (is("--mark", 1) ? bounds.mark : bounds.critical) = strtoll(argv[i + 1], nullptr, 10);
      i += 2;
    } else if (is("--rest", 1) || is("--short-limit", 1) || is("--limit", 1)) {
      uint64_t& bound = is("--rest", 1) ? bounds.restUs : is("--limit", 1) ? bounds.limitUs : bounds.shortLimitUs;
      bound = strtoull(argv[i + 1], nullptr, 10) * 1000;
      i += 2;
    } else {
      return usage();
    }
  }
  if (leak == kNobody) return usage();

  meminfo = open("/proc/meminfo", O_RDONLY | O_CLOEXEC);
  if (meminfo < 0) fail("/proc/meminfo");
  for (size_t i = 0; i < jobCount; ++i) findProcesses(i);
  const sched_param priority{.sched_priority = kPriority};
  if (sched_setscheduler(0, SCHED_FIFO, &priority) != 0) fail("SCHED_FIFO");
  if (mlockall(MCL_CURRENT | MCL_FUTURE) != 0) fail("mlockall");

  puts("ready");
  fflush(stdout);
  const auto takeStalls = [] {
    for (size_t i = 0; i < jobCount; ++i)
      if (jobs[i].stats != nullptr) jobs[i].restStallUs = takeStall(jobs[i]);
  };
  takeStalls();
  sleepUntil(nowUs() + bounds.restUs);
  takeStalls();
  puts("go");
  fflush(stdout);

  Account account;
  watch(bounds, leak, account);
  print(account);
  return 0;
}
