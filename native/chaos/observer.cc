// reprieve-chaos-observer: looks at a cgroup v1 memcg and all below it from outside, and shares nothing with those it
// judges. Every few milliseconds it notes
//   which tasks are held: parked at the limit, or frozen, and for how long without a break
//   whether memory is needed: under OOM, or nearly all of the limit in use
//   which processes there are, when the last task of one was gone, and how much anonymous memory it had
//   what oom_kill_disable of the memcg says
//   how much more all others use while the memcg of an overcharge window is there
// It tells of changes on stdout as lines of JSON at once, and prints everything for a line "account" on stdin. A line
// "clock N" sets the machine's wall clock forward by N seconds; it is set back at "clock back", and whenever this ends.
// The end of stdin ends the program. FROZEN is the name of a memcg below whose tasks somebody else has frozen. Times
// are CLOCK_MONOTONIC in microseconds.
#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/xattr.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <map>
#include <string>
#include <vector>

namespace {

// Above the handler's: an endless loop there must not blind who looks on.
constexpr int kPriority = 2;
constexpr uint64_t kStepUs = 3000;
// Memory and attributes change slowly, and cost more to read.
constexpr int kSlowSteps = 4;

// A hold that is shorter is not told of by itself.
constexpr uint64_t kShortUs = 30'000;
// This near to the limit memory is needed.
constexpr uint64_t kNearBytes = 1 << 20;

struct Task {
  pid_t process = 0;
  uint64_t heldSinceUs = 0;  // 0: it is not held
  uint64_t heldLastUs = 0;
  // One look that does not find it held may be wrong: it is woken for a moment, or the list was cut off.
  bool missed = false;
  bool seen = false;
};

struct Hold {
  uint64_t fromUs;
  uint64_t untilUs;
};

struct Process {
  std::string group;  // of the memcg, below the one that is looked at
  std::string name;
  uint64_t firstUs = 0;
  uint64_t lastUs = 0;
  uint64_t goneUs = 0;  // 0: it is there
  uint64_t anonymous = 0;
  uint64_t longestUs = 0;  // that one of its tasks was held
  uint64_t heldUntilUs = 0;
  const char* place = "";  // where it was held that long
  std::vector<Hold> holds;
};

struct Need {
  uint64_t atUs;
  bool is;
};

struct Flip {
  uint64_t atUs;
  int disabled;
};

struct Window {
  uint64_t fromUs;
  uint64_t untilUs;
  uint64_t firstBytes;
  int64_t grewBytes;
};

constexpr const char* kWindowPrefix = "reprieve-window-";

std::string memcg;
std::string frozenBefore;  // somebody's who is not judged: his tasks are not held
std::map<std::string, Window> windows;
std::map<pid_t, Task> tasks;
std::multimap<pid_t, Process> processes;  // the youngest of a number is the last
std::vector<Flip> flips;
std::vector<Need> needs;
uint64_t firstLimit = 0;
size_t heldBefore = 0;
uint64_t heldLastUs = 0;
uint64_t blindUs = 0;
int64_t clockSteppedBy = 0;

uint64_t nowUs() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1'000'000 + static_cast<uint64_t>(now.tv_nsec) / 1000;
}

// Empty if it cannot be read.
std::string readFile(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return {};
  std::string text;
  char part[16384];
  for (ssize_t got; (got = read(fd, part, sizeof part)) > 0;) text.append(part, static_cast<size_t>(got));
  close(fd);
  return text;
}

std::string ofProcess(pid_t pid, const char* file) { return readFile("/proc/" + std::to_string(pid) + "/" + file); }

// The memcg and all below it, by their names below it.
void listGroups(const std::string& below, std::vector<std::string>& groups) {
  DIR* directory = opendir((memcg + "/" + below).c_str());
  if (directory == nullptr) return;
  groups.push_back(below);
  while (const dirent* entry = readdir(directory)) {
    if (entry->d_type != DT_DIR || entry->d_name[0] == '.') continue;
    listGroups(below.empty() ? entry->d_name : below + "/" + entry->d_name, groups);
  }
  closedir(directory);
}

// Where a task is held, or null.
const char* placeOf(pid_t tid) {
  const std::string wchan = ofProcess(tid, "wchan");
  if (wchan.rfind("mem_cgroup_oom_synchronize", 0) == 0) return "parked";
  if (wchan.rfind("__refrigerator", 0) == 0 || wchan.rfind("do_freezer_trap", 0) == 0) return "frozen";
  return nullptr;
}

