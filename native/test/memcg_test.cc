// What the library builds on, tried on the real cgroup v1 memory controller (Documentation/admin-guide/cgroup-v1/
// memory.rst). Needs root; every group has a limit, every child an end.
#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <csignal>
#include <thread>

#include "core/control_file.h"
#include "core/killer.h"
#include "support.h"

namespace reprieve::test {
namespace {

constexpr size_t kMiB = 1 << 20;
using Tokens = std::vector<int32_t>;

int32_t listen(EventSet& set, const Memcg& memcg, const char* file = "memory.oom_control", const char* argument = "") {
  auto token = set.addCgroupEvent(memcg.directory(), file, argument);
  REQUIRE(token);
  return *token;
}

void kill(EventSet& set, const Memcg& memcg) {
  const auto shared = std::shared_ptr<EventSet>(&set, [](EventSet*) {});
  Killer killer(shared);
  const std::array<const Directory*, 1> directories{&memcg.directory()};
  auto count = killer.round(directories, "cgroup.procs");
  REQUIRE(count);
  CHECK(*count == 1);
  CHECK(waitFor([&] { return killer.alive() == 0; }));
}

TEST_CASE_FIXTURE(NoLeaks, "memory.oom_control fires when a leak meets the limit, and again for who comes late") {
  NEEDS_MEMCG();
  const Memcg memcg;
  memcg.park(32 * kMiB);
  const auto set = *EventSet::create();
  const int32_t token = listen(*set, memcg);
  CHECK(waitReady(*set, 0).empty());

  Child child(memcg.inside([] { leak(64 * kMiB); }));
  CHECK(waitReady(*set) == Tokens{token});
  CHECK(waitFor([&] { return memcg.underOom(); }));
  CHECK(waitpid(child.pid(), nullptr, WNOHANG) == 0);

  const int32_t late = listen(*set, memcg);
  const Tokens ready = waitReady(*set, 1000);
  CHECK(std::find(ready.begin(), ready.end(), late) != ready.end());

  kill(*set, memcg);
  CHECK(child.reap() == SIGKILL);
  CHECK(waitFor([&] { return !memcg.underOom(); }));
}

TEST_CASE_FIXTURE(NoLeaks, "an OOM event goes down the tree and not up") {
  NEEDS_MEMCG();
  const Memcg parent;
  parent.write("memory.oom_control", "1");
  const Memcg child(&parent);
  const Memcg sibling(&parent);
  const auto set = *EventSet::create();
  const int32_t above = listen(*set, parent);
  const int32_t below = listen(*set, child);
  const int32_t beside = listen(*set, sibling);

  SUBCASE("the child's own limit") {
    child.park(32 * kMiB);
    const Child leaker(child.inside([] { leak(64 * kMiB); }));
    CHECK(waitReady(*set) == Tokens{below});
    CHECK(waitReady(*set, 100).empty());
    CHECK_FALSE(parent.underOom());
  }
  SUBCASE("the parent's limit") {
    child.write("memory.oom_control", "1");
    parent.park(32 * kMiB);
    const Child leaker(child.inside([] { leak(64 * kMiB); }));
    Tokens seen = waitReady(*set);
    for (Tokens more = waitReady(*set, 100); !more.empty(); more = waitReady(*set, 100)) {
      seen.insert(seen.end(), more.begin(), more.end());
    }
    for (const int32_t token : {above, below, beside}) {
      CAPTURE(token);
      CHECK(std::find(seen.begin(), seen.end(), token) != seen.end());
    }
  }
}

TEST_CASE_FIXTURE(NoLeaks, "a usage threshold fires on both crossings") {
  NEEDS_MEMCG();
  const Memcg memcg;
  memcg.park(64 * kMiB);
  const auto set = *EventSet::create();
  const int32_t token = listen(*set, memcg, "memory.usage_in_bytes", std::to_string(16 * kMiB).c_str());
  Child child(memcg.inside([] { leak(32 * kMiB); }));
  CHECK(waitReady(*set) == Tokens{token});
  CHECK(waitFor([&] { return std::stoul(memcg.read("memory.usage_in_bytes")) > 32 * kMiB; }));
  waitReady(*set, 0);
  kill(*set, memcg);
  CHECK(child.reap() == SIGKILL);
  // The downward crossing is noticed when the kernel next looks, which uncharging brings about.
  CHECK(waitReady(*set) == Tokens{token});
}

TEST_CASE_FIXTURE(NoLeaks, "memory.pressure_level takes its levels and refuses others") {
  NEEDS_MEMCG();
  const Memcg memcg;
  const auto set = *EventSet::create();
  for (const char* level : {"low", "medium", "critical", "low,hierarchy", "critical,local"}) {
    CAPTURE(level);
    CHECK(set->addCgroupEvent(memcg.directory(), "memory.pressure_level", level));
  }
  CHECK(set->size() == 5);
  auto refused = set->addCgroupEvent(memcg.directory(), "memory.pressure_level", "dire");
  REQUIRE_FALSE(refused);
  CHECK(refused.error().number == EINVAL);
  CHECK(std::string(refused.error().syscall) == "write");
  CHECK(refused.error().path == memcg.directory().path() + "/memory.pressure_level");
  CHECK(set->size() == 5);
}

TEST_CASE_FIXTURE(NoLeaks, "only some files have events") {
  NEEDS_MEMCG();
  const Memcg memcg;
  const auto set = *EventSet::create();
  auto refused = set->addCgroupEvent(memcg.directory(), "memory.stat", "");
  REQUIRE_FALSE(refused);
  CHECK(refused.error().number == EINVAL);
  CHECK(set->size() == 0);
}

TEST_CASE_FIXTURE(NoLeaks, "rmdir signals every listener") {
  NEEDS_MEMCG();
  Memcg memcg;
  const auto set = *EventSet::create();
  const int32_t token = listen(*set, memcg);
  REQUIRE(memcg.remove());
  CHECK(waitReady(*set) == Tokens{token});
  auto gone = memcg.directory().readFile("memory.oom_control");
  REQUIRE_FALSE(gone);
  CHECK((gone.error().number == ENOENT || gone.error().number == ENODEV));
}

TEST_CASE_FIXTURE(NoLeaks, "a kept control file of a removed cgroup gives ENODEV") {
  NEEDS_MEMCG();
  Memcg memcg;
  auto file = ControlFile::open(memcg.directory(), "memory.usage_in_bytes", O_RDONLY);
  REQUIRE(file);
  CHECK(file->readNumber());
  REQUIRE(memcg.remove());
  auto gone = file->readNumber();
  REQUIRE_FALSE(gone);
  CHECK(gone.error().number == ENODEV);
}

TEST_CASE_FIXTURE(NoLeaks, "an event outlives neither its token nor its set") {
  NEEDS_MEMCG();
  const Memcg memcg;
  memcg.park(32 * kMiB);
  const auto set = *EventSet::create();
  const int32_t forgotten = listen(*set, memcg);
  const int32_t kept = listen(*set, memcg);
  set->remove(forgotten);
  const Child child(memcg.inside([] { leak(64 * kMiB); }));
  CHECK(waitReady(*set) == Tokens{kept});
}

// The reason why the killer opens cgroup.procs anew: cgroup_pidlist_start() in kernel/cgroup/cgroup-v1.c keeps a list
// for as long as the descriptor is read at least about once a second.
TEST_CASE_FIXTURE(NoLeaks, "a kept descriptor of cgroup.procs lies, a new one does not") {
  NEEDS_MEMCG();
  const Memcg memcg;
  auto kept = ControlFile::open(memcg.directory(), "cgroup.procs", O_RDONLY);
  REQUIRE(kept);
  ReadBuffer buffer;
  CHECK((*kept->read(buffer)).empty());
  const Child child(memcg.inside(sleepForever));
  // Not by cgroup.procs: who opens it anew renews the list for all that hold it.
  auto proc = Directory::open("/proc/" + std::to_string(child.pid()));
  REQUIRE(proc);
  const std::string name = memcg.directory().path().substr(memcg.directory().path().rfind('/'));
  CHECK(waitFor([&] { return proc->readFile("cgroup")->find(name) != std::string::npos; }));
  CHECK((*kept->read(buffer)).empty());
  CHECK(memcg.read("cgroup.procs") == std::to_string(child.pid()) + '\n');
}

TEST_CASE_FIXTURE(NoLeaks, "memory.oom_control is read truly through a kept descriptor") {
  NEEDS_MEMCG();
  const Memcg memcg;
  auto kept = ControlFile::open(memcg.directory(), "memory.oom_control", O_RDWR);
  REQUIRE(kept);
  const std::array<std::string_view, 4> keys{"oom_kill_disable", "under_oom", "oom_kill", "none"};
  std::array<double, 4> out{};
  REQUIRE(kept->readFields(keys, out));
  CHECK(out[0] == 0);
  CHECK(out[1] == 0);
  CHECK(out[2] == 0);
  CHECK(out[3] != out[3]);
  REQUIRE(kept->write("1"));
  REQUIRE(kept->readFields(keys, out));
  CHECK(out[0] == 1);
  auto refused = kept->write("2");
  REQUIRE_FALSE(refused);
  CHECK(refused.error().number == EINVAL);
}

TEST_CASE_FIXTURE(NoLeaks, "directories and extended attributes of cgroups are heard") {
  NEEDS_MEMCG();
  const Memcg parent;
  const auto set = *EventSet::create();
  REQUIRE(set->watchDirectory(parent.directory()));
  {
    const Memcg child(&parent);
    CHECK(waitReady(*set).size() == 1);
    auto events = set->readDirectoryEvents();
    REQUIRE(events->size() == 1);
    CHECK(events->front().created);
  }
  auto events = set->readDirectoryEvents();
  REQUIRE(!events->empty());
  CHECK(events->back().removed);
}

}  // namespace
}  // namespace reprieve::test
