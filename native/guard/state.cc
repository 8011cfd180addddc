#include "state.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <climits>

#include "lines.h"
#include "memcg.h"
#include "restorer.h"

namespace reprieve::guard {
namespace {

/** The kernel's charge stock keeps as much from the usage of a memcg whose tasks are throttled. */
constexpr uint64_t kBrakeSlack = uint64_t{1} << 20;

}  // namespace

int State::open(int directory) {
  // Two mount points of the longest kind would not fit, and neither would their cgroups' paths.
  std::array<char, 8192> buffer;
  const Fd file(openBeneath(directory, "owner", O_RDONLY));
  if (!file) return errno;
  const ssize_t got = readSmall(file.get(), buffer);
  if (got < 0) return errno;
  Owner owner;
  parseOwner({buffer.data(), static_cast<size_t>(got)}, owner);
  if (owner.version != 1) return ENOTSUP;
  directory_ = directory;
  pid_ = owner.pid;
  started_ = owner.started;

  const auto openRoot = [](std::string_view path) {
    std::array<char, PATH_MAX> text{};
    if (path.empty() || path.size() >= text.size()) return Fd();
    path.copy(text.data(), path.size());
    return Fd(::open(text.data(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  };
  memory_ = openRoot(owner.memory);
  freezer_ = openRoot(owner.freezer);
  unified_ = openRoot(owner.unified);

  files_ = Fd(openBeneath(directory, "files", O_RDWR));
  if (!files_ && errno != ENOENT) return errno;
  scores_ = Fd(openBeneath(directory, "scores", O_RDWR));
  return !scores_ && errno != ENOENT ? errno : 0;
}

State::Counts State::restore(unsigned parts, const Options& options) {
#ifdef REPRIEVE_MUTANT_NO_RESTORE
  parts = 0;
#endif
#ifdef REPRIEVE_MUTANT_NO_WINDOWS
  parts &= ~static_cast<unsigned>(kWindows);
#endif
  return Restorer(*this, options).run(parts);
}

int State::thawHolding(std::span<const pid_t> pids, const Options& options) {
  return Restorer(*this, options).thawHolding(pids);
}

bool State::frozen() const {
  bool found = false;
  forEachFile(files_.get(), [&](const FileRecord& record) {
    found = record.kind == Kind::kFile && partOf(record) == kFreezers;
    return !found;
  });
  return found;
}

template <typename Matches>
bool State::anyLimit(Matches matches) const {
  bool found = false;
  forEachFile(files_.get(), [&](const FileRecord& record) {
    uint64_t was = 0;
    uint64_t wrote = 0;
    uint64_t usage = 0;
    Fd directory;
    int number = 0;
    found = record.kind == Kind::kFile && parseValue(record.name, record.was, was) &&
            parseValue(record.name, record.wrote, wrote) && openGroup(record, directory, number) == Found::kHere &&
            readUsage(directory.get(), record.name, usage) == 0 && matches(record, was, wrote, usage);
    return !found;
  });
  return found;
}

bool State::braked() const {
  return anyLimit([](const FileRecord& record, uint64_t was, uint64_t wrote, uint64_t usage) {
    return record.name == "memory.high" && wrote < was && usage + kBrakeSlack >= wrote;
  });
}

bool State::limitRaised(uint64_t inode) const {
  return anyLimit([inode](const FileRecord& record, uint64_t was, uint64_t wrote, uint64_t usage) {
    return (inode == 0 || record.inode == inode) && wrote > was && usage > was;
  });
}

bool State::empty() const {
  bool any = false;
  forEachFile(files_.get(), [&](const FileRecord&) {
    any = true;
    return false;
  });
  forEachScore(scores_.get(), [&](size_t, const ScoreRecord&) {
    any = true;
    return false;
  });
  return !any;
}

int State::hierarchyOf(const FileRecord& record) const {
  if (record.name.starts_with("freezer")) return freezer_.get();
  // Every amount of v1 is named like this, and none of v2.
  const bool v1 = record.kind != Kind::kFile || record.name == kOomControl || record.name.ends_with("_in_bytes");
  return v1 ? memory_.get() : unified_.get();
}

State::Found State::openGroup(const FileRecord& record, Fd& out, int& number) const {
  std::array<char, kFileLine> path;
  struct stat status {};
  number = ENODEV;
  const int root = hierarchyOf(record);
  if (root < 0 || !decodePath(record.path, path)) return Found::kFailed;
  out = Fd(openBeneath(root, path.data(), O_RDONLY | O_DIRECTORY));
  if (!out || fstat(out.get(), &status) != 0) {
    number = errno;
    return isGone(number) || number == ENOTDIR ? Found::kGone : Found::kFailed;
  }
  number = 0;
  // One that was about to be made has no inode yet.
  const bool unknown = record.kind == Kind::kMade && record.inode == 0;
  return unknown || status.st_ino == record.inode ? Found::kHere : Found::kAnother;
}

bool State::ownerAlive() const { return pid_ > 0 && isAlive(pid_, started_); }

int State::remove(int base, const char* name) {
  struct stat held {};
  struct stat named {};
  if (fstat(directory_, &held) != 0 || fstatat(base, name, &named, AT_SYMLINK_NOFOLLOW) != 0) return errno;
  if (held.st_ino != named.st_ino || held.st_dev != named.st_dev) return ESTALE;
  // `owner` last: without it nobody could tell what the rest belongs to.
  for (const char* file : {"files", "scores", "record", "guard", "status", "status.new", "owner"}) {
    if (unlinkat(directory_, file, 0) != 0 && errno != ENOENT) return errno;
  }
  return unlinkat(base, name, AT_REMOVEDIR) == 0 ? 0 : errno;
}

}  // namespace reprieve::guard