pid_t processOf(pid_t tid) {
  const std::string status = ofProcess(tid, "status");
  const size_t at = status.find("\nTgid:");
  return at == std::string::npos ? 0 : static_cast<pid_t>(strtol(status.c_str() + at + 6, nullptr, 10));
}

uint64_t anonymousOf(pid_t pid) {
  unsigned long size = 0;
  unsigned long resident = 0;
  unsigned long shared = 0;
  if (sscanf(ofProcess(pid, "statm").c_str(), "%lu %lu %lu", &size, &resident, &shared) != 3) return 0;
  return resident > shared ? (resident - shared) * static_cast<uint64_t>(sysconf(_SC_PAGESIZE)) : 0;
}

// Whether a task is there, wherever it is listed: a list that is read while others fork may be cut off.
bool isThere(pid_t tid) {
  const std::string stat = ofProcess(tid, "stat");
  const size_t end = stat.rfind(')');
  return end != std::string::npos && end + 2 < stat.size() && stat[end + 2] != 'Z' && stat[end + 2] != 'X';
}

// The living process of that number.
Process* find(pid_t pid) {
  const auto [begin, end] = processes.equal_range(pid);
  for (auto entry = begin; entry != end; ++entry)
    if (entry->second.goneUs == 0) return &entry->second;
  return nullptr;
}

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    if (static_cast<unsigned char>(c) >= ' ') result += c;
  }
  return result + '"';
}

void endHold(Task& task, Process& process) {
  if (task.heldSinceUs != 0 && task.heldLastUs - task.heldSinceUs >= kShortUs) {
    process.holds.push_back({task.heldSinceUs, task.heldLastUs});
  }
  task.heldSinceUs = 0;
  task.missed = false;
}

void look(pid_t tid, const std::string& group, uint64_t now, bool slow) {
  auto [entry, isNew] = tasks.try_emplace(tid);
  Task& task = entry->second;
  if (isNew) {
    task.process = processOf(tid);
    if (task.process == 0) {  // gone again
      tasks.erase(entry);
      return;
    }
  }
  task.seen = true;
  Process* process = find(task.process);
  if (process == nullptr) {
    process = &processes.emplace(task.process, Process{})->second;
    process->firstUs = now;
    process->anonymous = anonymousOf(task.process);
  }
  process->lastUs = now;
  if (isNew || slow) {  // a program names itself after it has joined, and may be moved
    process->group = group;
    process->name = ofProcess(task.process, "comm");
    while (!process->name.empty() && process->name.back() == '\n') process->name.pop_back();
    if (const uint64_t bytes = anonymousOf(task.process); bytes > 0) process->anonymous = bytes;
  }
  const char* place = group == frozenBefore ? nullptr : placeOf(tid);
  if (place == nullptr) {
    if (task.missed) endHold(task, *process);
    task.missed = task.heldSinceUs != 0;
    return;
  }
  task.missed = false;
  if (task.heldSinceUs == 0) task.heldSinceUs = now;
  task.heldLastUs = now;
  heldLastUs = now;
  process->heldUntilUs = now;
  if (now - task.heldSinceUs >= process->longestUs) {
    process->longestUs = now - task.heldSinceUs;
    process->place = place;
  }
}

uint64_t numberIn(const char* file) {
  const std::string text = readFile(memcg + "/" + file);
  return text.empty() ? UINT64_MAX : strtoull(text.c_str(), nullptr, 10);
}

// Judged by the lower of the limit that is set and the one at first: a handler may have raised it for a while. What
// comes and goes between two looks is counted by the kernel.
void noteNeed(uint64_t now, bool underOom) {
  static uint64_t failuresBefore = 0;
  const uint64_t limit = numberIn("memory.limit_in_bytes");
  if (firstLimit == 0) firstLimit = limit;
  const uint64_t failures = numberIn("memory.failcnt");
  const bool is = underOom || failures != failuresBefore ||
                  numberIn("memory.usage_in_bytes") + kNearBytes >= std::min(limit, firstLimit);
  failuresBefore = failures;
  if (needs.empty() || needs.back().is != is) needs.push_back({now, is});
}

void noteKiller(uint64_t now) {
  const std::string text = readFile(memcg + "/memory.oom_control");
  noteNeed(now, text.empty() || text.find("under_oom 1") != std::string::npos);
  if (text.empty()) return;
  const int disabled = text.find("oom_kill_disable 1") == std::string::npos ? 0 : 1;
  if (!flips.empty() && flips.back().disabled == disabled) return;
  flips.push_back({now, disabled});
  printf("{\"event\":\"killer\",\"disabled\":%d,\"atUs\":%" PRIu64 "}\n", disabled, now);
}

