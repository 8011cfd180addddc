// A whole state directory: the owner's text as it comes, and records over a hierarchy of plain files. What is put back
// stays below a directory of its own; scores are only looked at, as they would be those of real processes.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

#include "guard/state.h"

namespace {

using namespace reprieve::guard;

void require(bool holds) {
  if (!holds) abort();
}

class Scene {
 public:
  Scene() {
    // In memory where there is such a place: every try writes all of it anew.
    std::string path = access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp";
    path += "/reprieve-fuzz-XXXXXX";
    require(mkdtemp(path.data()) != nullptr);
    root_ = path;
    std::filesystem::create_directories(root_ / "cgroup/a/b");
    std::filesystem::create_directories(root_ / "state");
    directory = open((root_ / "state").c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    require(directory >= 0);
  }
  ~Scene() {
    close(directory);
    std::error_code ignored;
    std::filesystem::remove_all(root_, ignored);
  }

  void write(const char* name, const std::string& text) const { std::ofstream(root_ / name) << text; }

  /** The hierarchy as it is before each try. */
  void renew() const {
    std::filesystem::create_directories(root_ / "cgroup/a/b");
    for (const std::string group : {"cgroup/", "cgroup/a/", "cgroup/a/b/"}) {
      write((group + "memory.oom_control").c_str(), "oom_kill_disable 1\nunder_oom 0\noom_kill 0\n");
      write((group + "memory.limit_in_bytes").c_str(), "1048576\n");
      write((group + "memory.max").c_str(), "1048576\n");
      write((group + "memory.current").c_str(), "524288\n");
      write((group + "freezer.state").c_str(), "FROZEN\n");
      write((group + "cgroup.freeze").c_str(), "1\n");
      write((group + "cgroup.procs").c_str(), "99999999\n");
    }
    const std::string path = root_ / "cgroup";
    write("state/owner", "version 1\nmemory " + path + "\nfreezer " + path + "\nunified " + path + '\n');
  }
  uint64_t inode(const char* group) const {
    struct stat status {};
    require(stat((root_ / group).c_str(), &status) == 0);
    return status.st_ino;
  }

  int directory;

 private:
  std::filesystem::path root_;
};

/** Lines of the input into records: `@a` stands for an inode that fits, and a first `!` for no crc of ours. */
std::string recordsOf(std::string text, size_t width, const Scene& scene) {
  std::string out;
  while (!text.empty()) {
    std::string line = text.substr(0, text.find('\n'));
    text.erase(0, line.size() + 1);
    for (const auto& [mark, group] : {std::pair("@a", "cgroup/a"), {"@b", "cgroup/a/b"}, {"@r", "cgroup"}}) {
      const size_t at = line.find(mark);
      if (at != std::string::npos) line.replace(at, 2, std::to_string(scene.inode(group)));
    }
    if (line.starts_with('!')) {
      line.erase(0, 1);
    } else {
      std::array<char, 16> crc{};
      std::snprintf(crc.data(), crc.size(), "%08x ", crc32(line));
      line.insert(0, crc.data());
    }
    // The last line may end anywhere.
    if (!text.empty() || line.size() >= width) line.resize(width - 1, ' ');
    out += line + '\n';
  }
  return out;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const Scene scene;
  const std::string text(reinterpret_cast<const char*>(data), size);
  const size_t cut = std::min(text.find('#'), text.size());
  scene.renew();
  scene.write("state/files", recordsOf(text.substr(0, cut), kFileLine, scene));
  scene.write("state/scores", cut < text.size() ? recordsOf(text.substr(cut + 1), kScoreLine, scene) : "");

  State state;
  require(state.open(scene.directory) == 0);
  constexpr unsigned kParts = State::kAll & ~State::kScores;
  const State::Options options{.say = [](void*, const char* line) { require(line != nullptr); }};
  static_cast<void>(state.frozen());
  static_cast<void>(state.limitRaised(0));
  state.restore(State::kScores, {.dryRun = true});
  state.restore(State::kAll, {.dryRun = true});
  const State::Counts first = state.restore(kParts, options);
  const State::Counts second = state.restore(kParts, options);
  // What is done is done.
  if (first.pending == 0) require(second.restored == 0 && second.skipped == 0 && second.pending == 0);
  require(second.torn == 0);
  static_cast<void>(state.empty());

  // A text of the owner's that somebody else wrote: what it names is opened, and not more.
  scene.write("state/owner", text);
  State other;
  if (other.open(scene.directory) == 0) static_cast<void>(other.ownerAlive());
  return 0;
}
