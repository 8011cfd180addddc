#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <fstream>
#include <limits>
#include <memory>

#include "core/fd.h"
#include "guard/memcg.h"
#include "support.h"

namespace reprieve::guard::test {
namespace {

using reprieve::test::Child;
using reprieve::test::leak;
using reprieve::test::Memcg;
using reprieve::test::NoLeaks;
using reprieve::test::sleepForever;
using reprieve::test::TemporaryDirectory;
using reprieve::test::waitFor;

constexpr size_t kMiB = 1 << 20;

Fd openDirectory(const std::string& path) { return Fd(open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)); }

/** A cgroup of plain files: what is listed is up to the test. */
class Plain {
 public:
  Plain() : directory(openDirectory(temporary.path())) {}

  void list(const std::vector<pid_t>& pids, const std::string& below = "") const {
    std::string text;
    for (const pid_t pid : pids) text += std::to_string(pid) + '\n';
    temporary.write(below + "/cgroup.procs", text);
  }
  void make(const std::string& name) const { REQUIRE(mkdir((temporary.path() + name).c_str(), 0700) == 0); }
  int fd() const { return directory.get(); }

  TemporaryDirectory temporary;
  Fd directory;
};

std::vector<pid_t> processesOf(int directory, bool deep) {
  std::vector<pid_t> pids;
  CHECK(forEachProcess(
            directory, deep,
            [](void* context, pid_t pid) {
              static_cast<std::vector<pid_t>*>(context)->push_back(pid);
              return true;
            },
            &pids) == 0);
  return pids;
}

bool addName(void* context, int /*directory*/, const char* name) {
  static_cast<std::vector<std::string>*>(context)->emplace_back(name);
  return true;
}

struct Killed {
  explicit Killed(int directory, size_t room = 1024) : pids(room) { again(directory); }
  void again(int directory) { round = killRound(directory, pids, count); }
  std::vector<pid_t> sorted() const {
    std::vector<pid_t> known(pids.begin(), pids.begin() + static_cast<std::ptrdiff_t>(count));
    std::sort(known.begin(), known.end());
    return known;
  }