bool isWindow(const std::string& group) { return group.rfind(kWindowPrefix, 0) == 0; }

uint64_t fieldIn(const std::string& text, const char* field) {
  const size_t at = text.find(field);
  return at == std::string::npos ? 0 : strtoull(text.c_str() + at + strlen(field), nullptr, 10);
}

// Anonymous memory and page cache of all but the windows, from the kernel's numbers for each memcg alone.
uint64_t usedOutside(const std::vector<std::string>& groups) {
  uint64_t sum = 0;
  for (const std::string& group : groups) {
    if (isWindow(group)) continue;
    const std::string text = "\n" + readFile(memcg + "/" + group + "/memory.stat");
    sum += fieldIn(text, "\nrss ") + fieldIn(text, "\ncache ");
  }
  return sum;
}

// From the first look at it: the jobs stand still by then.
void noteWindows(uint64_t now, const std::vector<std::string>& groups, bool slow) {
  for (const std::string& group : groups) {
    if (!isWindow(group)) continue;
    const auto [entry, isNew] = windows.try_emplace(group, Window{now, now, 0, 0});
    Window& window = entry->second;
    if (!isNew && !slow) {
      window.untilUs = now;
      continue;
    }
    const uint64_t bytes = usedOutside(groups);
    if (access((memcg + "/" + group).c_str(), F_OK) != 0) {  // closed meanwhile, and the jobs go on
      if (isNew) windows.erase(entry);
      continue;
    }
    window.untilUs = now;
    if (isNew) window.firstBytes = bytes;
    window.grewBytes = std::max(window.grewBytes, static_cast<int64_t>(bytes - window.firstBytes));
  }
}

void step(bool slow) {
  const uint64_t now = nowUs();
  std::vector<std::string> groups;
  listGroups("", groups);
  noteWindows(now, groups, slow);
  for (const std::string& group : groups) {
    const std::string list = readFile(memcg + "/" + group + "/tasks");  // opened anew: a kept descriptor lies
    for (const char* at = list.c_str(); *at != '\0';) {
      char* end = nullptr;
      const long tid = strtol(at, &end, 10);
      if (end == at) break;
      look(static_cast<pid_t>(tid), group, now, slow);
      at = *end == '\0' ? end : end + 1;
    }
  }
  size_t held = 0;
  for (auto entry = tasks.begin(); entry != tasks.end();) {
    Task& task = entry->second;
    Process* process = find(task.process);
    if (!task.seen && isThere(entry->first) && process != nullptr) {
      process->lastUs = now;
    } else if (!task.seen) {
      if (process != nullptr) endHold(task, *process);
      entry = tasks.erase(entry);
      continue;
    }
    task.seen = false;
    if (task.heldSinceUs != 0) ++held;
    ++entry;
  }
  for (auto& [pid, process] : processes) {
    if (process.goneUs != 0 || process.lastUs == now) continue;
    process.goneUs = now;
    printf("{\"event\":\"gone\",\"pid\":%d,\"atUs\":%" PRIu64 "}\n", pid, now);
  }
  if ((held == 0) != (heldBefore == 0)) {
    printf("{\"event\":\"%s\",\"atUs\":%" PRIu64 "}\n", held > 0 ? "held" : "free", now);
  }
  heldBefore = held;
  noteKiller(now);
  fflush(stdout);
}

std::string attributesOf(const std::string& group) {
  char names[1024];
  const ssize_t length = listxattr((memcg + "/" + group).c_str(), names, sizeof names);
  std::string result;
  for (ssize_t at = 0; at < length; at += static_cast<ssize_t>(strlen(names + at)) + 1) {
    if (strstr(names + at, "reprieve") == nullptr) continue;
    result += (result.empty() ? "" : ",") + quoted(group + " " + (names + at));
  }
  return result;
}

