#include "core/directory.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

#include <algorithm>

#include "core/control_file.h"
#include "support.h"

namespace reprieve::test {
namespace {

bool closeOnExec(int fd) { return (fcntl(fd, F_GETFD) & FD_CLOEXEC) != 0; }

TEST_CASE_FIXTURE(NoLeaks, "Directory.open knows inode, owner and file system") {
  const TemporaryDirectory temporary;
  const Directory directory = temporary.open();
  struct stat status {};
  REQUIRE(stat(temporary.path().c_str(), &status) == 0);
  CHECK(directory.inode() == status.st_ino);
  CHECK(directory.uid() == geteuid());
  CHECK(closeOnExec(directory.descriptor()));
  auto proc = Directory::open("/proc");
  REQUIRE(proc);
  CHECK(proc->fsType() == PROC_SUPER_MAGIC);
}

TEST_CASE_FIXTURE(NoLeaks, "Directory.open says what failed") {
  auto missing = Directory::open("/nonexistent");
  REQUIRE_FALSE(missing);
  CHECK(missing.error().number == ENOENT);
  CHECK(std::string(missing.error().syscall) == "open");
  CHECK(missing.error().path == "/nonexistent");
  const TemporaryDirectory temporary;
  temporary.write("file", "");
  auto file = Directory::open(temporary.path() + "/file");
  REQUIRE_FALSE(file);
  CHECK(file.error().number == ENOTDIR);
}

TEST_CASE_FIXTURE(NoLeaks, "Directory.openBeneath refuses what leads out") {
  const TemporaryDirectory temporary;
  const Directory directory = temporary.open();
  REQUIRE(directory.makeDirectory("a"));
  REQUIRE(directory.makeDirectory("a/b"));
  REQUIRE(symlink("a", (temporary.path() + "/link").c_str()) == 0);
  auto below = directory.openBeneath("a/b");
  REQUIRE(below);
  CHECK(below->path() == temporary.path() + "/a/b");
  CHECK(closeOnExec(below->descriptor()));

  const struct {
    const char* path;
    int number;
  } refused[] = {{"..", EXDEV},   {"a/..", EXDEV},   {"a/../a", EXDEV}, {"../a", EXDEV}, {"/tmp", EXDEV},
                 {"link", ELOOP}, {"link/b", ELOOP}, {"", ENOENT},      {"none", ENOENT}};
  for (const auto& [path, number] : refused) {
    CAPTURE(path);
    auto opened = directory.openBeneath(path);
    REQUIRE_FALSE(opened);
    CHECK(opened.error().number == number);
    CHECK(std::string(opened.error().syscall) == "openat2");
    CHECK(opened.error().path == temporary.path() + '/' + path);
    // The way without openat2(2) refuses the same.
    CHECK(openBeneathByWalk(directory.descriptor(), path, O_RDONLY | O_DIRECTORY | O_CLOEXEC) == -1);
    CHECK(errno == number);
  }
}

TEST_CASE_FIXTURE(NoLeaks, "Directory.openBeneath does not cross into another file system") {
  auto root = Directory::open("/");
  REQUIRE(root);
  auto proc = root->openBeneath("proc");
  REQUIRE_FALSE(proc);
  CHECK(proc.error().number == EXDEV);
  CHECK(openBeneathByWalk(root->descriptor(), "proc", O_RDONLY | O_DIRECTORY | O_CLOEXEC) == -1);
  CHECK(errno == EXDEV);
}

TEST_CASE_FIXTURE(NoLeaks, "the way without openat2 opens what openat2 opens") {
  const TemporaryDirectory temporary;
  const Directory directory = temporary.open();
  REQUIRE(directory.makeDirectory("a"));
  REQUIRE(directory.makeDirectory("a/b"));
  for (const char* path : {"a", "a/b", "a//b", "a/b/", "./a", "."}) {
    CAPTURE(path);
    const Fd fd(openBeneathByWalk(directory.descriptor(), path, O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    CHECK(fd);
    CHECK(directory.openBeneath(path));
  }
}

TEST_CASE_FIXTURE(NoLeaks, "Directory.subdirectories gives directories alone") {
  const TemporaryDirectory temporary;
  const Directory directory = temporary.open();
  REQUIRE(directory.makeDirectory("one"));
  REQUIRE(directory.makeDirectory("two"));
  temporary.write("file", "");
  REQUIRE(symlink("one", (temporary.path() + "/link").c_str()) == 0);
  // Twice, because a shared position would make the second listing empty.
  for (int round = 0; round < 2; round++) {
    auto names = directory.subdirectories();
    REQUIRE(names);
    std::sort(names->begin(), names->end());
    CHECK(*names == std::vector<std::string>{"one", "two"});
  }
}

TEST_CASE_FIXTURE(NoLeaks, "Directory reads and writes files below") {
  const TemporaryDirectory temporary;
  const Directory directory = temporary.open();
  temporary.write("file", "12345");
  REQUIRE(directory.writeFile("file", "ab"));
  auto text = directory.readFile("file");
  REQUIRE(text);
  CHECK(*text == "ab345");

  auto missing = directory.readFile("none");
  REQUIRE_FALSE(missing);
  CHECK(missing.error().number == ENOENT);
  CHECK(missing.error().path == temporary.path() + "/none");
  auto unwritten = directory.writeFile("none", "1");
  REQUIRE_FALSE(unwritten);
  CHECK(unwritten.error().number == ENOENT);
  REQUIRE(directory.makeDirectory("sub"));
  auto notFile = directory.readFile("sub");
  REQUIRE_FALSE(notFile);
  CHECK(notFile.error().number == EISDIR);
  CHECK(std::string(notFile.error().syscall) == "pread");
}

TEST_CASE_FIXTURE(NoLeaks, "Directory makes and removes directories below") {
  const TemporaryDirectory temporary;
  const Directory directory = temporary.open();
  REQUIRE(directory.makeDirectory("a"));
  REQUIRE(directory.makeDirectory("a/b"));
  auto again = directory.makeDirectory("a");
  REQUIRE_FALSE(again);
  CHECK(again.error().number == EEXIST);
  CHECK(std::string(again.error().syscall) == "mkdirat");
  auto full = directory.removeDirectory("a");
  REQUIRE_FALSE(full);
  CHECK(full.error().number == ENOTEMPTY);
  for (const char* path : {"..", "../x", "/tmp/x", "a/../x"}) {
    CAPTURE(path);
    auto made = directory.makeDirectory(path);
    REQUIRE_FALSE(made);
    CHECK(made.error().number == EXDEV);
    auto removed = directory.removeDirectory(path);
    REQUIRE_FALSE(removed);
    CHECK(removed.error().number == EXDEV);
  }
  REQUIRE(directory.removeDirectory("a/b"));
  REQUIRE(directory.removeDirectory("a"));
  CHECK(directory.subdirectories()->empty());
}

TEST_CASE_FIXTURE(NoLeaks, "Directory.getAttribute") {
  NEEDS_MEMCG();
  const Memcg memcg;
  const int fd = memcg.directory().descriptor();
  auto none = memcg.directory().getAttribute("user.reprieve");
  REQUIRE(none);
  CHECK_FALSE(none->has_value());
  REQUIRE(fsetxattr(fd, "user.reprieve", "protect", 7, 0) == 0);
  const std::string large(4000, 'x');
  REQUIRE(fsetxattr(fd, "user.large", large.data(), large.size(), 0) == 0);
  CHECK(**memcg.directory().getAttribute("user.reprieve") == "protect");
  CHECK(**memcg.directory().getAttribute("user.large") == large);
  auto proc = Directory::open("/proc/self");
  REQUIRE(proc);
  auto unknown = proc->getAttribute("user.reprieve");
  REQUIRE(unknown);
  CHECK_FALSE(unknown->has_value());
  auto bad = memcg.directory().getAttribute("");
  REQUIRE_FALSE(bad);
  CHECK(std::string(bad.error().syscall) == "fgetxattr");
}

TEST_CASE_FIXTURE(NoLeaks, "Directory.claim has one holder at a time, and ends with it") {
  const TemporaryDirectory temporary;
  const auto first = temporary.open();
  const auto second = temporary.open();
  CHECK(*first.claim());
  CHECK(!*second.claim());
  first.unclaim();
  CHECK(*second.claim());
  {
    const auto third = temporary.open();
    second.unclaim();
    CHECK(*third.claim());
  }
  CHECK(*first.claim());
}

TEST_CASE_FIXTURE(NoLeaks, "a leaf cgroup is known by its link count") {
  NEEDS_MEMCG();
  const Memcg parent;
  CHECK(parent.directory().subdirectories()->empty());
  const Memcg child(&parent);
  CHECK(parent.directory().subdirectories()->size() == 1);
}

}  // namespace
}  // namespace reprieve::test
