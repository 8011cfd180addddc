#include "core/pressure.h"

#include <poll.h>

#include "support.h"

namespace reprieve::test {
namespace {

constexpr const char* kTrigger = "some 100000 2000000";

TEST_CASE_FIXTURE(NoLeaks, "A pressure trigger takes all of its text, and says what the kernel refuses") {
  auto directory = Directory::open("/proc/pressure");
  if (!directory) {
    MESSAGE("skipped: needs pressure stall information");
    return;
  }
  auto set = openPressureTrigger(*directory, "memory", kTrigger);
  REQUIRE(set);
  pollfd entry{set->get(), POLLPRI, 0};
  // One without a trigger would be ready, with an error.
  CHECK(poll(&entry, 1, 0) == 0);
  // A digit lost would make this window 1 s, which is allowed to some, and never too long.
  auto refused = openPressureTrigger(*directory, "memory", "some 100000 20000000");
  REQUIRE_FALSE(refused);
  CHECK(refused.error().number == EINVAL);
  CHECK(std::string(refused.error().syscall) == "write");
  CHECK(refused.error().path == "/proc/pressure/memory");
  auto missing = openPressureTrigger(*directory, "nothing", kTrigger);
  REQUIRE_FALSE(missing);
  CHECK(missing.error().number == ENOENT);
}

TEST_CASE_FIXTURE(NoLeaks, "A pressure trigger of a cgroup that was removed shows an error") {
  NEEDS_CGROUP2();
  UnifiedGroup group;
  auto set = openPressureTrigger(group.directory(), "memory.pressure", kTrigger);
  REQUIRE(set);
  pollfd entry{set->get(), POLLPRI, 0};
  CHECK(poll(&entry, 1, 0) == 0);
  REQUIRE(group.remove());
  CHECK(poll(&entry, 1, 5000) == 1);
  CHECK((entry.revents & POLLERR) != 0);
}

}  // namespace
}  // namespace reprieve::test
