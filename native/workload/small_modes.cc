// The modes of a few lines each: hold, fork, populate, stream.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <csignal>
#include <cstring>

#include "workload.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

namespace workload {

namespace {

// Static, and written to by its users before the start: at a full memcg the kernel answers EFAULT
// for a buffer that is not resident.
char buffer[256 << 10];

void sayResult(uint64_t bytes, int error) {
  say("{\"bytes\":%" PRIu64 ",\"errno\":%d,\"error\":\"%s\"}\n", bytes, error, error != 0 ? strerror(error) : "");
}

// One thing done since `before`, for system calls that touch memory on our behalf.
void noteCall(uint64_t before, uint64_t bytes) {
  const uint64_t after = nowUs();
  stats->bytesTouched += bytes;
  stats->endedAtUs = after;
  ++stats->iterations;
  noteStall(after - before, after);
}

// Returns how much the file took; errno tells why it took no more.
uint64_t fill(int fd, uint64_t bytes) {
  errno = 0;
  uint64_t done = 0;
  while (done < bytes) {
    const uint64_t before = nowUs();
    stampBefore(before);
    const ssize_t written = write(fd, buffer, std::min<uint64_t>(sizeof buffer, bytes - done));
    if (written < 0) {
      noteRefusal();
      break;
    }
    done += static_cast<uint64_t>(written);
    noteCall(before, static_cast<uint64_t>(written));
  }
  return done;
}

bool claim(std::atomic<uint64_t>& total, uint64_t most) {
  uint64_t seen = total;
  while (seen < most) {
    if (total.compare_exchange_weak(seen, seen + 1)) return true;
  }
  return false;
}

// Every process forks on, but all are children of the first one: one that is killed takes no
// other with it, as in a real fork bomb, and still none outlives the first.
//
// A child born into a full memcg dies of SIGSEGV at once where the C library uses restartable
// sequences (glibc from 2.35), as any program's child does there: the kernel writes to a page that
// it would have to copy first. GLIBC_TUNABLES=glibc.pthread.rseq=0 lets all of them live and park.
[[noreturn]] void multiply(const Options& options, std::atomic<uint64_t>& total, Kin kin) {
  while (claim(total, options.children)) {
    const pid_t pid = spawn(kin);
    if (pid == 0) {
      kin = Kin::sibling;
      char* area = mapAnonymous(options.bytes);
      if (area != nullptr)
        touch(area, options.bytes);
      else
        noteRefusal();
    } else if (pid > 0) {
      ++stats->iterations;
    } else {
      noteRefusal();
      --total;
      sleepUs(1000);
    }
    sleepUs(options.everyUs);
  }
  rest();
}

}  // namespace

int hold(const Options& options) {
  if (options.file != nullptr) {
    memset(buffer, 'r', sizeof buffer);
    const int fd = open(options.file, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd < 0) fail("cannot write", options.file);
    awaitStart(options);
    const uint64_t done = fill(fd, options.bytes);
    sayResult(done, errno);
    rest();
  }
  char* area = mapAnonymous(options.bytes);
  if (area == nullptr) fail("cannot map", "that much");
  awaitStart(options);
  touch(area, options.bytes);
  sayResult(options.bytes, 0);
  rest();
}

int forkOut(const Options& options) {
  std::atomic<uint64_t>& total = sharedCounter();
  signal(SIGCHLD, SIG_IGN);  // no zombies: whoever is killed is gone
  awaitStart(options);
  multiply(options, total, Kin::child);
}

int populate(const Options& options) {
  char* area = mapAnonymous(options.bytes);
  if (area == nullptr) fail("cannot map", "that much");
  awaitStart(options);
  const uint64_t before = nowUs();
  stampBefore(before);
  const int error = madvise(area, options.bytes, MADV_POPULATE_WRITE) == 0 ? 0 : errno;
  if (error != 0) noteRefusal();
  noteCall(before, error == 0 ? options.bytes : 0);
  sayResult(options.bytes, error);
  rest();
}

int stream(const Options& options) {
  memset(buffer, 0, sizeof buffer);
  const int fd = open(options.file, O_RDONLY | O_CLOEXEC);
  if (fd < 0) fail("cannot read", options.file);
  awaitStart(options);
  uint64_t passes = 0;
  for (const uint64_t end = nowUs() + options.secondsUs; nowUs() < end;) {
    const uint64_t before = nowUs();
    stampBefore(before);
    const ssize_t got = read(fd, buffer, sizeof buffer);
    if (got > 0) {
      noteCall(before, static_cast<uint64_t>(got));
    } else if (got == 0) {
      if (lseek(fd, 0, SEEK_CUR) == 0) sleepUs(1000);  // an empty file: no need to spin
      lseek(fd, 0, SEEK_SET);
      ++passes;
    } else {
      noteRefusal();
      sleepUs(1000);
    }
  }
  say("{\"passes\":%" PRIu64 ",\"bytes\":%" PRIu64 ",\"errors\":%" PRIu64 "}\n", passes, stats->bytesTouched.load(),
      stats->errors.load());
  return 0;
}

}  // namespace workload
