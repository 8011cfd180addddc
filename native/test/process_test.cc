#include "core/process.h"

#include <sched.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <array>
#include <cstdlib>
#include <fstream>
#include <thread>

#include "support.h"

namespace reprieve::test {
namespace {

size_t lockedKilobytes() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with("VmLck:")) return std::stoul(line.substr(6));
  }
  return 0;
}

/** The work a child does for a test: ends by SIGABRT where something does not hold. */
void expect(bool holds) {
  if (!holds) abort();
}

TEST_CASE("nowUs is the monotonic clock in microseconds") {
  const double before = nowUs();
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  const double passed = nowUs() - before;
  CHECK(passed >= 5000);
  CHECK(passed < 5e6);
}

TEST_CASE("readThreadUsage counts the pages touched") {
  constexpr size_t kPages = 64;
  auto* data = static_cast<volatile char*>(
      mmap(nullptr, kPages * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  const ThreadUsage before = readThreadUsage();
  for (size_t page = 0; page < kPages; page++) data[page * 4096] = 1;
  const ThreadUsage after = readThreadUsage();
  munmap(const_cast<char*>(data), kPages * 4096);
  CHECK(after.minorFaults - before.minorFaults >= 1);
  CHECK(after.majorFaults >= before.majorFaults);
}

TEST_CASE("readThreadUsage counts how often the thread slept, and not what others did") {
  const ThreadUsage before = readThreadUsage();
  for (int i = 0; i < 3; i++) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  const ThreadUsage after = readThreadUsage();
  CHECK(after.voluntarySwitches - before.voluntarySwitches >= 3);
  CHECK(after.involuntarySwitches >= before.involuntarySwitches);
  ThreadUsage other{};
  std::thread([&] { other = readThreadUsage(); }).join();
  CHECK(other.voluntarySwitches < after.voluntarySwitches);
}

/** Faults of writing to each page but the first; AddressSanitizer's own memory is left out of it. */
__attribute__((no_sanitize_address)) double faultsOfTouching(volatile char* data, size_t pages) {
  const double before = readThreadUsage().minorFaults;
  for (size_t page = 1; page < pages; page++) data[page * 4096] = 1;
  return readThreadUsage().minorFaults - before;
}

TEST_CASE("populate leaves no page of a small mapping to be faulted in, and none that a fork has shared") {
  constexpr size_t kPages = 64;
  constexpr size_t kBytes = kPages * 4096;
  // Alone: merged with a neighbour it might be one of those that are left out.
  auto* guarded = static_cast<char*>(mmap(nullptr, kBytes + 8192, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  REQUIRE(mprotect(guarded + 4096, kBytes, PROT_READ | PROT_WRITE) == 0);
  volatile char* data = guarded + 4096;
  data[0] = 7;
  auto populated = populate();
  if (!populated && populated.error().number == EINVAL) {
    MESSAGE("skipped: needs MADV_POPULATE_WRITE, Linux 5.14");
    return;
  }
  REQUIRE(populated);
  CHECK(*populated >= kBytes);
  CHECK(faultsOfTouching(data, kPages) == 0);
  CHECK(data[0] == 7);
  Child child(sleepForever);
  REQUIRE(populate());
  CHECK(faultsOfTouching(data, kPages) == 0);
  munmap(guarded, kBytes + 8192);
}

TEST_CASE("writableRanges takes what the program writes, and no stack of a thread") {
  const auto ranges = writableRanges(
      "1000-3000 rw-p 00000000 00:00 0 \n"
      "3000-4000 r--p 00000000 08:01 12                  /usr/bin/node\n"
      "4000-5000 rw-p 00000000 08:01 12                  /usr/bin/node\n"
      "5000-6000 rwxp 00000000 00:00 0 \n"
      "6000-7000 rw-s 00000000 00:01 1                   /memfd:words\n"
      "7000-8000 ---p 00000000 00:00 0 \n"
      "10000-910000 rw-p 00000000 00:00 0                [heap]\n"
      "a00000-1200000 rw-p 00000000 00:00 0 \n"
      "1400000-1800000 rw-p 00000000 00:00 0 \n"
      "2000000-2200000 rw-p 00000000 00:00 0 \n"
      "3000000-3201000 rw-p 00000000 00:00 0");
  REQUIRE(ranges.size() == 5);
  CHECK(ranges[0].start == 0x1000);
  CHECK(ranges[0].bytes == 0x2000);
  CHECK(ranges[1].start == 0x4000);
  CHECK(ranges[2].start == 0x5000);
  CHECK(ranges[3].start == 0x10000);
  CHECK(ranges[4].start == 0x2000000);
}

TEST_CASE_FIXTURE(NoLeaks, "probeRelease tells whether process_mrelease exists") {
  const int number = probeRelease();
  CHECK((number == EINVAL || number == ENOSYS));
}

TEST_CASE("Scheduling is raised, not inherited, and restored") {
  if (geteuid() != 0) {
    MESSAGE("skipped: needs CAP_SYS_NICE");
    return;
  }
  Child child([] {
    expect(setpriority(PRIO_PROCESS, 0, 3) == 0);
    Scheduling scheduling;
    expect(static_cast<bool>(scheduling.restore()));
    expect(static_cast<bool>(scheduling.raise(Raise::kRealtime)));
    expect((sched_getscheduler(0) & ~SCHED_RESET_ON_FORK) == SCHED_RR);
    Child plain([] { expect(sched_getscheduler(0) == SCHED_OTHER); });
    expect(plain.reap() == 0);
    expect(static_cast<bool>(scheduling.raise(Raise::kNice)));
    expect((sched_getscheduler(0) & ~SCHED_RESET_ON_FORK) == SCHED_OTHER);
    expect(getpriority(PRIO_PROCESS, 0) == -20);
    Child kind([] { expect(getpriority(PRIO_PROCESS, 0) == 0); });
    expect(kind.reap() == 0);
    expect(static_cast<bool>(scheduling.restore()));
    expect(sched_getscheduler(0) == SCHED_OTHER);
    expect(getpriority(PRIO_PROCESS, 0) == 3);
  });
  CHECK(child.reap() == 0);
}

TEST_CASE("Scheduling says what failed") {
  Child child([] {
    const rlimit none{0, 0};
    expect(setrlimit(RLIMIT_NICE, &none) == 0 && setrlimit(RLIMIT_RTPRIO, &none) == 0);
    if (geteuid() == 0) expect(setuid(65534) == 0);
    Scheduling scheduling;
    auto raised = scheduling.raise(Raise::kRealtime);
    expect(!raised && raised.error().number == EPERM && std::string(raised.error().syscall) == "sched_setattr");
    expect(static_cast<bool>(scheduling.restore()));
  });
  CHECK(child.reap() == 0);
}

TEST_CASE("textRanges takes program text and constants") {
  const auto ranges = textRanges(
      "1000-3000 r-xp 00000000 08:01 12                  /usr/bin/node\n"
      "3000-4000 r--p 00000000 08:01 12                  /usr/lib/with space.so\n"
      "4000-5000 rw-p 00000000 08:01 12                  /usr/bin/node\n"
      "5000-6000 r-xp 00000000 08:01 12                  /usr/lib/old.so (deleted)\n"
      "6000-7000 r--p 00000000 00:05 1                   /dev/zero\n"
      "7000-8000 r-xp 00000000 00:01 1                   /memfd:code\n"
      "8000-9000 r-xp 00000000 00:00 0                   [vdso]\n"
      "9000-a000 r--s 00000000 08:01 12                  /var/shared\n"
      "a000-b000 r--p 00000000 00:00 0 \n"
      "garbage /x\nb000 r-xp /x\nc000-b000 r-xp 0 0 0 /x\n-d000 r-xp 0 0 0 /x\n\n"
      "d000-e000 r--p 00000000 08:01 12                  /last");
  REQUIRE(ranges.size() == 3);
  CHECK(ranges[0].start == 0x1000);
  CHECK(ranges[0].bytes == 0x2000);
  CHECK(ranges[1].start == 0x3000);
  CHECK(ranges[2].start == 0xd000);
  CHECK(textRanges("").empty());
}

TEST_CASE_FIXTURE(NoLeaks, "TextLock locks and unlocks") {
  // In a child, because AddressSanitizer and the other tests need not be locked.
  Child child([] {
    if (geteuid() != 0) return;
    TextLock text;
    const size_t before = lockedKilobytes();
    auto outcome = text.lock();
    expect(outcome && outcome->failed == 0 && outcome->bytes > 0);
    expect(lockedKilobytes() - before == outcome->bytes / 1024);
    text.unlock();
    expect(lockedKilobytes() == before);
  });
  CHECK(child.reap() == 0);
}

}  // namespace
}  // namespace reprieve::test
