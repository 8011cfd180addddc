#include "core/arena.h"

#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <fstream>
#include <string>

#include "support.h"

namespace reprieve::test {
namespace {

/** The VmFlags of the mapping that starts at `address` (proc(5), smaps). */
std::string flagsOf(const void* address) {
  char start[32];
  std::snprintf(start, sizeof start, "%lx-", static_cast<unsigned long>(reinterpret_cast<uintptr_t>(address)));
  std::ifstream smaps("/proc/self/smaps");
  bool inside = false;
  for (std::string line; std::getline(smaps, line);) {
    if (line.starts_with(start)) inside = true;
    if (inside && line.starts_with("VmFlags:")) return line + ' ';
  }
  return {};
}

TEST_CASE_FIXTURE(NoLeaks, "Arena is locked, resident, and left out of core dumps and children") {
  auto arena = Arena::map(1 << 20);
  REQUIRE(arena);
  CHECK(arena->size() == 1 << 20);
  CHECK(*arena->residentBytes() == 1 << 20);
  std::memset(arena->data(), 7, arena->size());
  const std::string flags = flagsOf(arena->data());
  CHECK(flags.find(" lo ") != std::string::npos);
  CHECK(flags.find(" dd ") != std::string::npos);
  CHECK(flags.find(" dc ") != std::string::npos);
}

TEST_CASE_FIXTURE(NoLeaks, "Arena spans whole pages, more than one look of mincore covers") {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  auto small = Arena::map(1);
  REQUIRE(small);
  CHECK(small->size() == page);
  auto large = Arena::map(1500 * page + 1);
  REQUIRE(large);
  CHECK(*large->residentBytes() == 1501 * page);
}

TEST_CASE_FIXTURE(NoLeaks, "Arena.residentBytes sees a page that went away") {
  auto arena = Arena::map(1 << 20);
  REQUIRE(arena);
  REQUIRE(munlock(arena->data(), arena->size()) == 0);
  REQUIRE(madvise(arena->data(), 4096, MADV_DONTNEED) == 0);
  CHECK(*arena->residentBytes() == (1 << 20) - 4096);
}

TEST_CASE_FIXTURE(NoLeaks, "Arena says what failed, and leaves nothing mapped") {
  auto nothing = Arena::map(0);
  REQUIRE_FALSE(nothing);
  CHECK(nothing.error().number == EINVAL);
  CHECK(std::string(nothing.error().syscall) == "mmap");
  CHECK_FALSE(Arena::map(SIZE_MAX));
  auto tooMuch = Arena::map(size_t{1} << 50);
  REQUIRE_FALSE(tooMuch);
  CHECK(tooMuch.error().number == ENOMEM);

  // Without privilege RLIMIT_MEMLOCK decides; in a child, because the privilege is given up for good.
  Child unprivileged([] {
    const rlimit none{0, 0};
    if (setrlimit(RLIMIT_MEMLOCK, &none) != 0) _exit(2);
    if (geteuid() == 0 && setuid(65534) != 0) _exit(3);
    auto arena = Arena::map(4096);
    const bool refused = !arena && std::string(arena.error().syscall) == "mlock";
    if (!refused) abort();
  });
  CHECK(unprivileged.reap() == 0);
}

}  // namespace
}  // namespace reprieve::test
