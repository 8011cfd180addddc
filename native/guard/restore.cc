#include "restore.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <string_view>

#include "core/fd.h"
#include "memcg.h"
#include "record.h"
#include "state.h"

namespace reprieve::guard {
namespace {

constexpr int kRestored = 0;
constexpr int kPending = 1;
constexpr int kUsage = 2;
constexpr int kDirectoryFlags = O_RDONLY | O_DIRECTORY | O_CLOEXEC;
/** As long as a killed task may take to be gone, or a lock of memory to be let go. */
constexpr int kSettleMs = 1000;

struct Instance {
  const char* name;
  bool dryRun;
};

void print(int fd, Line& line) {
  line.add("\n");
  // A reader who has gone away is no reason to leave something unrestored.
  static_cast<void>(write(fd, line.text(), line.view().size()));
}

void printSaid(void* context, const char* text) {
  Line line;
  print(STDOUT_FILENO, line.add(static_cast<const Instance*>(context)->name).add(": ").add(text));
}

int fail(const Instance& instance, const char* what, int number) {
  Line line;
  print(STDOUT_FILENO, line.add(instance.name).add(": ").add(what).add(" (errno ").addSigned(number).add(")"));
  return kPending;
}

/** Whether the name still leads to what was locked: whoever had it before may have removed it. */
bool isStillThere(int base, const char* name, int directory) {
  struct stat held {};
  struct stat named {};
  return fstat(directory, &held) == 0 && fstatat(base, name, &named, AT_SYMLINK_NOFOLLOW) == 0 &&
         held.st_ino == named.st_ino && held.st_dev == named.st_dev;
}

int restoreInstance(int base, const Instance& instance) {
  const Fd directory(openat(base, instance.name, kDirectoryFlags | O_NOFOLLOW));
  if (!directory) return errno == ENOENT ? kRestored : fail(instance, "cannot be opened", errno);
  const bool locked = flock(directory.get(), LOCK_EX | LOCK_NB) == 0;
  if (!locked && errno != EWOULDBLOCK) return fail(instance, "cannot be locked", errno);
  if (locked && !isStillThere(base, instance.name, directory.get())) return kRestored;

  State state;
  const int number = state.open(directory.get());
  Line line;
  line.add(instance.name);
  if (!locked) {
    line.add(": in use");
    if (state.ownerPid() > 0) line.add(" by pid ").addSigned(state.ownerPid());
    print(STDOUT_FILENO, line);
    return kRestored;
  }
  // The last thing to go before the directory itself: somebody was stopped in between.
  if (number == ENOENT && !instance.dryRun) {
    for (const char* file : {"status", "status.new"}) unlinkat(directory.get(), file, 0);
    if (unlinkat(base, instance.name, AT_REMOVEDIR) == 0) return kRestored;
  }
  if (number != 0) return fail(instance, "its state cannot be read", number);

  Instance copy = instance;
  const State::Counts counts = state.restore(State::kAll, {.dryRun = instance.dryRun,
                                                           .say = printSaid,
                                                           .context = &copy,
                                                           .settleMs = kSettleMs,
                                                           .ownerLives = state.ownerAlive(),
                                                           .sparesClaimed = true});
  const bool all = counts.pending == 0;
  const bool any = counts.restored + counts.skipped + counts.pending + counts.torn > 0;
  line.add(": ").addSigned(counts.restored).add(instance.dryRun ? " to put back, " : " put back, ");
  line.addSigned(counts.skipped).add(" left alone, ").addSigned(counts.pending).add(" pending");
  if (counts.torn > 0) line.add(", ").addSigned(counts.torn).add(" torn");
  if (any) print(STDOUT_FILENO, line);
  if (instance.dryRun || !all || !state.empty()) return all ? kRestored : kPending;
  const int removed = state.remove(base, instance.name);
  return removed == 0 ? kRestored : fail(instance, "cannot be removed", removed);
}

bool isInstance(std::string_view name) { return !name.starts_with('.') && name != "records"; }

int restoreAll(int base, bool dryRun) {
  // A directory's own descriptor, as the listing moves its position.
  const Fd list(openat(base, ".", kDirectoryFlags));
  if (!list) return kPending;
  Listing listing;
  listing.start(list.get());
  int result = kRestored;
  for (const char* name = listing.next(); name != nullptr; name = listing.next()) {
    if (isInstance(name) && restoreInstance(base, {name, dryRun}) != kRestored) result = kPending;
  }
  return listing.error() == 0 ? result : kPending;
}

int usage() {
  Line line;
  print(STDERR_FILENO, line.add("usage: reprieve-guard restore [--dry-run] <base-directory> [<instance>]"));
  return kUsage;
}

}  // namespace

int runRestore(int argc, char** argv) {
  int at = 1;
  const bool dryRun = at < argc && std::string_view(argv[at]) == "--dry-run";
  if (dryRun) at++;
  const int left = argc - at;
  if (left < 1 || left > 2 || std::string_view(argv[at]).starts_with("--")) return usage();
  const char* const only = left == 2 ? argv[at + 1] : nullptr;
  std::signal(SIGPIPE, SIG_IGN);
  if (only != nullptr && (!isInstance(only) || std::string_view(only).find('/') != std::string_view::npos)) {
    return usage();
  }
  const Fd base(open(argv[at], kDirectoryFlags));
  if (!base) {
    // Nobody has ever used it.
    if (errno == ENOENT) return kRestored;
    return fail({argv[at], dryRun}, "cannot be opened", errno);
  }
  return only != nullptr ? restoreInstance(base.get(), {only, dryRun}) : restoreAll(base.get(), dryRun);
}

}  // namespace reprieve::guard
