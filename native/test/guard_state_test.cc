#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <csignal>
#include <cstdio>
#include <fstream>
#include <sstream>

#include "guard/memcg.h"
#include "guard/restore.h"
#include "guard/state.h"
#include "support.h"

namespace reprieve::guard {

// Found by the tests' CHECK only where the type is.
inline bool operator==(const State::Counts& a, const State::Counts& b) {
  return a.restored == b.restored && a.skipped == b.skipped && a.pending == b.pending && a.torn == b.torn;
}
inline std::ostream& operator<<(std::ostream& out, const State::Counts& counts) {
  return out << counts.restored << " restored, " << counts.skipped << " skipped, " << counts.pending << " pending, "
             << counts.torn << " torn";
}

namespace test {
namespace {

using reprieve::test::Child;
using reprieve::test::leak;
using reprieve::test::Memcg;
using reprieve::test::NoLeaks;
using reprieve::test::sleepForever;
using reprieve::test::TemporaryDirectory;
using reprieve::test::waitFor;

constexpr size_t kMiB = 1 << 20;
constexpr const char* kMemory = "/sys/fs/cgroup/memory";
constexpr const char* kFreezer = "/sys/fs/cgroup/freezer";

ino_t inodeOf(const std::string& path) {
  struct stat status {};
  REQUIRE(stat(path.c_str(), &status) == 0);
  return status.st_ino;
}

std::string readText(const std::string& path) {
  std::stringstream text;
  text << std::ifstream(path).rdbuf();
  return text.str();
}

/** The path of a memcg below the hierarchy. */
std::string below(const Memcg& memcg) { return memcg.directory().path().substr(std::string(kMemory).size()); }

std::string disabled(const Memcg& memcg) {
  const std::string text = memcg.read("memory.oom_control");
  return text.substr(std::string("oom_kill_disable ").size(), 1);
}

uint64_t startOf(pid_t pid) {
  const Fd process(openProcess(pid));
  uint64_t started = 0;
  REQUIRE(readStartTime(process.get(), started) == 0);
  return started;
}

int scoreOf(pid_t pid) {
  const Fd process(openProcess(pid));
  int score = 4711;
  CHECK(readScoreAdj(process.get(), score) == 0);
  return score;
}

void setScore(pid_t pid, int score) {
  const Fd process(openProcess(pid));
  REQUIRE(writeScoreAdj(process.get(), score) == 0);
}

/** Whether a process here may be made one that the kernel never kills. */
bool mayExempt() {
  Child child([] {
    const Fd self(openProcess(getpid()));
    if (writeScoreAdj(self.get(), -1000) == 0) raise(SIGKILL);
  });
  return child.reap() == SIGKILL;
}

/** An instance's directory, written as the handler writes it. */
class Scene {
 public:
  Scene() {
    REQUIRE(mkdir(path().c_str(), 0700) == 0);
    owner("version 1\npid 1\nstarted 1\nmemory " + std::string(kMemory) + "\nfreezer " + kFreezer + "\n");
  }
  ~Scene() { closeDirectory(); }

  std::string path() const { return temporary.path() + "/one"; }
  std::string base() const { return temporary.path(); }
  void owner(const std::string& text) const { std::ofstream(path() + "/owner") << text; }
  /** A hierarchy of plain files, for all of them. */
  void fake() const {
    const std::string root = base() + "/.root";
    mkdir(root.c_str(), 0700);
    owner("version 1\npid 1\nstarted 1\nmemory " + root + "\nfreezer " + root + "\nunified " + root + "\n");
  }
  std::string fakeGroup(const std::string& name) const {
    const std::string path = base() + "/.root" + name;
    REQUIRE(mkdir(path.c_str(), 0700) == 0);
    std::ofstream(path + "/memory.current") << "0\n";
    return path;
  }

  void raw(const char* file, const std::string& line) { std::ofstream(path() + '/' + file, std::ios::app) << line; }
  void add(const char* file, size_t width, const std::string& text) {
    std::array<char, 16> crc{};
    std::snprintf(crc.data(), crc.size(), "%08x ", crc32(text));
    std::string line = crc.data() + text;
    REQUIRE(line.size() < width);
    line.resize(width - 1, ' ');
    raw(file, line + '\n');
  }
  void file(const std::string& text) { add("files", kFileLine, text); }
  void file(const char* name, const std::string& group, ino_t inode, const std::string& values) {
    file("file " + std::string(name) + ' ' + std::to_string(inode) + ' ' + values + ' ' + group);
  }
  void armed(const Memcg& memcg) { file("memory.oom_control", below(memcg), memcg.directory().inode(), "0 1"); }
  void score(const std::string& text) { add("scores", kScoreLine, text); }
  void score(pid_t pid, uint64_t started, uint64_t raisedAt, int was, int wrote, ino_t home) {
    score(std::to_string(pid) + ' ' + std::to_string(started) + ' ' + std::to_string(raisedAt) + ' ' +
          std::to_string(was) + ' ' + std::to_string(wrote) + ' ' + std::to_string(home));
  }

