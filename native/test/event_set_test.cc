#include "core/event_set.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <csignal>
#include <fstream>
#include <set>

#include "support.h"

namespace reprieve::test {
namespace {

using Tokens = std::vector<int32_t>;

std::shared_ptr<EventSet> makeSet() {
  auto set = EventSet::create();
  REQUIRE(set);
  return *set;
}

/** An eventfd in the set, and its number for signalling. */
struct Signal {
  int32_t token;
  int fd;
  void raise() const { REQUIRE(eventfd_write(fd, 1) == 0); }
};

Signal addSignal(EventSet& set) {
  Fd fd(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  REQUIRE(fd);
  const int number = fd.get();
  auto token = set.addEventfd(std::move(fd));
  REQUIRE(token);
  return {*token, number};
}

TEST_CASE_FIXTURE(NoLeaks, "EventSet tells each eventfd once") {
  const auto set = makeSet();
  CHECK((fcntl(set->descriptor(), F_GETFD) & FD_CLOEXEC) != 0);
  const Signal one = addSignal(*set);
  const Signal two = addSignal(*set);
  CHECK(one.token == 1);
  CHECK(two.token == 2);
  CHECK(set->size() == 2);
  CHECK(waitReady(*set, 0).empty());
  two.raise();
  two.raise();
  CHECK(waitReady(*set) == Tokens{two.token});
  CHECK(waitReady(*set, 0).empty());
  one.raise();
  CHECK(waitReady(*set) == Tokens{one.token});
}

TEST_CASE_FIXTURE(NoLeaks, "EventSet forgets a removed token and never uses it again") {
  const auto set = makeSet();
  const Signal one = addSignal(*set);
  one.raise();
  set->remove(one.token);
  set->remove(one.token);
  set->remove(0);
  set->remove(-5);
  set->remove(1000);
  CHECK(set->size() == 0);
  CHECK(waitReady(*set, 0).empty());
  CHECK(addSignal(*set).token == one.token + 1);
}

TEST_CASE_FIXTURE(NoLeaks, "EventSet forgets a removed eventfd that a child still holds") {
  const auto set = makeSet();
  const Signal one = addSignal(*set);
  one.raise();
  const Child holder(sleepForever);
  set->remove(one.token);
  CHECK(waitReady(*set, 20).empty());
}

TEST_CASE_FIXTURE(NoLeaks, "EventSet gives no more tokens than there is room for, and the rest next time") {
  const auto set = makeSet();
  std::vector<Signal> signals;
  for (int i = 0; i < 10; i++) signals.push_back(addSignal(*set));
  for (const Signal& signal : signals) signal.raise();
  std::array<int32_t, 4> room{};
  std::set<int32_t> seen;
  for (const size_t expected : {4U, 4U, 2U, 0U}) {
    REQUIRE(set->drain(room) == expected);
    seen.insert(room.begin(), room.begin() + static_cast<std::ptrdiff_t>(expected));
  }
  CHECK(seen.size() == 10);
  CHECK(set->drain({}) == 0);
}

TEST_CASE_FIXTURE(NoLeaks, "EventSet holds thousands of descriptors") {
  constexpr size_t kCount = 5000;
  rlimit limit{};
  REQUIRE(getrlimit(RLIMIT_NOFILE, &limit) == 0);
  const rlimit before = limit;
  if (limit.rlim_max < kCount + 100) {
    MESSAGE("skipped: the hard limit of open files is " << limit.rlim_max);
    return;
  }
  limit.rlim_cur = limit.rlim_max;
  REQUIRE(setrlimit(RLIMIT_NOFILE, &limit) == 0);
  {
    const auto set = makeSet();
    std::vector<Signal> signals;
    for (size_t i = 0; i < kCount; i++) signals.push_back(addSignal(*set));
    CHECK(set->size() == kCount);
    for (const Signal& signal : signals) signal.raise();
    std::set<int32_t> seen;
    std::vector<int32_t> room(1024);
    for (size_t count = set->drain(room); count > 0; count = set->drain(room)) {
      seen.insert(room.begin(), room.begin() + static_cast<std::ptrdiff_t>(count));
    }
    CHECK(seen.size() == kCount);
    for (const Signal& signal : signals) set->remove(signal.token);
    CHECK(set->size() == 0);
  }
  REQUIRE(setrlimit(RLIMIT_NOFILE, &before) == 0);
}

TEST_CASE_FIXTURE(NoLeaks, "EventSet tells the exit of processes, once for all under one token") {
  const auto set = makeSet();
  Child first(sleepForever);
  Child second(sleepForever);
  auto one = Pidfd::open(first.pid());
  auto two = Pidfd::open(second.pid());
  REQUIRE(one);
  REQUIRE(two);
  const int32_t token = set->takeToken();
  REQUIRE(set->watchExit(one->descriptor(), token));
  REQUIRE(set->watchExit(two->descriptor(), token));
  CHECK(set->size() == 2);
  CHECK(waitReady(*set, 0).empty());
  CHECK(*one->signal(SIGKILL));
  CHECK(*two->signal(SIGKILL));
  CHECK(waitFor([&] { return one->exited() && two->exited(); }));
  CHECK(waitReady(*set) == Tokens{token});
  CHECK(waitReady(*set, 0).empty());
  set->forgetExit(one->descriptor());
  set->forgetExit(two->descriptor());
  set->forgetExit(two->descriptor());
  CHECK(set->size() == 0);
  auto refused = set->watchExit(-1, token);
  REQUIRE_FALSE(refused);
  CHECK(refused.error().number == EBADF);
  CHECK(std::string(refused.error().syscall) == "epoll_ctl");
}

TEST_CASE_FIXTURE(NoLeaks, "EventSet listens to directories") {
  const TemporaryDirectory temporary;
  const Directory directory = temporary.open();
  const auto set = makeSet();
  auto token = set->watchDirectory(directory);
  REQUIRE(token);
  CHECK(set->size() == 1);
  CHECK(set->readDirectoryEvents()->empty());

  REQUIRE(directory.makeDirectory("new"));
  CHECK(waitReady(*set) == Tokens{EventSet::kDirectoryToken});
  auto created = set->readDirectoryEvents();
  REQUIRE(created->size() == 1);
  CHECK(created->front().token == *token);
  CHECK(created->front().name == "new");
  CHECK(created->front().created);
  CHECK_FALSE(created->front().removed);
  CHECK_FALSE(created->front().attributes);

  REQUIRE(rename((temporary.path() + "/new").c_str(), (temporary.path() + "/renamed").c_str()) == 0);
  CHECK(waitReady(*set) == Tokens{EventSet::kDirectoryToken});
  auto moved = set->readDirectoryEvents();
  REQUIRE(moved->size() == 2);
  CHECK(moved->at(0).removed);
  CHECK(moved->at(1).created);

  REQUIRE(directory.removeDirectory("renamed"));
  CHECK(waitReady(*set) == Tokens{EventSet::kDirectoryToken});
  auto removed = set->readDirectoryEvents();
  REQUIRE(removed->size() == 1);
  CHECK(removed->front().removed);

  REQUIRE(chmod(temporary.path().c_str(), 0711) == 0);
  CHECK(waitReady(*set) == Tokens{EventSet::kDirectoryToken});
  auto changed = set->readDirectoryEvents();
  REQUIRE(changed->size() >= 1);
  CHECK(changed->front().attributes);
  CHECK(changed->front().name.empty());

  temporary.write("plain file", "");
  waitReady(*set);
  CHECK(set->readDirectoryEvents()->empty());

  set->remove(*token);
  CHECK(set->size() == 0);
  REQUIRE(directory.makeDirectory("unseen"));
  CHECK(waitReady(*set, 20).empty());
  CHECK(set->readDirectoryEvents()->empty());
}

TEST_CASE_FIXTURE(NoLeaks, "EventSet does not repeat itself while directory events wait to be read") {
  const TemporaryDirectory temporary;
  const Directory directory = temporary.open();
  const auto set = makeSet();
  REQUIRE(set->watchDirectory(directory));
  REQUIRE(directory.makeDirectory("one"));
  CHECK(waitReady(*set).size() == 1);
  CHECK(waitReady(*set, 20).empty());
  REQUIRE(directory.makeDirectory("two"));
  CHECK(set->readDirectoryEvents()->size() == 2);
  REQUIRE(directory.makeDirectory("three"));
  CHECK(waitReady(*set).size() == 1);
}

TEST_CASE_FIXTURE(NoLeaks, "EventSet may listen twice to one directory") {
  const TemporaryDirectory temporary;
  const Directory directory = temporary.open();
  const auto set = makeSet();
  const int32_t one = *set->watchDirectory(directory);
  const int32_t two = *set->watchDirectory(directory);
  CHECK(one != two);
  REQUIRE(directory.makeDirectory("a"));
  auto both = set->readDirectoryEvents();
  REQUIRE(both->size() == 2);
  CHECK(both->at(0).token + both->at(1).token == one + two);
  set->remove(one);
  REQUIRE(directory.makeDirectory("b"));
  auto rest = set->readDirectoryEvents();
  REQUIRE(rest->size() == 1);
  CHECK(rest->front().token == two);
}

TEST_CASE_FIXTURE(NoLeaks, "EventSet tells that a watched directory is gone") {
  const TemporaryDirectory temporary;
  const Directory directory = temporary.open();
  REQUIRE(directory.makeDirectory("sub"));
  const auto set = makeSet();
  int32_t token = 0;
  {
    auto sub = directory.openBeneath("sub");
    REQUIRE(sub);
    token = *set->watchDirectory(*sub);
  }
  REQUIRE(directory.removeDirectory("sub"));
  auto events = set->readDirectoryEvents();
  REQUIRE(events->size() >= 1);
  CHECK(events->back().token == token);
  CHECK(events->back().removed);
  CHECK(events->back().name.empty());
  CHECK(set->size() == 0);
  set->remove(token);
}

TEST_CASE_FIXTURE(NoLeaks, "EventSet tells that the kernel's queue overflowed") {
  std::ifstream file("/proc/sys/fs/inotify/max_queued_events");
  int most = 0;
  file >> most;
  file.close();
  const TemporaryDirectory temporary;
  const Directory directory = temporary.open();
  REQUIRE(directory.makeDirectory("a"));
  REQUIRE(directory.makeDirectory("b"));
  const auto set = makeSet();
  REQUIRE(set->watchDirectory(directory));
  // Two names in turn: the kernel merges an event with an equal one before it.
  for (int i = 0; i <= most; i++) REQUIRE(fchmodat(directory.descriptor(), i % 2 == 0 ? "a" : "b", 0755, 0) == 0);
  auto events = set->readDirectoryEvents();
  REQUIRE(events);
  REQUIRE(!events->empty());
  CHECK(events->back().overflow);
  CHECK(events->back().token == -1);
}

TEST_CASE_FIXTURE(NoLeaks, "EventSet says what failed when listening") {
  const auto set = makeSet();
  Directory closed;
  auto refused = set->watchDirectory(closed);
  REQUIRE_FALSE(refused);
  CHECK(refused.error().number == ENOENT);
  CHECK(std::string(refused.error().syscall) == "inotify_add_watch");
  CHECK(set->size() == 0);

  const TemporaryDirectory temporary;
  auto plain = set->addCgroupEvent(temporary.open(), "memory.oom_control", "");
  REQUIRE_FALSE(plain);
  CHECK(plain.error().number == ENOENT);
  CHECK(plain.error().path == temporary.path() + "/memory.oom_control");
}

TEST_CASE_FIXTURE(NoLeaks, "EventSet tells what a file of cgroup v2 notifies, once each") {
  NEEDS_CGROUP2();
  const UnifiedGroup group;
  const auto set = makeSet();
  auto token = set->watchFile(group.directory(), "cgroup.events");
  REQUIRE(token);
  CHECK(set->size() == 1);
  CHECK(waitReady(*set, 0).empty());
  Child inhabitant(group.inside(sleepForever));
  CHECK(waitReady(*set) == Tokens{*token});
  CHECK(waitReady(*set, 20).empty());
  set->trigger(*token);
  CHECK(waitReady(*set, 20).empty());
  REQUIRE(kill(inhabitant.pid(), SIGKILL) == 0);
  inhabitant.reap();
  CHECK(waitReady(*set) == Tokens{*token});
  set->remove(*token);
  CHECK(set->size() == 0);
  const Child another(group.inside(sleepForever));
  CHECK(waitReady(*set, 20).empty());
}

TEST_CASE_FIXTURE(NoLeaks, "EventSet tells no more than once that the cgroup of a file is gone") {
  NEEDS_CGROUP2();
  const auto set = makeSet();
  UnifiedGroup group;
  auto token = set->watchFile(group.directory(), "cgroup.events");
  REQUIRE(token);
  {
    // So that the file has something to tell when it is gone, and is asked.
    const Child inhabitant(group.inside(sleepForever));
    REQUIRE(waitFor([&] { return group.populated(); }));
  }
  REQUIRE(group.remove());
  CHECK(waitReady(*set) == Tokens{*token});
  CHECK(waitReady(*set, 20).empty());
  CHECK(set->size() == 1);
  set->remove(*token);
  CHECK(set->size() == 0);
}

TEST_CASE_FIXTURE(NoLeaks, "EventSet says what failed when watching a file") {
  const auto set = makeSet();
  const TemporaryDirectory temporary;
  auto missing = set->watchFile(temporary.open(), "memory.events");
  REQUIRE_FALSE(missing);
  CHECK(missing.error().number == ENOENT);
  CHECK(missing.error().path == temporary.path() + "/memory.events");
  temporary.write("memory.events", "");
  // epoll_ctl(2): a plain file cannot be polled.
  auto plain = set->watchFile(temporary.open(), "memory.events");
  REQUIRE_FALSE(plain);
  CHECK(plain.error().number == EPERM);
  CHECK(set->size() == 0);
}

TEST_CASE_FIXTURE(NoLeaks, "EventSet.close lets go of everything") {
  const TemporaryDirectory temporary;
  const auto set = makeSet();
  addSignal(*set);
  REQUIRE(set->watchDirectory(temporary.open()));
  set->close();
  set->close();
  CHECK(set->closed());
  CHECK(set->size() == 0);
  std::array<int32_t, 4> room{};
  CHECK(set->drain(room) == 0);
}

}  // namespace
}  // namespace reprieve::test
