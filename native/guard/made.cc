#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <string_view>

#include "core/fd.h"
#include "restorer.h"

// Undoing cgroups that the handler made.
namespace reprieve::guard {
namespace {

struct Move {
  int to;
  int root;
  int listed;
};

bool moveOut(void* context, pid_t pid) {
  auto& move = *static_cast<Move*>(context);
  Line text;
  text.addSigned(pid);
  move.listed++;
  const int number = move.to >= 0 ? writeText(move.to, text.view()) : ENOENT;
  // Who cannot be moved at all is why the directory cannot be removed: that is said then.
  if (number != 0 && number != ESRCH) writeText(move.root, text.view());
  return true;
}

}  // namespace

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
      if (options_.ownerLives) return false;
      break;
  }
  std::array<char, kFileLine> path;
  if (!decodePath(record.was, path)) return later(record, "malformed");
  const Fd target(openBeneath(state_.memory_.get(), path.data(), O_RDONLY | O_DIRECTORY));
  const Fd to(target ? openBeneath(target.get(), "cgroup.procs", O_WRONLY) : -1);
  const Fd root(openBeneath(state_.memory_.get(), "cgroup.procs", O_WRONLY));
  if (!decodePath(record.path, path)) return later(record, "malformed");
  const std::string_view whole(path.data());
  const size_t slash = whole.rfind('/');
  // The root is nobody's to remove.
  if (slash + 1 == whole.size()) return later(record, "not a cgroup that was made");
  const char* const leaf = slash == std::string_view::npos ? path.data() : path.data() + slash + 1;
  if (slash != std::string_view::npos) path[slash] = '\0';
  const Fd parent(
      openBeneath(state_.memory_.get(), slash == std::string_view::npos ? "/" : path.data(), O_RDONLY | O_DIRECTORY));
  if (!parent) return later(record, "cannot be opened: ", errno);
  do {
    Move move{to.get(), root.get(), 0};
    // A process forks while the list is read; so until nobody is listed.
    for (int round = 0; round < 10 && !options_.dryRun; round++) {
      move.listed = 0;
      forEachProcess(directory.get(), false, moveOut, &move);
      if (move.listed == 0) break;
    }
    number = options_.dryRun || unlinkat(parent.get(), leaf, AT_REMOVEDIR) == 0 ? 0 : errno;
    if (number == 0 || isGone(number)) {
      counts_.restored++;
      Line line = begin(options_.dryRun ? "would remove" : "removed", record);
      say(line.add(", its processes go to ").add(record.was));
      return true;
    }
    if (clockUs() < deadline_) sleepUs(kStepUs);
  } while (clockUs() < deadline_);
  return later(record, "cannot be removed: ", number);
}

void Restorer::undoMade() {
  loud_ = true;
  Held held;
  for (size_t slot = 0; slot < lines_; slot++) {
    if (load(slot, held) && held.record.kind == Kind::kMade && undoMade(held.record)) clear(slot);
  }
}

}  // namespace reprieve::guard