  State& state() {
    if (!directory_) {
      directory_ = Fd(open(path().c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
      REQUIRE(opened_.open(directory_.get()) == 0);
    }
    return opened_;
  }
  State::Counts restore(unsigned parts = State::kAll, bool dryRun = false, int settleMs = 0) {
    said.clear();
    return state().restore(parts, {.dryRun = dryRun, .say = take, .context = this, .settleMs = settleMs});
  }
  void closeDirectory() {
    opened_ = State();
    directory_.close();
  }
  bool heard(const std::string& text) const { return said.find(text) != std::string::npos; }

  TemporaryDirectory temporary;
  std::string said;

 private:
  static void take(void* context, const char* line) { static_cast<Scene*>(context)->said += std::string(line) + '\n'; }

  Fd directory_;
  State opened_;
};

State::Counts nothing() { return {0, 0, 0, 0}; }

/** A cgroup of the freezer hierarchy; thawed and removed at the end. */
class Freezer {
 public:
  Freezer() {
    static int count = 0;
    name = "/reprieve-test-native-" + std::to_string(getpid()) + "-f" + std::to_string(++count);
    REQUIRE(mkdir(path().c_str(), 0755) == 0);
  }
  ~Freezer() {
    write("freezer.state", "THAWED");
    CHECK(waitFor([this] {
      std::stringstream pids(readText(path() + "/cgroup.procs"));
      for (pid_t pid = 0; pids >> pid;) {
        kill(pid, SIGKILL);
        waitpid(pid, nullptr, WNOHANG);
      }
      return rmdir(path().c_str()) == 0;
    }));
  }
  std::string path() const { return kFreezer + name; }
  void write(const char* file, const std::string& text) const { std::ofstream(path() + '/' + file) << text; }
  std::string state() const { return readText(path() + "/freezer.state"); }
  void freeze(pid_t pid) const {
    write("cgroup.procs", std::to_string(pid));
    write("freezer.state", "FROZEN");
    CHECK(waitFor([this] { return state() == "FROZEN\n"; }));
  }

  std::string name;
};

#define NEEDS_FREEZER()                              \
  NEEDS_MEMCG();                                     \
  if (access(kFreezer, W_OK) != 0) {                 \
    MESSAGE("skipped: needs the freezer hierarchy"); \
    return;                                          \
  }

// --- On plain files ---

TEST_CASE_FIXTURE(NoLeaks, "State puts back what has the value that we wrote, and nothing else") {
  Scene scene;
  scene.fake();
  const auto group = [&scene](const char* name, const std::string& high) {
    const std::string path = scene.fakeGroup(name);
    std::ofstream(path + "/memory.high") << high;
    return path;
  };
  const std::string ours = group("/ours", "2097152\n");
  const std::string same = group("/same", "1048576\n");
  const std::string foreign = group("/foreign", "3145728\n");
  const std::string again = group("/again", "2097152\n");
  scene.file("memory.high", "/ours", inodeOf(ours), "1048576 2097152");
  scene.file("memory.high", "/same", inodeOf(same), "1048576 2097152");
  scene.file("memory.high", "/foreign", inodeOf(foreign), "1048576 2097152");
  scene.file("memory.high", "/again", inodeOf(again) + 1, "1048576 2097152");
  scene.file("memory.high", "/gone", 77, "1048576 2097152");
  scene.raw("files", std::string(100, 'x') + std::string(kFileLine - 101, ' ') + '\n');
  scene.raw("files", std::string(kFileLine, '\0'));

  SUBCASE("dry run") {
    CHECK(scene.restore(State::kAll, true) == State::Counts{1, 4, 0, 1});
    CHECK(scene.heard("would put back: memory.high of /ours: 1048576\n"));
    CHECK(readText(ours + "/memory.high") == "2097152\n");
    CHECK_FALSE(scene.state().empty());
    CHECK(scene.restore(State::kAll, true) == State::Counts{1, 4, 0, 1});
  }
  SUBCASE("in earnest, and then nothing") {
    CHECK_FALSE(scene.state().empty());
    CHECK(scene.restore() == State::Counts{1, 4, 0, 1});
    CHECK(readText(ours + "/memory.high") == "1048576\n");
    CHECK(readText(same + "/memory.high") == "1048576\n");
    CHECK(readText(foreign + "/memory.high") == "3145728\n");
    CHECK(readText(again + "/memory.high") == "2097152\n");
    CHECK(scene.heard("put back: memory.high of /ours: 1048576\n"));
    CHECK(scene.heard("left alone: memory.high of /same: already as it was\n"));
    CHECK(scene.heard("left alone: memory.high of /foreign: changed by somebody else\n"));
    CHECK(scene.heard("left alone: memory.high of /again: another cgroup has that name now\n"));
    CHECK(scene.heard("left alone: memory.high of /gone: gone\n"));
    CHECK(scene.state().empty());
    const std::string files = readText(scene.path() + "/files");
    CHECK(files.size() == 7 * kFileLine);
    CHECK(isBlank(files));
    CHECK(scene.restore() == nothing());
    CHECK(scene.said.empty());
  }
  SUBCASE("only the parts that are asked for") {
    CHECK(scene.restore(State::kFreezers | State::kKillers | State::kScores | State::kMade) ==
          State::Counts{0, 0, 0, 1});
    CHECK(readText(ours + "/memory.high") == "2097152\n");
    CHECK(scene.restore(State::kLimits) == State::Counts{1, 4, 0, 0});
  }
}

TEST_CASE_FIXTURE(NoLeaks, "each file is looked for in its own hierarchy") {
  Scene scene;
  std::string owner = "version 1\npid 1\nstarted 1\n";
  for (const std::string hierarchy : {"memory", "freezer", "unified"}) {
    const std::string root = scene.base() + "/." + hierarchy;
    REQUIRE(mkdir(root.c_str(), 0700) == 0);
    REQUIRE(mkdir((root + "/one").c_str(), 0700) == 0);
    std::ofstream(root + "/one/memory.current") << "0\n";
    owner += hierarchy + ' ' + root + '\n';
  }
  scene.owner(owner);
  const auto check = [&scene](const char* hierarchy, const char* name, const char* was, const char* wrote) {
    const std::string group = scene.base() + "/." + hierarchy + "/one";
    std::ofstream(group + '/' + name) << wrote << '\n';
    scene.file(name, "/one", inodeOf(group), std::string(was) + ' ' + wrote);
    CAPTURE(name);
    CHECK(scene.restore() == State::Counts{1, 0, 0, 0});
    CHECK(readText(group + '/' + name).starts_with(was));
  };
  for (const char* name : {"memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.soft_limit_in_bytes",
                           "memory.oom_reserve_in_bytes"}) {
    check("memory", name, "1048576", "2097152");
  }
  check("freezer", "freezer.state", "THAWED", "FROZEN");
  for (const char* name : {"memory.high", "memory.low", "memory.min", "memory.swap.max"}) {
    check("unified", name, "1048576", "2097152");
  }
  check("unified", "cgroup.freeze", "0", "1");
}

TEST_CASE_FIXTURE(NoLeaks, "a file that ends within a line is read up to there") {
  Scene scene;
  scene.fake();
  const std::string group = scene.fakeGroup("/a");
  std::ofstream(group + "/cgroup.freeze") << "1\n";
  scene.file("cgroup.freeze", "/a", inodeOf(group), "0 1");
  scene.raw("files", "12345678 file mem");
  CHECK(scene.state().frozen());
  CHECK(scene.restore() == State::Counts{1, 0, 0, 1});
  CHECK(readText(group + "/cgroup.freeze") == "0\n");
  CHECK_FALSE(scene.state().frozen());
  CHECK(isBlank(readText(scene.path() + "/files")));
}

TEST_CASE_FIXTURE(NoLeaks, "memory.max is never put below what is in use") {
  Scene scene;
  scene.fake();
  const std::string group = scene.fakeGroup("/a");
  std::ofstream(group + "/memory.max") << "2097152\n";
  std::ofstream(group + "/memory.current") << "1048577\n";
  scene.file("memory.max", "/a", inodeOf(group), "1048576 2097152");
  CHECK(scene.state().limitRaised(0));
  CHECK(scene.restore(State::kAll, true) == State::Counts{0, 0, 1, 0});
  CHECK(scene.restore() == State::Counts{0, 0, 1, 0});
  CHECK(scene.heard("pending: memory.max of /a: more than that is in use\n"));
  CHECK(readText(group + "/memory.max") == "2097152\n");
  CHECK_FALSE(scene.state().empty());
  std::ofstream(group + "/memory.current") << "1048576\n";
  CHECK_FALSE(scene.state().limitRaised(0));
  CHECK(scene.restore() == State::Counts{1, 0, 0, 0});
  CHECK(readText(group + "/memory.max") == "1048576\n");
  CHECK(scene.state().empty());
}

TEST_CASE_FIXTURE(NoLeaks, "v2's limits go back up whatever is in use, and memory.high not down below it") {
  Scene scene;
  scene.fake();
  const std::string group = scene.fakeGroup("/a");
  std::ofstream(group + "/memory.current") << "3145728\n";
  const auto change = [&](const char* name, const std::string& was, const std::string& wrote) {
    std::ofstream(group + '/' + name) << wrote << '\n';
    scene.file(name, "/a", inodeOf(group), was + ' ' + wrote);
  };
  SUBCASE("raised") {
    change("memory.high", "1048576", "4194304");
    CHECK(scene.state().limitRaised(0));
    CHECK(scene.restore() == State::Counts{0, 0, 1, 0});
    CHECK(scene.heard("pending: memory.high of /a: more than that is in use\n"));
    std::ofstream(group + "/memory.current") << "1048576\n";
    CHECK(scene.restore() == State::Counts{1, 0, 0, 0});
    CHECK(readText(group + "/memory.high") == "1048576\n");
  }
  SUBCASE("lowered") {
    // More may be in use than either, as memory.high is not held strictly.
    change("memory.high", "2097152", "1048576");
    change("memory.max", "max", "4194304");
    change("memory.oom.group", "0", "1");
    change("memory.min", "0", "1048576");
    CHECK_FALSE(scene.state().limitRaised(0));
    CHECK(scene.restore() == State::Counts{4, 0, 0, 0});
    CHECK(readText(group + "/memory.high") == "2097152\n");
  }
  CHECK(scene.state().empty());
}

TEST_CASE_FIXTURE(NoLeaks, "no limit is no limit, whatever it is called, and limits are whole pages") {
  Scene scene;
  scene.fake();
  const std::string group = scene.fakeGroup("/a");
  std::ofstream(group + "/memory.high") << "max\n";
  std::ofstream(group + "/memory.limit_in_bytes") << "8192000\n";
  SUBCASE("as written") {
    scene.file("memory.high", "/a", inodeOf(group), "777 9223372036854771712");
    scene.file("memory.limit_in_bytes", "/a", inodeOf(group), "4096000 8192001");
    CHECK(scene.restore() == State::Counts{2, 0, 0, 0});
    CHECK(readText(group + "/memory.high") == "777\n");
    CHECK(readText(group + "/memory.limit_in_bytes") == "4096000\n");
  }
  SUBCASE("as it was") {
    scene.file("memory.high", "/a", inodeOf(group), "-1 4096");
    scene.file("memory.limit_in_bytes", "/a", inodeOf(group), "8192001 4096");
    CHECK(scene.restore() == State::Counts{0, 2, 0, 0});
    CHECK(scene.said.find("somebody") == std::string::npos);
  }
}

TEST_CASE_FIXTURE(NoLeaks, "of several changes of a file the oldest value is put back") {
  Scene scene;
  scene.fake();
  const std::string group = scene.fakeGroup("/a");
  const ino_t inode = inodeOf(group);
  const auto holds = [&](const char* before) { std::ofstream(group + "/memory.high") << before << '\n'; };
  std::string after;
  SUBCASE("in any order") {
    SUBCASE("first things first") {
      scene.file("memory.high", "/a", inode, "1000000 2000000");
      scene.file("memory.high", "/a", inode, "2000000 3000000");
    }
    SUBCASE("the other way round") {
      scene.file("memory.high", "/a", inode, "2000000 3000000");
      scene.file("memory.high", "/a", inode, "1000000 2000000");
    }
    SUBCASE("the last was written down and not made") {
      scene.file("memory.high", "/a", inode, "3000000 4000000");
      scene.file("memory.high", "/a", inode, "2000000 3000000");
      scene.file("memory.high", "/a", inode, "1000000 2000000");
    }
    holds("3000000");
    after = "1000000\n";
  }
  SUBCASE("none was made") {
    scene.file("memory.high", "/a", inode, "1000000 2000000");
    scene.file("memory.high", "/a", inode, "2000000 3000000");
    holds("1000000");
    after = "1000000\n";
  }
  SUBCASE("somebody came between: what he wrote is what was") {
    scene.file("memory.high", "/a", inode, "1000000 2000000");
    scene.file("memory.high", "/a", inode, "1500000 3000000");
    holds("3000000");
    after = "1500000\n";
  }
  SUBCASE("there and back") {
    scene.file("memory.high", "/a", inode, "1000000 2000000");
    scene.file("memory.high", "/a", inode, "2000000 1000000");
    SUBCASE("") { holds("1000000"); }
    SUBCASE("") { holds("2000000"); }
    after = "1000000\n";
  }
  SUBCASE("more than are looked at together") {
    for (int i = 1; i <= 40; i++) {
      scene.file("memory.high", "/a", inode, std::to_string(i * 100000) + ' ' + std::to_string(i * 100000 + 100000));
    }
    // What that comes to does not matter; that it ends does.
    holds("200000");
    after = "100000\n";
  }
  scene.restore();
  CHECK(readText(group + "/memory.high") == after);
  CHECK(scene.state().empty());
  CHECK(scene.restore() == nothing());
}

TEST_CASE_FIXTURE(NoLeaks, "paths may hold anything and be long") {
  Scene scene;
  scene.fake();
  std::string path;
  std::string encoded;
  SUBCASE("odd bytes") {
    path = "/a b%\n\x7f\xff";
    encoded = "/a%20b%25%0a%7F\xff";
  }
  SUBCASE("long") {
    for (int i = 0; i < 3; i++) {
      encoded += '/' + std::string(250, 'x');
      if (i < 2) scene.fakeGroup(encoded);
    }
    path = encoded;
  }
  const std::string group = scene.fakeGroup(path);
  std::ofstream(group + "/cgroup.freeze") << "1\n";
  scene.file("cgroup.freeze", encoded, inodeOf(group), "0 1");
  CHECK(scene.restore() == State::Counts{1, 0, 0, 0});
  CHECK(scene.heard("cgroup.freeze of " + encoded + ": 0\n"));
  CHECK(readText(group + "/cgroup.freeze") == "0\n");
}

TEST_CASE_FIXTURE(NoLeaks, "paths lead nowhere else") {
  Scene scene;
  scene.fake();
  const std::string outside = scene.base() + "/outside";
  REQUIRE(mkdir(outside.c_str(), 0700) == 0);
  std::ofstream(outside + "/cgroup.freeze") << "1\n";
  REQUIRE(symlink(outside.c_str(), (scene.base() + "/.root/link").c_str()) == 0);
  scene.file("cgroup.freeze", "/../outside", inodeOf(outside), "0 1");
  scene.file("cgroup.freeze", "/link", inodeOf(outside), "0 1");
  CHECK(scene.restore() == State::Counts{0, 0, 2, 0});
  CHECK(readText(outside + "/cgroup.freeze") == "1\n");
}

TEST_CASE_FIXTURE(NoLeaks, "an owner that tells little") {
  Scene scene;
  State state;
  const Fd directory(open(scene.path().c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  SUBCASE("no file") {
    unlink((scene.path() + "/owner").c_str());
    CHECK(state.open(directory.get()) == ENOENT);
  }
  SUBCASE("another version") {
    scene.owner("version 2\npid 1\nstarted 1\n");
    CHECK(state.open(directory.get()) == ENOTSUP);
  }
  SUBCASE("nothing") {
    scene.owner("");
    CHECK(state.open(directory.get()) == ENOTSUP);
  }
  SUBCASE("no hierarchy: what cannot be done stays") {
    scene.owner("version 1\n");
    scene.file("memory.oom_control", "/a", 1, "0 1");
    REQUIRE(state.open(directory.get()) == 0);
    CHECK_FALSE(state.ownerAlive());
    CHECK(state.restore(State::kAll, {}) == State::Counts{0, 0, 1, 0});
    CHECK_FALSE(state.empty());
  }
  SUBCASE("a hierarchy that is not there") {
    scene.owner("version 1\nmemory /none\n");
    scene.file("memory.oom_control", "/a", 1, "0 1");
    REQUIRE(state.open(directory.get()) == 0);
    CHECK(state.restore(State::kAll, {}) == State::Counts{0, 0, 1, 0});
  }
  SUBCASE("alive") {
    scene.owner("version 1\npid " + std::to_string(getpid()) + "\nstarted " + std::to_string(startOf(getpid())) + '\n');
    REQUIRE(state.open(directory.get()) == 0);
    CHECK(state.ownerAlive());
    CHECK(state.ownerPid() == getpid());
    CHECK(state.empty());
    CHECK(state.restore(State::kAll, {}) == nothing());
  }
  SUBCASE("another process has its number now") {
    scene.owner("version 1\npid " + std::to_string(getpid()) + "\nstarted " + std::to_string(startOf(getpid()) + 1));
    REQUIRE(state.open(directory.get()) == 0);
    CHECK_FALSE(state.ownerAlive());
  }
}

TEST_CASE_FIXTURE(NoLeaks, "State::remove takes the whole directory, and only that") {
  Scene scene;
  scene.raw("files", "");
  scene.raw("scores", "");
  scene.raw("record", "x");
  const Fd base(open(scene.base().c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  SUBCASE("its own") {
    CHECK(scene.state().remove(base.get(), "one") == 0);
    CHECK(access(scene.path().c_str(), F_OK) != 0);
  }
  SUBCASE("another of that name") {
    scene.state();
    REQUIRE(rename(scene.path().c_str(), (scene.base() + "/two").c_str()) == 0);
    REQUIRE(mkdir(scene.path().c_str(), 0700) == 0);
    CHECK(scene.state().remove(base.get(), "one") == ESTALE);
    CHECK(access((scene.base() + "/two/owner").c_str(), F_OK) == 0);
  }
  SUBCASE("with something strange in it") {
    scene.raw("other", "x");
    CHECK(scene.state().remove(base.get(), "one") == ENOTEMPTY);
  }
}

// --- oom_score_adj, with processes of a plain file ---

TEST_CASE_FIXTURE(NoLeaks, "oom_score_adj goes back to its process and to those born since") {
  NEEDS_MEMCG();
  Scene scene;
  scene.fake();
  const std::string home = scene.fakeGroup("/home");
  const std::string deeper = scene.fakeGroup("/home/deeper");
  const std::string elsewhere = scene.fakeGroup("/elsewhere");
  const Child parent(sleepForever);
  const Child other(sleepForever);
  const Child changed(sleepForever);
  const Child born(sleepForever);
  const Child below(sleepForever);
  const Child own(sleepForever);
  const Child stranger(sleepForever);
  const Child reused(sleepForever);
  std::ofstream(home + "/cgroup.procs") << parent.pid() << '\n'
                                        << other.pid() << '\n'
                                        << changed.pid() << '\n'
                                        << born.pid() << '\n'
                                        << own.pid() << '\n'
                                        << reused.pid() << "\n99999999\n";
  std::ofstream(deeper + "/cgroup.procs") << below.pid() << '\n';
  std::ofstream(elsewhere + "/cgroup.procs") << stranger.pid() << '\n';
  for (const Child* child : {&parent, &born, &below, &stranger, &reused}) setScore(child->pid(), 900);
  setScore(other.pid(), 800);
  setScore(changed.pid(), 700);
  setScore(own.pid(), 650);

  const uint64_t now = startOf(reused.pid());
  const ino_t inode = inodeOf(home);
  scene.score(parent.pid(), startOf(parent.pid()), now, 100, 900, inode);
  scene.score(other.pid(), startOf(other.pid()), now, 50, 800, inode);
  scene.score(changed.pid(), startOf(changed.pid()), now, 0, 600, inode);
  // Somebody else had this number then; who has it now was born of one that we raised.
  scene.score(reused.pid(), startOf(reused.pid()) - 100, now - 50, 120, 900, inode);
  scene.raw("scores", std::string(20, 'x') + std::string(kScoreLine - 21, ' ') + '\n');

  SUBCASE("deep") {
    scene.file("home deep " + std::to_string(inode) + " 0 0 /home");
    CHECK(scene.restore(State::kAll, true) == State::Counts{5, 2, 0, 1});
    CHECK(scoreOf(parent.pid()) == 900);
    CHECK(scene.restore() == State::Counts{5, 2, 0, 1});
    CHECK(scoreOf(below.pid()) == 100);
  }
  SUBCASE("flat") {
    scene.file("home flat " + std::to_string(inode) + " 0 0 /home");
    CHECK(scene.restore() == State::Counts{4, 2, 0, 1});
    CHECK(scoreOf(below.pid()) == 900);
  }
  CHECK(scoreOf(parent.pid()) == 100);
  CHECK(scoreOf(other.pid()) == 50);
  CHECK(scoreOf(changed.pid()) == 700);
  // The lowest of those that were given the same.
  CHECK(scoreOf(born.pid()) == 100);
  CHECK(scoreOf(reused.pid()) == 100);
  CHECK(scoreOf(own.pid()) == 650);
  CHECK(scoreOf(stranger.pid()) == 900);
  CHECK(scene.state().empty());
  CHECK(scene.restore() == nothing());
}

TEST_CASE_FIXTURE(NoLeaks, "who was there before the raise has its value from somewhere else") {
  NEEDS_MEMCG();
  Scene scene;
  scene.fake();
  const std::string home = scene.fakeGroup("/home");
  const Child raised(sleepForever);
  const Child before(sleepForever);
  std::ofstream(home + "/cgroup.procs") << before.pid() << '\n';
  setScore(before.pid(), 900);
  scene.file("home deep " + std::to_string(inodeOf(home)) + " 0 0 /home");
  int expected = 900;
  uint64_t raisedAt = startOf(before.pid()) + 2;
  SUBCASE("before") {}
  SUBCASE("in the same tick, as far as one can tell") {
    raisedAt -= 1;
    expected = 0;
  }
  scene.score(raised.pid(), startOf(raised.pid()), raisedAt, 0, 900, inodeOf(home));
  scene.restore();
  CHECK(scoreOf(before.pid()) == expected);
}

TEST_CASE_FIXTURE(NoLeaks, "a score without its home is put back all the same") {
  NEEDS_MEMCG();
  Scene scene;
  scene.fake();
  const Child child(sleepForever);
  setScore(child.pid(), 900);
  scene.score(child.pid(), startOf(child.pid()), 1, 0, 900, 4711);
  SUBCASE("none") {}
  SUBCASE("gone") { scene.file("home deep 4711 0 0 /gone"); }
  SUBCASE("another") {
    scene.fakeGroup("/home");
    scene.file("home deep 4711 0 0 /home");
  }
  CHECK(scene.restore() == State::Counts{1, 0, 0, 0});
  CHECK(scoreOf(child.pid()) == 0);
  CHECK(scene.state().empty());
}

TEST_CASE_FIXTURE(NoLeaks, "what was born of a process without a home is known by its descent") {
  Scene scene;
  scene.fake();
  const auto nothingElse = [] {
    setsid();
    sleepForever();
  };
  // Holds the same value, and comes from somebody else.
  const Child stranger(nothingElse);
  std::array<int, 2> pipe{};
  REQUIRE(pipe2(pipe.data(), O_CLOEXEC) == 0);
  Child raised([&] {
    setsid();
    setScore(getpid(), 900);
    const auto tell = [&](pid_t pid) { CHECK(write(pipe[1], &pid, sizeof pid) == sizeof pid); };
    // One loses its parent and stays in the session, the other leaves the session and keeps its parent.
    if (fork() == 0) {
      const pid_t orphan = fork();
      if (orphan == 0) sleepForever();
      tell(orphan);
      _exit(0);
    }
    if (const pid_t leaver = fork(); leaver == 0) {
      setsid();
      tell(getpid());
    }
    sleepForever();
  });
  const auto hear = [&] {
    pid_t pid = 0;
    REQUIRE(read(pipe[0], &pid, sizeof pid) == sizeof pid);
    return pid;
  };
  const std::array<pid_t, 2> born{hear(), hear()};
  setScore(stranger.pid(), 900);
  scene.score(raised.pid(), startOf(raised.pid()), 1, 100, 900, 0);
  scene.restore();
  CHECK(scoreOf(raised.pid()) == 100);
  for (const pid_t pid : born) CHECK(scoreOf(pid) == 100);
  CHECK(scoreOf(stranger.pid()) == 900);
  CHECK(scene.state().empty());
  for (const pid_t pid : born) kill(pid, SIGKILL);
  for (const int end : pipe) close(end);
}

TEST_CASE_FIXTURE(NoLeaks, "hundreds of scores, and a home as large") {
  NEEDS_MEMCG();
  Scene scene;
  scene.fake();
  const std::string home = scene.fakeGroup("/home");
  const Child child(sleepForever);
  setScore(child.pid(), 900);
  std::ofstream procs(home + "/cgroup.procs");
  // Nobody has such a number (PID_MAX_LIMIT is 2^22).
  for (int i = 0; i < 2000; i++) procs << 5000000 + i << '\n';
  procs << child.pid() << '\n';
  procs.close();
  for (int i = 0; i < 700; i++) scene.score(5000000 + i, 1, 1, 10, 900, inodeOf(home));
  scene.file("home deep " + std::to_string(inodeOf(home)) + " 0 0 /home");
  CHECK(scene.restore() == State::Counts{1, 700, 0, 0});
  CHECK(scoreOf(child.pid()) == 10);
  CHECK(scene.state().empty());
}

// --- On real memcgs ---

TEST_CASE_FIXTURE(NoLeaks, "the kernel's killer goes back to whoever had it, and to those that were born without") {
  NEEDS_MEMCG();
  Scene scene;
  const Memcg armed;
  const Memcg recorded(&armed);
  armed.write("memory.oom_control", "1");
  recorded.write("memory.oom_control", "1");
  const Memcg kept(&armed);
  const Memcg inherited(&armed);
  const Memcg deeper(&inherited);
  const Memcg claimed(&armed);
  REQUIRE(*claimed.directory().claim());
  CHECK(disabled(deeper) == "1");
  const Memcg beside;
  beside.write("memory.oom_control", "1");

  scene.file("keep memory.oom_control " + std::to_string(kept.directory().inode()) + " 1 1 " + below(kept));
  scene.armed(armed);
  scene.armed(recorded);
  CHECK(scene.restore(State::kAll, true) == State::Counts{4, 0, 0, 0});
  CHECK(disabled(armed) == "1");
  CHECK(scene.restore() == State::Counts{4, 0, 0, 0});
  for (const Memcg* memcg : {&armed, &recorded, &inherited, &deeper}) CHECK(disabled(*memcg) == "0");
  for (const Memcg* memcg : {&kept, &claimed, &beside}) CHECK(disabled(*memcg) == "1");
  CHECK(scene.state().empty());
  CHECK(scene.restore() == nothing());
  claimed.directory().unclaim();
}

TEST_CASE_FIXTURE(NoLeaks, "what was born below is seen to even if somebody wrote the 0 above") {
  NEEDS_MEMCG();
  Scene scene;
  const Memcg armed;
  armed.write("memory.oom_control", "1");
  const Memcg inherited(&armed);
  armed.write("memory.oom_control", "0");
  scene.armed(armed);
  CHECK(scene.restore() == State::Counts{1, 1, 0, 0});
  CHECK(disabled(inherited) == "0");
  CHECK(scene.state().empty());
}

TEST_CASE_FIXTURE(NoLeaks, "what another handler has armed since waits for that one, unless it is our own") {
  NEEDS_MEMCG();
  Scene scene;
  const Memcg armed;
  armed.write("memory.oom_control", "1");
  scene.armed(armed);
  REQUIRE(*armed.directory().claim());
  const State::Options options{.say = nullptr, .sparesClaimed = true};
  CHECK(scene.state().restore(State::kAll, options) == State::Counts{0, 0, 1, 0});
  CHECK(disabled(armed) == "1");
  SUBCASE("left") {
    armed.directory().unclaim();
    CHECK(scene.state().restore(State::kAll, options) == State::Counts{1, 0, 0, 0});
  }
  SUBCASE("our own") {
    CHECK(scene.restore() == State::Counts{1, 0, 0, 0});
    armed.directory().unclaim();
  }
  CHECK(disabled(armed) == "0");
  CHECK(scene.state().empty());
}

TEST_CASE_FIXTURE(NoLeaks, "a memcg that was made anew is not ours") {
  NEEDS_MEMCG();
  Scene scene;
  const Memcg memcg;
  scene.file("memory.oom_control", below(memcg), memcg.directory().inode() + 1, "0 1");
  memcg.write("memory.oom_control", "1");
  const Memcg child(&memcg);
  CHECK(scene.restore() == State::Counts{0, 1, 0, 0});
  CHECK(disabled(memcg) == "1");
  CHECK(disabled(child) == "1");
  CHECK(scene.state().empty());
}

TEST_CASE_FIXTURE(NoLeaks, "waiters are handed to the kernel, and scores follow when they are gone") {
  NEEDS_MEMCG();
  Scene scene;
  const Memcg memcg;
  memcg.park(32 * kMiB);
  Child leaker(memcg.inside([] { leak(64 * kMiB); }));
  Child bystander(memcg.inside(sleepForever));
  CHECK(waitFor([&] { return memcg.underOom(); }));
  setScore(leaker.pid(), 1000);
  scene.armed(memcg);
  scene.file("home flat " + std::to_string(memcg.directory().inode()) + " 0 0 " + below(memcg));
  scene.score(leaker.pid(), startOf(leaker.pid()), 1, 0, 1000, memcg.directory().inode());
  const State::Counts counts = scene.restore(State::kAll, false, 2000);
  CHECK(counts.pending == 0);
  CHECK_FALSE(memcg.underOom());
  CHECK(leaker.reap() == SIGKILL);
  CHECK(waitpid(bystander.pid(), nullptr, WNOHANG) == 0);
  CHECK(scene.state().empty());
}

TEST_CASE_FIXTURE(NoLeaks, "tasks that the kernel may not kill stay parked, and are said") {
  NEEDS_MEMCG();
  if (!mayExempt()) {
    MESSAGE("skipped: needs CAP_SYS_RESOURCE");
    return;
  }
  Scene scene;
  const Memcg memcg;
  memcg.park(32 * kMiB);
  const Child leaker(memcg.inside([] {
    const Fd self(openProcess(getpid()));
    if (writeScoreAdj(self.get(), -1000) != 0) _exit(1);
    leak(64 * kMiB);
  }));
  CHECK(waitFor([&] { return memcg.underOom(); }));
  scene.armed(memcg);
  CHECK(scene.restore(State::kKillers) == State::Counts{0, 0, 1, 0});
  CHECK(scene.heard("pending: memory.oom_control of " + below(memcg) + ": tasks wait in it"));
  CHECK(disabled(memcg) == "1");
  CHECK_FALSE(scene.state().empty());
  SUBCASE("until one may be killed") {
    setScore(leaker.pid(), 0);
    CHECK(scene.restore(State::kAll, false, 2000) == State::Counts{1, 0, 0, 0});
  }
  SUBCASE("until there is room, which may be while one waits") {
    const Child relief([&] {
      usleep(200000);
      memcg.write("memory.limit_in_bytes", "-1");
    });
    CHECK(scene.restore(State::kAll, false, 5000) == State::Counts{1, 0, 0, 0});
  }
  CHECK(disabled(memcg) == "0");
  CHECK(scene.state().empty());
}

TEST_CASE_FIXTURE(NoLeaks, "a limit below what is in use stays where it is until there is room") {
  NEEDS_MEMCG();
  Scene scene;
  const Memcg memcg;
  memcg.write("memory.limit_in_bytes", std::to_string(64 * kMiB));
  Child holder(memcg.inside([] { leak(32 * kMiB); }));
  CHECK(waitFor([&] { return std::stoul(memcg.read("memory.usage_in_bytes")) >= 32 * kMiB; }));
  scene.file("memory.limit_in_bytes", below(memcg), memcg.directory().inode(), "16777216 67108864");
  CHECK(scene.state().limitRaised(0));
  CHECK(scene.restore() == State::Counts{0, 0, 1, 0});
  CHECK(scene.heard("busy (errno 16)"));
  CHECK(memcg.read("memory.limit_in_bytes") == "67108864\n");
  kill(holder.pid(), SIGKILL);
  holder.reap();
  CHECK(scene.restore() == State::Counts{1, 0, 0, 0});
  CHECK(memcg.read("memory.limit_in_bytes") == "16777216\n");
  CHECK(scene.state().empty());
}

TEST_CASE_FIXTURE(NoLeaks, "v1's two limits are put back in the order that the kernel takes") {
  NEEDS_MEMCG();
  Scene scene;
  const Memcg memcg;
  if (access((memcg.directory().path() + "/memory.memsw.limit_in_bytes").c_str(), F_OK) != 0) {
    MESSAGE("skipped: no memory.memsw here");
    return;
  }
  const std::string low = "33554432";
  const std::string high = "67108864";
  for (const bool lowered : {false, true}) {
    for (const bool memswFirst : {false, true}) {
      const std::string& was = lowered ? low : high;
      const std::string& wrote = lowered ? high : low;
      const std::string values = was + ' ' + wrote;
      CAPTURE(was);
      CAPTURE(memswFirst);
      // The kernel wants memsw raised first, and lowered last.
      static_cast<void>(memcg.directory().writeFile("memory.memsw.limit_in_bytes", wrote));
      memcg.write("memory.limit_in_bytes", wrote);
      memcg.write("memory.memsw.limit_in_bytes", wrote);
      const ino_t inode = memcg.directory().inode();
      if (memswFirst) scene.file("memory.memsw.limit_in_bytes", below(memcg), inode, values);
      scene.file("memory.limit_in_bytes", below(memcg), inode, values);
      if (!memswFirst) scene.file("memory.memsw.limit_in_bytes", below(memcg), inode, values);
      CHECK(scene.restore() == State::Counts{2, 0, 0, 0});
      CHECK(memcg.read("memory.limit_in_bytes") == was + '\n');
      CHECK(memcg.read("memory.memsw.limit_in_bytes") == was + '\n');
      CHECK(scene.state().empty());
    }
  }
}

TEST_CASE_FIXTURE(NoLeaks, "what was frozen is thawed") {
  NEEDS_FREEZER();
  Scene scene;
  const Freezer victims;
  const Freezer others;
  Child victim(sleepForever);
  const Child other(sleepForever);
  victims.freeze(victim.pid());
  others.freeze(other.pid());
  for (const Freezer* freezer : {&victims, &others}) {
    scene.file("freezer.state", freezer->name, inodeOf(freezer->path()), "THAWED FROZEN");
  }
  CHECK(scene.state().frozen());

  SUBCASE("where a victim sits") {
    kill(victim.pid(), SIGKILL);
    CHECK(waitpid(victim.pid(), nullptr, WNOHANG) == 0);
    const std::array<pid_t, 2> pids{4711, victim.pid()};
    CHECK(scene.state().thawHolding(pids, {}) == 1);
    CHECK(victim.reap() == SIGKILL);
    CHECK(others.state() == "FROZEN\n");
    CHECK(scene.state().frozen());
    CHECK(scene.state().thawHolding(pids, {}) == 0);
  }
  SUBCASE("all") {
    CHECK(scene.restore(State::kFreezers) == State::Counts{2, 0, 0, 0});
    CHECK(victims.state() == "THAWED\n");
  }
  CHECK_FALSE(scene.state().thawHolding({}, {}));
  scene.restore();
  CHECK(others.state() == "THAWED\n");
  CHECK_FALSE(scene.state().frozen());
  CHECK(scene.state().empty());
}

TEST_CASE_FIXTURE(NoLeaks, "a memcg that the handler made is emptied and removed") {
  NEEDS_MEMCG();
  Scene scene;
  Memcg made;
  const Memcg before;
  const Child child(made.inside(sleepForever));
  CHECK(waitFor([&] { return made.read("cgroup.procs") == std::to_string(child.pid()) + '\n'; }));
  const auto record = [&](const std::string& to, ino_t inode) {
    scene.file("made - " + std::to_string(inode) + ' ' + to + " - " + below(made));
  };
  const ino_t inode = made.directory().inode();
  SUBCASE("to where its processes were") {
    record(below(before), inode);
    CHECK(scene.restore(State::kAll, true) == State::Counts{1, 0, 0, 0});
    CHECK(made.read("cgroup.procs") != "");
    CHECK(scene.restore() == State::Counts{1, 0, 0, 0});
    CHECK(before.read("cgroup.procs") == std::to_string(child.pid()) + '\n');
  }
  SUBCASE("to the root, if that is gone") {
    record("/reprieve-test-native-gone", inode);
    CHECK(scene.restore() == State::Counts{1, 0, 0, 0});
    CHECK(before.read("cgroup.procs") == "");
  }
  SUBCASE("but not another one of that name") {
    record(below(before), inode + 1);
    CHECK(scene.restore() == State::Counts{0, 1, 0, 0});
    CHECK(made.read("cgroup.procs") == std::to_string(child.pid()) + '\n');
    CHECK(scene.state().empty());
    return;
  }
  SUBCASE("not while somebody has a memcg in it") {
    record(below(before), inode);
    {
      const Memcg inside(&made);
      CHECK(scene.restore() == State::Counts{0, 0, 1, 0});
    }
    CHECK(scene.restore() == State::Counts{1, 0, 0, 0});
  }
  CHECK(access(made.directory().path().c_str(), F_OK) != 0);
  CHECK(scene.state().empty());
  CHECK(scene.restore() == nothing());
}

TEST_CASE_FIXTURE(NoLeaks, "what runs in a window dies before limits are put back, whether its handler lives or not") {
  NEEDS_MEMCG();
  Scene scene;
  Memcg full;
  Memcg window(&full);
  const std::string inner = window.directory().path() + "/made";
  REQUIRE(mkdir(inner.c_str(), 0755) == 0);
  REQUIRE(mkdir((inner + "/there").c_str(), 0755) == 0);
  Child child(window.inside([] { leak(16 * kMiB); }));
  CHECK(waitFor([&] { return std::stoull(window.read("memory.usage_in_bytes")) >= 16 * kMiB; }));
  const std::string was = std::to_string(8 * kMiB);
  const std::string wrote = std::to_string(32 * kMiB);
  full.write("memory.limit_in_bytes", wrote);
  scene.file("memory.limit_in_bytes", below(full), full.directory().inode(), was + ' ' + wrote);
  scene.file("made window " + std::to_string(window.directory().inode()) + " - - " + below(window));
  SUBCASE("the handler is gone") { CHECK(scene.restore() == State::Counts{2, 0, 0, 0}); }
  SUBCASE("the handler lives on") {
    CHECK(scene.state().restore(State::kAll, {.ownerLives = true}) == State::Counts{2, 0, 0, 0});
  }
  SUBCASE("not in a dry run") {
    CHECK(scene.restore(State::kAll, true) == State::Counts{2, 0, 0, 0});
    CHECK(scene.heard("what ran in it dies"));
    CHECK(window.read("cgroup.procs") == std::to_string(child.pid()) + '\n');
    CHECK(scene.restore() == State::Counts{2, 0, 0, 0});
  }
  CHECK(child.reap() == SIGKILL);
  CHECK(full.read("memory.limit_in_bytes") == was + '\n');
  CHECK(access(window.directory().path().c_str(), F_OK) != 0);
  CHECK(scene.state().empty());
}

TEST_CASE_FIXTURE(NoLeaks, "a cgroup that was about to be made is removed, unless somebody is in it") {
  NEEDS_FREEZER();
  Scene scene;
  const Freezer home;
  const std::string name = home.name + "/reprieve-frozen-1-1";
  const std::string path = std::string(kFreezer) + name;
  scene.file("made freezer 0 " + home.name + " - " + name);
  SUBCASE("it was not made") { CHECK(scene.restore() == State::Counts{0, 1, 0, 0}); }
  SUBCASE("it was made") {
    REQUIRE(mkdir(path.c_str(), 0755) == 0);
    CHECK(scene.restore() == State::Counts{1, 0, 0, 0});
  }
  SUBCASE("it is another's") {
    REQUIRE(mkdir(path.c_str(), 0755) == 0);
    Child child(sleepForever);
    std::ofstream(path + "/cgroup.procs") << child.pid();
    CHECK(scene.restore() == State::Counts{0, 1, 0, 0});
    CHECK(readText(path + "/cgroup.procs") == std::to_string(child.pid()) + '\n');
    kill(child.pid(), SIGKILL);
    CHECK(child.reap() == SIGKILL);
    CHECK(waitFor([&] { return rmdir(path.c_str()) == 0; }));
  }
  CHECK(access(path.c_str(), F_OK) != 0);
  CHECK(scene.state().empty());
}

TEST_CASE_FIXTURE(NoLeaks, "who was moved to be frozen is thawed, goes back, and is not killed") {
  NEEDS_FREEZER();
  Scene scene;
  const Freezer home;
  const std::string made = home.path() + "/reprieve-frozen-1-1";
  REQUIRE(mkdir(made.c_str(), 0755) == 0);
  const Child child(sleepForever);
  std::ofstream(made + "/cgroup.procs") << child.pid();
  std::ofstream(made + "/freezer.state") << "FROZEN";
  const ino_t inode = inodeOf(made);
  scene.file("made freezer " + std::to_string(inode) + ' ' + home.name + " - " + home.name + "/reprieve-frozen-1-1");
  scene.file("freezer.state", home.name + "/reprieve-frozen-1-1", inode, "THAWED FROZEN");
  CHECK(scene.state().restore(State::kAll, {.ownerLives = true}) == State::Counts{2, 0, 0, 0});
  CHECK(readText(home.path() + "/cgroup.procs") == std::to_string(child.pid()) + '\n');
  CHECK(access(made.c_str(), F_OK) != 0);
  CHECK(kill(child.pid(), 0) == 0);
  CHECK(scene.state().empty());
}

// --- The subcommand ---

struct Ran {
  int status;
  std::string text;
};

Ran run(std::vector<std::string> args) {
  args.insert(args.begin(), "restore");
  std::vector<char*> argv;
  argv.reserve(args.size());
  for (std::string& arg : args) argv.push_back(arg.data());
  const TemporaryDirectory temporary;
  const std::string path = temporary.path() + "/out";
  const Fd kept(fcntl(STDOUT_FILENO, F_DUPFD_CLOEXEC, 3));
  {
    const Fd out(open(path.c_str(), O_CREAT | O_WRONLY | O_CLOEXEC, 0600));
    dup2(out.get(), STDOUT_FILENO);
  }
  const int status = runRestore(static_cast<int>(argv.size()), argv.data());
  dup2(kept.get(), STDOUT_FILENO);
  return {status, readText(path)};
}

TEST_CASE_FIXTURE(NoLeaks, "restore puts back every stale instance, and a second run does nothing") {
  NEEDS_MEMCG();
  Scene scene;
  const Memcg memcg;
  memcg.write("memory.oom_control", "1");
  scene.armed(memcg);
  REQUIRE(mkdir((scene.base() + "/records").c_str(), 0700) == 0);
  REQUIRE(mkdir((scene.base() + "/.new-two").c_str(), 0700) == 0);

  Ran dry = run({"--dry-run", scene.base()});
  CHECK(dry.status == 0);
  CHECK(dry.text == "one: would put back: memory.oom_control of " + below(memcg) +
                        ": 0\none: 1 to put back, 0 left alone, 0 pending\n");
  CHECK(disabled(memcg) == "1");

  const Ran first = run({scene.base()});
  CHECK(first.status == 0);
  CHECK(first.text ==
        "one: put back: memory.oom_control of " + below(memcg) + ": 0\none: 1 put back, 0 left alone, 0 pending\n");
  CHECK(disabled(memcg) == "0");
  CHECK(access(scene.path().c_str(), F_OK) != 0);
  CHECK(access((scene.base() + "/.new-two").c_str(), F_OK) == 0);

  const Ran second = run({scene.base()});
  CHECK(second.status == 0);
  CHECK(second.text.empty());
}

TEST_CASE_FIXTURE(NoLeaks, "restore leaves an instance that is in use") {
  Scene scene;
  scene.fake();
  scene.file("cgroup.freeze", "/a", 1, "0 1");
  const Fd lock(open(scene.path().c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  REQUIRE(flock(lock.get(), LOCK_EX) == 0);
  const Ran ran = run({scene.base()});
  CHECK(ran.status == 0);
  CHECK(ran.text == "one: in use by pid 1\n");
  CHECK_FALSE(scene.state().empty());
}

TEST_CASE_FIXTURE(NoLeaks, "restore tells what it cannot do") {
  Scene scene;
  scene.fake();
  const std::string group = scene.fakeGroup("/a");
  std::ofstream(group + "/memory.max") << "2097152\n";
  std::ofstream(group + "/memory.current") << "2000000\n";
  scene.file("memory.max", "/a", inodeOf(group), "1048576 2097152");
  const Ran ran = run({scene.base(), "one"});
  CHECK(ran.status == 1);
  CHECK(ran.text ==
        "one: pending: memory.max of /a: more than that is in use\n"
        "one: 0 put back, 0 left alone, 1 pending\n");
  CHECK(access(scene.path().c_str(), F_OK) == 0);
}

TEST_CASE_FIXTURE(NoLeaks, "restore where there is nothing, or nothing of the kind") {
  Scene scene;
  CHECK(run({scene.base() + "/none"}).status == 0);
  CHECK(run({scene.base(), "none"}).status == 0);
  SUBCASE("a state that nobody understands stays") {
    scene.owner("version 9\n");
    CHECK(run({scene.base()}).status == 1);
    CHECK(access(scene.path().c_str(), F_OK) == 0);
  }
  SUBCASE("a removal that was stopped") {
    unlink((scene.path() + "/owner").c_str());
    CHECK(run({scene.base()}).status == 0);
    CHECK(access(scene.path().c_str(), F_OK) != 0);
  }
}

TEST_CASE_FIXTURE(NoLeaks, "restore: wrong usage") {
  const Fd kept(fcntl(STDERR_FILENO, F_DUPFD_CLOEXEC, 3));
  {
    const Fd none(open("/dev/null", O_WRONLY | O_CLOEXEC));
    dup2(none.get(), STDERR_FILENO);
  }
  for (const auto& args : {std::vector<std::string>{},
                           {"--dry-run"},
                           {"--wet-run", "/tmp"},
                           {"/tmp", "../x"},
                           {"/tmp", "records"},
                           {"/tmp", "."},
                           {"/tmp", "a", "b"}}) {
    CHECK(run(args).status == 2);
  }
  dup2(kept.get(), STDERR_FILENO);
}

}  // namespace
}  // namespace test
}  // namespace reprieve::guard