void account() {
  printf("{\"event\":\"account\",\"blindUs\":%" PRIu64 ",\"heldNow\":%zu,\"heldLastUs\":%" PRIu64 ",\"flips\":[",
         blindUs, heldBefore, heldLastUs);
  const char* separator = "";
  for (const Flip& flip : flips) {
    printf("%s{\"atUs\":%" PRIu64 ",\"disabled\":%d}", separator, flip.atUs, flip.disabled);
    separator = ",";
  }
  printf("],\"processes\":[");
  separator = "";
  for (const auto& [pid, process] : processes) {
    printf("%s{\"pid\":%d,\"group\":%s,\"name\":%s,\"firstUs\":%" PRIu64 ",\"goneUs\":%" PRIu64
           ",\"anonymous\":%" PRIu64 ",\"heldUs\":%" PRIu64 ",\"heldUntilUs\":%" PRIu64 ",\"place\":\"%s\",\"holds\":[",
           separator, pid, quoted(process.group).c_str(), quoted(process.name).c_str(), process.firstUs, process.goneUs,
           process.anonymous, process.longestUs, process.heldUntilUs, process.place);
    separator = ",";
    const char* comma = "";
    const auto print = [&comma](const Hold& hold) {
      printf("%s[%" PRIu64 ",%" PRIu64 "]", comma, hold.fromUs, hold.untilUs);
      comma = ",";
    };
    for (const Hold& hold : process.holds) print(hold);
    // Those that last.
    for (const auto& [tid, task] : tasks) {
      if (task.process == pid && process.goneUs == 0 && task.heldSinceUs != 0)
        print({task.heldSinceUs, task.heldLastUs});
    }
    printf("]}");
  }
  printf("],\"needs\":[");
  separator = "";
  for (const Need& need : needs) {
    printf("%s{\"atUs\":%" PRIu64 ",\"is\":%s}", separator, need.atUs, need.is ? "true" : "false");
    separator = ",";
  }
  printf("],\"windows\":[");
  separator = "";
  for (const auto& [name, window] : windows) {
    printf("%s{\"name\":%s,\"fromUs\":%" PRIu64 ",\"untilUs\":%" PRIu64 ",\"grewBytes\":%" PRId64 "}", separator,
           quoted(name).c_str(), window.fromUs, window.untilUs, window.grewBytes);
    separator = ",";
  }
  printf("],\"attributes\":[");
  separator = "";
  std::vector<std::string> groups;
  listGroups("", groups);
  for (const std::string& group : groups) {
    const std::string attributes = attributesOf(group);
    if (attributes.empty()) continue;
    printf("%s%s", separator, attributes.c_str());
    separator = ",";
  }
  printf("]}\n");
  fflush(stdout);
}

void stepClock(int64_t seconds) {
  timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  now.tv_sec += seconds;
  if (seconds != 0 && clock_settime(CLOCK_REALTIME, &now) == 0) clockSteppedBy += seconds;
}

// False at the end of stdin.
bool obey() {
  char text[256];
  const ssize_t length = read(STDIN_FILENO, text, sizeof text - 1);
  if (length <= 0) return false;
  text[length] = '\0';
  for (char* rest = text; const char* line = strsep(&rest, "\n");) {
    if (strcmp(line, "account") == 0) {
      step(true);
      account();
    } else if (strcmp(line, "clock back") == 0) {
      stepClock(-clockSteppedBy);
    } else if (strncmp(line, "clock ", 6) == 0) {
      stepClock(strtoll(line + 6, nullptr, 10));
    }
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    fprintf(stderr, "Usage: reprieve-chaos-observer MEMCG FROZEN\n");
    return 2;
  }
  memcg = argv[1];
  frozenBefore = argv[2];
  for (const int number : {SIGINT, SIGTERM, SIGHUP, SIGPIPE}) signal(number, SIG_IGN);  // the end of stdin ends it
  const sched_param priority{.sched_priority = kPriority};
  if (sched_setscheduler(0, SCHED_RR | SCHED_RESET_ON_FORK, &priority) != 0 ||
      mlockall(MCL_CURRENT | MCL_FUTURE) != 0) {
    fprintf(stderr, "reprieve-chaos-observer: no real-time priority or locked memory: %s\n", strerror(errno));
    return 1;
  }
  step(true);
  printf("{\"event\":\"ready\"}\n");
  fflush(stdout);
  uint64_t last = nowUs();
  for (int count = 1;; ++count) {
    pollfd command{STDIN_FILENO, POLLIN, 0};
    const uint64_t due = last + kStepUs;
    const uint64_t before = nowUs();
    const int wait = before < due ? static_cast<int>((due - before + 999) / 1000) : 0;
    if (poll(&command, 1, wait) > 0 && !obey()) break;
    const uint64_t now = nowUs();
    if (now < due) continue;
    if (now - last > blindUs) blindUs = now - last;
    last = now;
    step(count % kSlowSteps == 0);
  }
  if (clockSteppedBy != 0) stepClock(-clockSteppedBy);
  return 0;
}
