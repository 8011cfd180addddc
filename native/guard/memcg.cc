#include "memcg.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <poll.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <climits>
#include <csignal>
#include <limits>
#include <utility>

#include "core/control_file.h"
#include "core/fd.h"
#include "core/pidfd.h"
#include "record.h"

namespace reprieve::guard {
namespace {

constexpr int kDirectoryFlags = O_RDONLY | O_DIRECTORY | O_CLOEXEC;
constexpr uint64_t kNoLimit = std::numeric_limits<uint64_t>::max();
constexpr int kNeverKilled = -1000;  // OOM_SCORE_ADJ_MIN of <linux/oom.h>

bool isGone(int number) { return number == ENOENT || number == ENODEV; }

bool hasParentComponent(std::string_view path) {
  while (!path.empty()) {
    const size_t slash = path.find('/');
    if (path.substr(0, slash) == "..") return true;
    if (slash == std::string_view::npos) break;
    path.remove_prefix(slash + 1);
  }
  return false;
}

/** Keeps the first error, which is the one to be told. */
void note(int& first, int number) {
  if (first == 0) first = number;
}

/** The processes of one cgroup.procs: 0 or an errno; `stopped` when `visit` wants no more. */
int listOne(int directory, VisitProcess visit, void* context, bool& stopped) {
  const Fd file(openat(directory, "cgroup.procs", O_RDONLY | O_CLOEXEC));
  if (!file) return isGone(errno) ? 0 : errno;
  std::array<char, 2048> buffer;
  pid_t pid = 0;
  bool any = false;
  for (;;) {
    const ssize_t got = read(file.get(), buffer.data(), buffer.size());
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return isGone(errno) ? 0 : errno;
    if (got == 0) return 0;
    // A number may go on in the next piece, however long the list is.
    for (const char c : std::span(buffer.data(), static_cast<size_t>(got))) {
      if (c >= '0' && c <= '9') {
        pid = pid * 10 + (c - '0');
        any = true;
      } else if (any) {
        stopped = !visit(context, pid);
        if (stopped) return 0;
        pid = 0;
        any = false;
      }
    }
  }
}

struct Walk {
  VisitProcess visit;
  void* context;
  bool stopped;
  int error;
};

bool listGroup(void* context, int directory, const char* /*name*/) {
  auto& walk = *static_cast<Walk*>(context);
  note(walk.error, listOne(directory, walk.visit, walk.context, walk.stopped));
  return !walk.stopped;
}

/** kernfs counts 2 + subdirectories (kernfs_refresh_inode()), so a leaf costs no listing. */
bool isLeaf(int directory) {
  struct stat status {};
  return fstat(directory, &status) == 0 && status.st_nlink == 2;
}

/** Reads a small file below a directory in one piece. */
int readBelow(int directory, const char* name, std::span<char> buffer, std::string_view& text) {
  const Fd file(openat(directory, name, O_RDONLY | O_CLOEXEC));
  if (!file) return errno;
  const ssize_t got = readSmall(file.get(), buffer);
  if (got < 0) return errno;
  text = {buffer.data(), static_cast<size_t>(got)};
  return 0;
}

/** How many processes one step of the killer holds: each costs a descriptor. */
constexpr size_t kBatch = 128;

/** Of the processes above `after`, those with the lowest numbers: so a list of any length is gone through in steps. */
struct Batch {
  pid_t after;
  pid_t self;
  bool count;
  Round* round;
  size_t size;
  std::array<pid_t, kBatch> pids;
};

bool collect(void* context, pid_t pid) {
  auto& batch = *static_cast<Batch*>(context);
  if (pid == batch.self) return true;
  if (batch.count) batch.round->listed++;
  if (pid <= 1) {
    if (batch.count) batch.round->unreachable++;
    return true;
  }
  pid_t* const end = batch.pids.data() + batch.size;
  if (pid <= batch.after || (batch.size == kBatch && pid >= end[-1])) return true;
  pid_t* const place = std::lower_bound(batch.pids.data(), end, pid);
  // A process that moves while v2's list is read may be listed twice.
  if (place != end && *place == pid) return true;
  if (batch.size < kBatch) batch.size++;
  std::copy_backward(place, batch.pids.data() + batch.size - 1, batch.pids.data() + batch.size);
  *place = pid;
  return true;
}

struct Held {
  std::span<const pid_t> pids;
  std::span<Fd> pidfds;
  std::array<bool, kBatch> listed;
};

bool markListed(void* context, pid_t pid) {
  auto& held = *static_cast<Held*>(context);
  const auto place = std::lower_bound(held.pids.begin(), held.pids.end(), pid);
  if (place != held.pids.end() && *place == pid) held.listed[static_cast<size_t>(place - held.pids.begin())] = true;
  return true;
}

struct Kills {
  std::span<pid_t> pids;
  size_t* count;
  Round round;
  int error;
};

void remember(Kills& kills, pid_t pid) {
  const auto known = kills.pids.first(*kills.count);
  if (known.size() == kills.pids.size() || std::find(known.begin(), known.end(), pid) != known.end()) return;
  kills.pids[(*kills.count)++] = pid;
}

bool killOne(void* context, int directory, const char* /*name*/) {
  auto& kills = *static_cast<Kills*>(context);
  Batch batch{0, getpid(), true, &kills.round, 0, {}};
  std::array<Fd, kBatch> pidfds;
  bool stopped = false;
  do {
    batch.size = 0;
    note(kills.error, listOne(directory, collect, &batch, stopped));
    batch.count = false;
    const std::span<const pid_t> pids(batch.pids.data(), batch.size);
    for (size_t i = 0; i < pids.size(); i++) {
      pidfds[i] = openPidfd(pids[i]);
      if (!pidfds[i] && errno != ESRCH) kills.round.unreachable++;
    }
    // Between the listing and pidfd_open a process may die and its number go to a stranger. Whoever is listed once
    // more, now that the descriptor is held, was in the cgroup under this number or is dead.
    Held held{pids, pidfds, {}};
    if (!pids.empty()) note(kills.error, listOne(directory, markListed, &held, stopped));
    for (size_t i = 0; i < pids.size(); i++) {
      if (!pidfds[i] || !held.listed[i]) continue;
      const int number = sendSignal(pidfds[i].get(), SIGKILL);
      if (number == 0) {
        kills.round.signalled++;
        remember(kills, pids[i]);
      } else if (number != ESRCH) {
        kills.round.unreachable++;
      }
    }
    for (Fd& pidfd : pidfds) pidfd.close();
    if (!pids.empty()) batch.after = pids.back();
  } while (batch.size == kBatch);
  return true;
}

bool isKillable(void* context, pid_t pid) {
  bool& found = *static_cast<bool*>(context);
  // Of another pid namespace: nobody knows, and hardly any process is exempt.
  if (pid == 0) found = true;
  const Fd process(openProcess(pid));
  int score = 0;
  if (process && readScoreAdj(process.get(), score) == 0 && score > kNeverKilled) found = true;
  return !found;
}

struct Sought {
  pid_t pid;
  bool found;
};

bool isSought(void* context, pid_t pid) {
  auto& sought = *static_cast<Sought*>(context);
  sought.found = pid == sought.pid;
  return !sought.found;
}

bool isAny(void* context, pid_t /*pid*/) {
  *static_cast<bool*>(context) = true;
  return false;
}

}  // namespace

int openBeneath(int root, const char* path, int flags) {
  while (*path == '/') path++;
  if (*path == '\0') path = ".";
  // openat2(2) lets `a/../b` pass because it stays beneath; here a `..` has no honest use at all.
  if (hasParentComponent(path)) {
    errno = EXDEV;
    return -1;
  }
  open_how how{};
  how.flags = static_cast<__u64>(flags | O_CLOEXEC);
  how.resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV;
  const auto fd = static_cast<int>(syscall(SYS_openat2, root, path, &how, sizeof how));
  // ENOSYS: before Linux 5.6. EPERM: sandboxes whose filter does not know the call. A cgroup file system has no links.
  if (fd >= 0 || (errno != ENOSYS && errno != EPERM)) return fd;
  return openat(root, path, flags | O_NOFOLLOW | O_CLOEXEC);
}

ssize_t readSmall(int fd, std::span<char> buffer) {
  for (;;) {
    const ssize_t got = pread(fd, buffer.data(), buffer.size(), 0);
    if (got >= 0 || errno != EINTR) return got;
  }
}

int readOomState(int oomControl, OomState& out) {
  constexpr std::array<std::string_view, 2> kKeys{"oom_kill_disable", "under_oom"};
  std::array<double, kKeys.size()> values{};
  std::array<char, 256> buffer;
  const ssize_t got = readSmall(oomControl, buffer);
  if (got < 0) return errno;
  parseFields({buffer.data(), static_cast<size_t>(got)}, kKeys, values);
  // NaN, which is unequal to itself: not such a file.
  if (values[0] != values[0] || values[1] != values[1]) return EINVAL;
  out = {values[0] != 0, values[1] != 0};
  return 0;
}

int readNumber(int fd, uint64_t& out) {
  std::array<char, 64> buffer;
  const ssize_t got = readSmall(fd, buffer);
  if (got < 0) return errno;
  std::string_view text(buffer.data(), static_cast<size_t>(got));
  text = text.substr(0, text.find_last_not_of(" \n") + 1);
  if (text == "max") {
    out = kNoLimit;
    return 0;
  }
  const auto [end, problem] = std::from_chars(text.data(), text.data() + text.size(), out);
  if (problem != std::errc() || end != text.data() + text.size()) return EINVAL;
  // PAGE_COUNTER_MAX (<linux/page_counter.h>) is the largest number of whole pages below LONG_MAX.
  if (out >= static_cast<uint64_t>(LONG_MAX - sysconf(_SC_PAGESIZE))) out = kNoLimit;
  return 0;
}

int writeText(int fd, std::string_view text) {
  // Control files take each write as one command, so a rest must not be sent as another.
  ssize_t written;
  do {
    written = pwrite(fd, text.data(), text.size(), 0);
  } while (written < 0 && errno == EINTR);
  if (written < 0) return errno;
  return static_cast<size_t>(written) == text.size() ? 0 : EIO;
}

void Listing::start(int directory) {
  directory_ = directory;
  error_ = 0;
  at_ = 0;
  end_ = 0;
}

const char* Listing::next() {
  for (;;) {
    if (at_ >= end_) {
      const auto got = syscall(SYS_getdents64, directory_, buffer_.data(), buffer_.size());
      // A directory that was removed meanwhile has no more entries.
      if (got < 0 && errno != ENOENT) error_ = errno;
      if (got <= 0) return nullptr;
      at_ = 0;
      end_ = static_cast<size_t>(got);
    }
    const auto* entry = reinterpret_cast<const dirent64*>(buffer_.data() + at_);
    at_ += entry->d_reclen;
    const std::string_view name = entry->d_name;
    if (name == "." || name == "..") continue;
    if (entry->d_type == DT_DIR) return entry->d_name;
    if (entry->d_type != DT_UNKNOWN) continue;
    struct stat status {};
    if (fstatat(directory_, entry->d_name, &status, AT_SYMLINK_NOFOLLOW) == 0 && S_ISDIR(status.st_mode)) {
      return entry->d_name;
    }
  }
}

int forEachProcess(int directory, bool deep, VisitProcess visit, void* context) {
  Walk walk{visit, context, false, 0};
  if (listGroup(&walk, directory, ".") && deep) note(walk.error, forEachDescendant(directory, listGroup, &walk));
  return walk.error;
}

int forEachDescendant(int directory, VisitGroup visit, void* context) {
  struct Level {
    Fd fd;
    Listing listing;
  };
  if (isLeaf(directory)) return 0;
  std::array<Level, kMaxDepth> levels;
  size_t depth = 0;
  int error = 0;
  const auto enter = [&](Fd fd) {
    levels[depth].listing.start(fd.get());
    levels[depth++].fd = std::move(fd);
  };
  // Opened anew and not duplicated: a duplicate shares its position with every other listing of this directory.
  Fd top(openat(directory, ".", kDirectoryFlags));
  if (!top) return isGone(errno) ? 0 : errno;
  enter(std::move(top));
  while (depth > 0) {
    Level& level = levels[depth - 1];
    const char* const name = level.listing.next();
    if (name == nullptr) {
      note(error, level.listing.error());
      level.fd.close();
      depth--;
      continue;
    }
    Fd child(openat(level.fd.get(), name, kDirectoryFlags | O_NOFOLLOW));
    if (!child) {
      if (!isGone(errno)) note(error, errno);
      continue;
    }
    if (!visit(context, child.get(), name)) return error;
    if (isLeaf(child.get())) continue;
    if (depth == kMaxDepth) {
      note(error, ELOOP);
    } else {
      enter(std::move(child));
    }
  }
  return error;
}

void readAbove(int directory, std::span<uint64_t> inodes) {
  std::fill(inodes.begin(), inodes.end(), 0);
  struct stat below {};
  if (fstat(directory, &below) != 0) return;
  Fd at(openat(directory, "..", O_PATH | O_DIRECTORY | O_CLOEXEC));
  for (uint64_t& inode : inodes) {
    struct stat status {};
    // Another file system: that was the hierarchy's root.
    if (!at || fstat(at.get(), &status) != 0 || status.st_dev != below.st_dev || status.st_ino == below.st_ino) return;
    inode = status.st_ino;
    below = status;
    at = Fd(openat(at.get(), "..", O_PATH | O_DIRECTORY | O_CLOEXEC));
  }
}

bool hasKillableTask(int directory) {
  bool found = false;
  forEachProcess(directory, true, isKillable, &found);
  return found;
}

bool isEmpty(int directory) {
  bool found = false;
  return forEachProcess(directory, true, isAny, &found) == 0 && !found;
}

bool isListed(int directory, pid_t pid) {
  Sought sought{pid, false};
  forEachProcess(directory, false, isSought, &sought);
  return sought.found;
}

int openProcess(pid_t pid) {
  Line path;
  path.add("/proc/").addSigned(pid);
  return open(path.text(), O_PATH | O_DIRECTORY | O_CLOEXEC);
}

int readLineage(int process, Lineage& out) {
  std::array<char, 1024> buffer;
  std::string_view text;
  if (const int number = readBelow(process, "stat", buffer, text); number != 0) return number;
  // The name in parentheses may hold anything, parentheses too; no later field does (proc(5)).
  const size_t end = text.rfind(')');
  if (end == std::string_view::npos) return EINVAL;
  text.remove_prefix(end + 1);
  const auto read = [&text](auto& number) {
    const auto [last, problem] = std::from_chars(text.data(), text.data() + text.size(), number);
    return problem == std::errc() && last != text.data();
  };
  // The state, field 3, follows the next blank.
  for (int field = 3; field <= 22; field++) {
    const size_t blank = text.find(' ');
    if (blank == std::string_view::npos) return EINVAL;
    text.remove_prefix(blank + 1);
    if ((field == 4 && !read(out.parent)) || (field == 6 && !read(out.session))) return EINVAL;
  }
  return read(out.started) ? 0 : EINVAL;
}

int forEachProcess(VisitProcess visit, void* context) {
  const Fd root(open("/proc", kDirectoryFlags));
  if (!root) return errno;
  Listing listing;
  listing.start(root.get());
  for (const char* name = listing.next(); name != nullptr; name = listing.next()) {
    const std::string_view text(name);
    pid_t pid = 0;
    const auto [end, problem] = std::from_chars(text.data(), text.data() + text.size(), pid);
    if (problem == std::errc() && end == text.data() + text.size() && !visit(context, pid)) break;
  }
  return listing.error();
}

int readStartTime(int process, uint64_t& out) {
  Lineage lineage{};
  const int number = readLineage(process, lineage);
  out = lineage.started;
  return number;
}

int readScoreAdj(int process, int& out) {
  std::array<char, 32> buffer;
  std::string_view text;
  if (const int number = readBelow(process, "oom_score_adj", buffer, text); number != 0) return number;
  return std::from_chars(text.data(), text.data() + text.size(), out).ec == std::errc() ? 0 : EINVAL;
}

int writeScoreAdj(int process, int value) {
#ifdef REPRIEVE_MUTANT_NO_SCORES
  return 0;
#endif
  const Fd file(openat(process, "oom_score_adj", O_WRONLY | O_CLOEXEC));
  if (!file) return errno;
  Line text;
  return writeText(file.get(), text.addSigned(value).view());
}

bool isAlive(pid_t pid, uint64_t started) {
  const Fd pidfd = openPidfd(pid);
  const Fd process(openProcess(pid));
  uint64_t found = 0;
  if (!pidfd || !process || readStartTime(process.get(), found) != 0 || found != started) return false;
  // One that has exited and is not reaped still has its /proc/PID.
  pollfd entry{pidfd.get(), POLLIN, 0};
  return poll(&entry, 1, 0) == 0;
}

Round killRound(int directory, std::span<pid_t> pids, size_t& count) {
  Kills kills{pids, &count, {0, 0, 0}, 0};
  killOne(&kills, directory, ".");
  // Where a part could not be listed, the rounds that follow find it, or the clock ends them.
  forEachDescendant(directory, killOne, &kills);
  return kills.round;
}

}  // namespace reprieve::guard
