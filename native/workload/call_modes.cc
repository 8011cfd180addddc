// The modes that take their memory inside system calls: write, read, stuck.
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "workload.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

namespace workload {

namespace {

constexpr size_t kChunk = 256 << 10;
char buffer[kChunk];

void noteCall(uint64_t before, ssize_t bytes) {
  const uint64_t after = nowUs();
  if (bytes > 0) stats->bytesTouched += static_cast<uint64_t>(bytes);
  stats->endedAtUs = after;
  ++stats->iterations;
  noteStall(after - before, after);
}

}  // namespace

// A full memcg refuses the write, and does not make it wait: so this one tries again and again.
int writeOn(const Options& options) {
  memset(buffer, 'w', sizeof buffer);
  const int fd = open(options.file, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  if (fd < 0) fail("cannot write", options.file);
  awaitStart(options);
  for (uint64_t done = 0; done < options.bytes;) {
    const uint64_t before = nowUs();
    stampBefore(before);
    const ssize_t written = write(fd, buffer, std::min<uint64_t>(sizeof buffer, options.bytes - done));
    if (written > 0) {
      done += static_cast<uint64_t>(written);
    } else {
      noteRefusal();
    }
    noteCall(before, written);
    sleepUs(written > 0 ? 0 : 1000);
  }
  rest();
}

int readOn(const Options& options) {
  const int fd = open("/dev/zero", O_RDONLY | O_CLOEXEC);
  if (fd < 0) fail("cannot open", "/dev/zero");
  char* area = mapAnonymous(options.bytes);
  if (area == nullptr) fail("cannot map", "that much");
  awaitStart(options);
  for (;;) {
    const uint64_t before = nowUs();
    stampBefore(before);
    const ssize_t got = read(fd, area, options.bytes);
    if (got < 0) noteRefusal();
    noteCall(before, got);
    madvise(area, options.bytes, MADV_DONTNEED);
    if (got < 0) sleepUs(1000);
  }
}

// Populates a page that nobody ever provides (userfaultfd(2)): a system call that does not end, in a
// sleep that the freezer cannot interrupt. Only SIGKILL ends it.
int stuck(const Options& options) {
  char* area = mapAnonymous(pageSize());
  if (area == nullptr) fail("cannot map", "a page");
  const int faults = static_cast<int>(syscall(SYS_userfaultfd, O_CLOEXEC));
  if (faults < 0) fail("cannot use", "userfaultfd");
  uffdio_api api{};
  api.api = UFFD_API;
  uffdio_register range{};
  range.range = {reinterpret_cast<uint64_t>(area), pageSize()};
  range.mode = UFFDIO_REGISTER_MODE_MISSING;
  if (ioctl(faults, UFFDIO_API, &api) != 0 || ioctl(faults, UFFDIO_REGISTER, &range) != 0) {
    fail("cannot use", "userfaultfd");
  }
  awaitStart(options);
  madvise(area, pageSize(), MADV_POPULATE_WRITE);
  fail("populated", "what nobody provided");
}

}  // namespace workload
