#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <string_view>

#include "core/fd.h"
#include "restorer.h"

// Undoing cgroups that the handler made.
namespace reprieve::guard {
namespace {

/** What runs in a window is killed, and waited for no longer than this: its memory is needed. */
constexpr uint64_t kLongestDeath = 300 * kMillisecond;

struct Move {
  int to;
  int root;
  int listed;
};

/** Leaves first: of what was made in it, each round removes what has nothing below it any more. */
bool removeLeaf(void* /*context*/, int directory, const char* name) {
  const Fd parent(openat(directory, "..", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (parent) unlinkat(parent.get(), name, AT_REMOVEDIR);
  return true;
}

bool moveOut(void* context, pid_t pid) {
  auto& move = *static_cast<Move*>(context);
  Line text;
  text.addSigned(pid);
  move.listed++;
  // Ourselves to the root, with a handler that lived inside what it watched: it may be full there, and we are not done.
  const int number = move.to >= 0 && pid != getpid() ? writeText(move.to, text.view()) : ENOENT;
  // Who cannot be moved at all is why the directory cannot be removed: that is said then.
  if (number != 0 && number != ESRCH) writeText(move.root, text.view());
  return true;
}

}  // namespace

/** Moves or kills who is in a cgroup that was made: how many are still to be seen there. */
int Restorer::empty(const FileRecord& record, int directory) const {
  if (partOf(record) == State::kWindows) {
    std::array<pid_t, 64> ignored;
    size_t count = 0;
    return killRound(directory, ignored, count).listed;
  }
  std::array<char, kFileLine> path;
  const int hierarchy = state_.hierarchyOf(record);
  const bool known = decodePath(record.was, path);
  const Fd target(known ? openBeneath(hierarchy, path.data(), O_RDONLY | O_DIRECTORY) : -1);
  const Fd to(target ? openBeneath(target.get(), "cgroup.procs", O_WRONLY) : -1);
  const Fd root(openBeneath(hierarchy, "cgroup.procs", O_WRONLY));
  Move move{to.get(), root.get(), 0};
  forEachProcess(directory, false, moveOut, &move);
  return move.listed;
}

bool Restorer::undoMade(const FileRecord& record) {
  Fd directory;
  int number = 0;
  switch (state_.openGroup(record, directory, number)) {
    case State::Found::kFailed:
      return later(record, "cannot be opened: ", number);
    case State::Found::kGone:
      // As it should be when the handler has removed it.
      if (!options_.ownerLives) skip(record, "gone");
      return true;
    case State::Found::kAnother:
      skip(record, "another cgroup has that name now");
      return true;
    case State::Found::kHere:
      if (options_.ownerLives && record.name == "-") return false;
      break;
  }
  std::array<char, kFileLine> path;
  if (!decodePath(record.path, path)) return later(record, "malformed");
  const std::string_view whole(path.data());
  const size_t slash = whole.rfind('/');
  // The root is nobody's to remove.
  if (slash + 1 == whole.size()) return later(record, "not a cgroup that was made");
  const char* const leaf = slash == std::string_view::npos ? path.data() : path.data() + slash + 1;
  if (slash != std::string_view::npos) path[slash] = '\0';
  const Fd parent(openBeneath(state_.hierarchyOf(record), slash == std::string_view::npos ? "/" : path.data(),
                              O_RDONLY | O_DIRECTORY));
  if (!parent) return later(record, "cannot be opened: ", errno);
  const bool window = partOf(record) == State::kWindows;
  const uint64_t until = std::max(deadline_, window ? clockUs() + kLongestDeath : 0);
  do {
    // A process forks while the list is read; so until nobody is listed. Nobody of ours can be in one that the handler
    // was only about to make.
    for (int round = 0; round < 10 && !options_.dryRun && record.inode != 0; round++) {
      if (empty(record, directory.get()) == 0) break;
    }
    if (window && !options_.dryRun) forEachDescendant(directory.get(), removeLeaf, nullptr);
    number = options_.dryRun || unlinkat(parent.get(), leaf, AT_REMOVEDIR) == 0 ? 0 : errno;
    if (number == 0 || isGone(number)) {
      counts_.restored++;
      Line line = begin(options_.dryRun ? "would remove" : "removed", record);
      if (window) {
        line.add(", what ran in it dies");
      } else {
        line.add(", its processes go to ").add(record.was);
      }
      say(line);
      return true;
    }
    if (clockUs() < until) sleepUs(kStepUs / 10);
  } while (clockUs() < until);
  if (record.inode == 0 && number == EBUSY) {
    skip(record, "another cgroup has that name");
    return true;
  }
  return later(record, "cannot be removed: ", number);
}

void Restorer::undoMade(State::Part part) {
  loud_ = true;
  Held held;
  for (size_t slot = 0; slot < lines_; slot++) {
    if (!load(slot, held) || held.record.kind != Kind::kMade || partOf(held.record) != part) continue;
    if (undoMade(held.record)) clear(slot);
  }
}

}  // namespace reprieve::guard