  std::vector<pid_t> pids;
  size_t count = 0;
  Round round{};
};

TEST_CASE_FIXTURE(NoLeaks, "openBeneath stays beneath") {
  const Plain root;
  root.make("/a");
  root.make("/a/b");
  root.temporary.write("a/file", "x");
  REQUIRE(symlink("a", (root.temporary.path() + "/link").c_str()) == 0);
  const auto opened = [&root](const char* path, int flags = O_RDONLY) {
    const Fd fd(openBeneath(root.fd(), path, flags));
    if (fd) CHECK((fcntl(fd.get(), F_GETFD) & FD_CLOEXEC) != 0);
    return fd ? 0 : errno;
  };
  CHECK(opened("/") == 0);
  CHECK(opened("") == 0);
  CHECK(opened("a/b", O_RDONLY | O_DIRECTORY) == 0);
  CHECK(opened("///a//b/", O_RDONLY | O_DIRECTORY) == 0);
  CHECK(opened("/a/file", O_RDWR) == 0);
  CHECK(opened("/a/file", O_RDONLY | O_DIRECTORY) == ENOTDIR);
  CHECK(opened("/none") == ENOENT);
  CHECK(opened("/link") == ELOOP);
  CHECK(opened("/link/b") == ELOOP);
  CHECK(opened("..") == EXDEV);
  CHECK(opened("/a/../a") == EXDEV);
  CHECK(opened("/a/..") == EXDEV);
  CHECK(opened("/..a") == ENOENT);
}

TEST_CASE_FIXTURE(NoLeaks, "readNumber and writeText") {
  const Plain plain;
  const auto number = [&plain](const std::string& text, uint64_t& out) {
    plain.temporary.write("n", text);
    const Fd fd(openBeneath(plain.fd(), "n", O_RDONLY));
    return readNumber(fd.get(), out);
  };
  uint64_t out = 0;
  CHECK((number("12345\n", out) == 0 && out == 12345));
  CHECK((number("max\n", out) == 0 && out == std::numeric_limits<uint64_t>::max()));
  CHECK((number("9223372036854771712\n", out) == 0 && out == std::numeric_limits<uint64_t>::max()));
  CHECK((number("9223372036854710271", out) == 0 && out == 9223372036854710271U));
  for (const char* text : {"", "\n", "x", "1 2", "-1", "1x", "99999999999999999999"}) {
    CAPTURE(text);
    CHECK(number(text, out) == EINVAL);
  }
  CHECK(readNumber(-1, out) == EBADF);
  const Fd fd(openBeneath(plain.fd(), "n", O_RDWR));
  CHECK(writeText(fd.get(), "17") == 0);
  CHECK(writeText(fd.get(), "23") == 0);
  std::array<char, 2> buffer{};
  CHECK(readSmall(fd.get(), buffer) == 2);
  CHECK(std::string(buffer.data(), 2) == "23");
  CHECK(writeText(-1, "1") == EBADF);
}

TEST_CASE_FIXTURE(NoLeaks, "readOomState") {
  NEEDS_MEMCG();
  const Memcg memcg;
  const Fd control(openBeneath(memcg.directory().descriptor(), "memory.oom_control", O_RDWR));
  OomState state{};
  REQUIRE(readOomState(control.get(), state) == 0);
  CHECK_FALSE(state.killDisabled);
  CHECK_FALSE(state.underOom);
  memcg.park(16 * kMiB);
  const Child child(memcg.inside([] { leak(32 * kMiB); }));
  CHECK(waitFor([&] { return readOomState(control.get(), state) == 0 && state.underOom; }));
  CHECK(state.killDisabled);
  CHECK(writeText(control.get(), "2") == EINVAL);
  const Fd other(openBeneath(memcg.directory().descriptor(), "memory.usage_in_bytes", O_RDONLY));
  CHECK(readOomState(other.get(), state) == EINVAL);
}

TEST_CASE_FIXTURE(NoLeaks, "forEachProcess reads lists of any length") {
  const Plain plain;
  std::vector<pid_t> pids(20000);
  for (size_t i = 0; i < pids.size(); i++) pids[i] = static_cast<pid_t>(i * i % 4194304);
  plain.list(pids);
  CHECK(processesOf(plain.fd(), false) == pids);
  int calls = 0;
  const auto stopAtTen = [](void* context, pid_t) { return ++*static_cast<int*>(context) < 10; };
  CHECK(forEachProcess(plain.fd(), true, stopAtTen, &calls) == 0);
  CHECK(calls == 10);
  plain.list({});
  CHECK(processesOf(plain.fd(), false).empty());
}

TEST_CASE_FIXTURE(NoLeaks, "forEachProcess goes below if asked to, and takes no list for an empty one") {
  const Plain plain;
  plain.make("/a");
  plain.make("/a/b");
  plain.make("/c");
  plain.list({1});
  plain.list({2}, "/a");
  plain.list({3, 4}, "/a/b");
  CHECK(processesOf(plain.fd(), false) == std::vector<pid_t>{1});
  std::vector<pid_t> deep = processesOf(plain.fd(), true);
  std::sort(deep.begin(), deep.end());
  CHECK(deep == std::vector<pid_t>{1, 2, 3, 4});
  int calls = 0;
  const auto stopAtTwo = [](void* context, pid_t) { return ++*static_cast<int*>(context) < 2; };
  CHECK(forEachProcess(plain.fd(), true, stopAtTwo, &calls) == 0);
  CHECK(calls == 2);
}

TEST_CASE_FIXTURE(NoLeaks, "forEachDescendant: parents first, and names of any length") {
  const Plain plain;
  std::vector<std::string> expected;
  for (int i = 0; i < 100; i++) {
    const std::string name = std::to_string(i) + std::string(static_cast<size_t>(i) * 2, 'x');
    plain.make("/" + name);
    plain.make("/" + name + "/" + name + "y");
    expected.insert(expected.end(), {name, name + "y"});
  }
  plain.temporary.write("file", "");
  std::vector<std::string> names;
  CHECK(forEachDescendant(plain.fd(), addName, &names) == 0);
  for (size_t i = 0; i + 1 < names.size(); i += 2) CHECK(names[i] + "y" == names[i + 1]);
  std::sort(expected.begin(), expected.end());
  std::sort(names.begin(), names.end());
  CHECK(names == expected);

  int calls = 0;
  const auto stop = [](void* context, int, const char*) { return ++*static_cast<int*>(context) < 7; };
  CHECK(forEachDescendant(plain.fd(), stop, &calls) == 0);
  CHECK(calls == 7);
}

TEST_CASE_FIXTURE(NoLeaks, "forEachDescendant goes down to its depth and says that there is more") {
  const Plain plain;
  std::string path;
  for (size_t i = 0; i < kMaxDepth; i++) plain.make(path += "/d");
  std::vector<std::string> names;
  CHECK(forEachDescendant(plain.fd(), addName, &names) == 0);
  CHECK(names.size() == kMaxDepth);
  for (int i = 0; i < 5; i++) plain.make(path += "/d");
  names.clear();
  CHECK(forEachDescendant(plain.fd(), addName, &names) == ELOOP);
  CHECK(names.size() == kMaxDepth);
}

TEST_CASE_FIXTURE(NoLeaks, "a process is known by its number and its start") {
  Child child([] {
    // Names that look like the end of the name, and like fields.
    prctl(PR_SET_NAME, "a) R 1 (b) 2 3");
    sleepForever();
  });
  const Fd process(openProcess(child.pid()));
  REQUIRE(process);
  CHECK((fcntl(process.get(), F_GETFD) & FD_CLOEXEC) != 0);
  uint64_t started = 0;
  REQUIRE(readStartTime(process.get(), started) == 0);
  const uint64_t before = started;
  CHECK(waitFor([&] {
    std::string name;
    std::getline(std::ifstream("/proc/" + std::to_string(child.pid()) + "/comm"), name);
    return name == "a) R 1 (b) 2 3";
  }));
  REQUIRE(readStartTime(process.get(), started) == 0);
  CHECK(started == before);
  CHECK(started > 0);

  CHECK(isAlive(child.pid(), started));
  CHECK_FALSE(isAlive(child.pid(), started + 1));
  int score = -1;
  CHECK(readScoreAdj(process.get(), score) == 0);
  CHECK(writeScoreAdj(process.get(), 900) == 0);
  CHECK(readScoreAdj(process.get(), score) == 0);
  CHECK(score == 900);
  CHECK(writeScoreAdj(process.get(), 1001) == EINVAL);

  kill(child.pid(), SIGKILL);
  siginfo_t info{};
  REQUIRE(waitid(P_PID, static_cast<id_t>(child.pid()), &info, WEXITED | WNOWAIT) == 0);
  CHECK_FALSE(isAlive(child.pid(), started));
  const pid_t pid = child.pid();
  child.reap();
  CHECK_FALSE(isAlive(pid, started));
  CHECK(readStartTime(process.get(), started) == ESRCH);
  CHECK(readScoreAdj(process.get(), score) != 0);
  CHECK(openProcess(pid) == -1);
}

TEST_CASE_FIXTURE(NoLeaks, "readAbove: the nearest first, up to the hierarchy's root and not beyond") {
  NEEDS_MEMCG();
  const Memcg top;
  const Memcg middle(&top);
  const Memcg bottom(&middle);
  struct stat root {};
  REQUIRE(stat("/sys/fs/cgroup/memory", &root) == 0);
  std::array<uint64_t, 5> above{};
  readAbove(bottom.directory().descriptor(), above);
  CHECK(above == std::array<uint64_t, 5>{middle.directory().inode(), top.directory().inode(), root.st_ino, 0, 0});
  std::array<uint64_t, 1> nearest{};
  readAbove(bottom.directory().descriptor(), nearest);
  CHECK(nearest[0] == middle.directory().inode());
  readAbove(-1, above);
  CHECK(above == std::array<uint64_t, 5>{});
}

TEST_CASE_FIXTURE(NoLeaks, "isListed means this very cgroup") {
  const Plain plain;
  plain.make("/a");
  plain.list({1234, 12345});
  plain.list({23456}, "/a");
  CHECK(isListed(plain.fd(), 12345));
  CHECK_FALSE(isListed(plain.fd(), 123));
  CHECK_FALSE(isListed(plain.fd(), 23456));
}

TEST_CASE_FIXTURE(NoLeaks, "hasKillableTask and isEmpty look below too") {
  const Plain plain;
  plain.make("/a");
  plain.list({99999999});
  CHECK_FALSE(isEmpty(plain.fd()));
  CHECK_FALSE(hasKillableTask(plain.fd()));
  plain.list({});
  CHECK(isEmpty(plain.fd()));
  CHECK_FALSE(hasKillableTask(plain.fd()));
  plain.list({getpid()}, "/a");
  CHECK_FALSE(isEmpty(plain.fd()));
  CHECK(hasKillableTask(plain.fd()));
  plain.list({0}, "/a");
  CHECK(hasKillableTask(plain.fd()));
}

TEST_CASE_FIXTURE(NoLeaks, "killRound signals all that are listed, here and below, and nobody else") {
  const Plain plain;
  plain.make("/a");
  plain.make("/a/b");
  Child here(sleepForever);
  Child below(sleepForever);
  const Child other(sleepForever);
  plain.list({0, 1, getpid(), here.pid(), here.pid(), 99999999});
  plain.list({below.pid()}, "/a/b");
  Killed killed(plain.fd());
  CHECK(killed.round.signalled == 2);
  CHECK(killed.round.listed == 6);
  CHECK(killed.round.unreachable == 2);
  std::vector<pid_t> both{here.pid(), below.pid()};
  std::sort(both.begin(), both.end());
  CHECK(killed.sorted() == both);
  killed.again(plain.fd());
  CHECK(killed.sorted() == both);
  CHECK(here.reap() == SIGKILL);
  CHECK(below.reap() == SIGKILL);
  killed.again(plain.fd());
  CHECK(killed.round.signalled == 0);
  CHECK(waitpid(other.pid(), nullptr, WNOHANG) == 0);
}

TEST_CASE_FIXTURE(NoLeaks, "killRound where there is nothing") {
  const Plain plain;
  Killed killed(plain.fd(), 0);
  CHECK(killed.round.listed == 0);
  plain.list({});
  killed.again(plain.fd());
  CHECK(killed.round.listed == 0);
  CHECK(killed.count == 0);
}

TEST_CASE_FIXTURE(NoLeaks, "killRound takes more processes than it holds at once") {
  NEEDS_MEMCG();
  const Memcg memcg;
  const Memcg below(&memcg);
  std::vector<std::unique_ptr<Child>> children;
  for (int i = 0; i < 200; i++) {
    const Memcg& home = i % 3 == 0 ? below : memcg;
    children.push_back(std::make_unique<Child>(home.inside(sleepForever)));
  }
  const int directory = memcg.directory().descriptor();
  CHECK(waitFor([&] { return processesOf(directory, true).size() == 200; }));
  Killed killed(directory, 150);
  CHECK(killed.round.signalled == 200);
  CHECK(killed.round.listed == 200);
  CHECK(killed.round.unreachable == 0);
  CHECK(killed.count == 150);
  for (const auto& child : children) CHECK(child->reap() == SIGKILL);
  CHECK(isEmpty(directory));
}

TEST_CASE_FIXTURE(NoLeaks, "rounds end processes that run away") {
  NEEDS_MEMCG();
  const Memcg memcg;
  std::vector<std::unique_ptr<Child>> children;
  // Each is replaced by its child all the time, and gone after a while in any case.
  const auto run = [] {
    for (int i = 0; i < 20000; i++) {
      if (fork() > 0) _exit(0);
      usleep(100);
    }
  };
  for (int i = 0; i < 20; i++) children.push_back(std::make_unique<Child>(memcg.inside(run)));
  CHECK(waitFor([&] { return !isEmpty(memcg.directory().descriptor()); }));
  Killed killed(memcg.directory().descriptor());
  CHECK(waitFor([&] {
    killed.again(memcg.directory().descriptor());
    return killed.round.listed == 0;
  }));
  CHECK(isEmpty(memcg.directory().descriptor()));
}

}  // namespace
}  // namespace reprieve::guard::test
