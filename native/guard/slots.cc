#include "slots.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>

#include <algorithm>
#include <cerrno>
#include <new>

#include "memcg.h"
#include "record.h"

namespace reprieve::guard {
namespace {

/** A memcg counts as full this close to its limit: a fault that does not fit can be of more than one page. */
bool isAt(uint64_t usage, uint64_t limit) {
  if (limit == UINT64_MAX) return false;
  return usage >= limit - std::min<uint64_t>(1 << 20, limit / 8);
}

int readAtLimit(const Fd& usageFile, const Fd& limitFile, bool& full) {
  uint64_t usage = 0;
  uint64_t limit = 0;
  if (const int failed = readNumber(usageFile.get(), usage); failed != 0) return failed;
  if (const int failed = readNumber(limitFile.get(), limit); failed != 0) return failed;
  full = isAt(usage, limit);
  return 0;
}

/** What a slot shows by itself. */
int lookAt(const Slot& slot, Look& out) {
  out = {};
  OomState state{};
  if (const int failed = readOomState(slot.control.get(), state); failed != 0) return failed;
  out.killDisabled = state.killDisabled;
  out.underOom = state.underOom;
  return out.underOom ? slot.readFull(out.full) : 0;
}

}  // namespace

int Slot::open(Fd memcg, const Message& arm, Failure& failure) {
  failure = Failure::kNotMemcg;
  struct stat status {};
  struct statfs system {};
  if (fstat(memcg.get(), &status) != 0 || fstatfs(memcg.get(), &system) != 0) return errno;
  if (status.st_ino != arm.inode || system.f_type != CGROUP_SUPER_MAGIC) return EINVAL;

  failure = Failure::kOpen;
  const auto openFile = [&](const char* name, int access) { return Fd(openBeneath(memcg.get(), name, access)); };
  control = openFile("memory.oom_control", O_RDWR);
  if (control) usage = openFile("memory.usage_in_bytes", O_RDONLY);
  if (usage) limit = openFile("memory.limit_in_bytes", O_RDONLY);
  if (!limit) return errno;
  bothUsage = openFile("memory.memsw.usage_in_bytes", O_RDONLY);
  bothLimit = openFile("memory.memsw.limit_in_bytes", O_RDONLY);

  const Fd registry = openFile("cgroup.event_control", O_WRONLY);
  if (!registry) return errno;
  failure = Failure::kRegister;
  event = Fd(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  if (!event) return errno;
  Line line;
  line.add(static_cast<uint64_t>(event.get())).add(" ").add(static_cast<uint64_t>(control.get()));
  if (const int failed = writeText(registry.get(), line.view()); failed != 0) return failed;

  directory = std::move(memcg);
  inode = arm.inode;
  respondMs = arm.respondMs;
  handleMs = arm.handleMs;
  original = arm.original;
  readAbove(directory.get(), above);
  path.fill('\0');
  std::copy(arm.path.begin(), arm.path.end(), path.begin());
  return 0;
}

int Slot::readFull(bool& full) const {
  const int failed = readAtLimit(usage, limit, full);
  if (failed != 0 || full || !bothUsage || !bothLimit) return failed;
  return readAtLimit(bothUsage, bothLimit, full);
}

bool Slots::makeRoom() {
  if (free_ > 0) return true;
  if (chunks_ == kMostChunks) return false;
  void* memory = mmap(nullptr, sizeof(Chunk), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return false;
  chunk_[chunks_++] = new (memory) Chunk();
  free_ += kPerChunk;
  return true;
}

Slot* Slots::find(uint64_t inode) {
  if (inode == 0) return nullptr;
  for (size_t i = 0; i < chunks_; i++) {
    for (size_t k = 0; k < kPerChunk; k++) {
      if (chunk_[i]->inodes[k] == inode) return &chunk_[i]->slots[k];
    }
  }
  return nullptr;
}

int Slots::look(const Slot& slot, Look& out) {
  const int failed = lookAt(slot, out);
  if (failed != 0 || !out.underOom) return failed;
  for (const uint64_t inode : slot.above) {
    Look above;
    Slot* const other = find(inode);
    // As findOwner() in src/source/owner.ts has it. One that is gone is nobody's owner.
    if (other != nullptr && lookAt(*other, above) == 0 && above.mayWait()) out.owner = other;
  }
  return 0;
}

Slot* Slots::take(uint64_t inode) {
  for (size_t i = 0; i < chunks_; i++) {
    for (size_t k = 0; k < kPerChunk; k++) {
      if (chunk_[i]->inodes[k] != 0) continue;
      chunk_[i]->inodes[k] = inode;
      free_--;
      return &chunk_[i]->slots[k];
    }
  }
  return nullptr;
}

void Slots::drop(Slot& slot) {
  *inodeOf(slot) = 0;
  free_++;
  slot.plan.clear();
  slot = Slot();
}

Slot* Slots::at(size_t index) {
  Chunk& chunk = *chunk_[index / kPerChunk];
  return chunk.inodes[index % kPerChunk] != 0 ? &chunk.slots[index % kPerChunk] : nullptr;
}

size_t Slots::indexOf(const Slot& slot) const {
  for (size_t i = 0; i < chunks_; i++) {
    const Slot* first = chunk_[i]->slots.data();
    if (&slot >= first && &slot < first + kPerChunk) return i * kPerChunk + static_cast<size_t>(&slot - first);
  }
  return 0;
}

uint64_t* Slots::inodeOf(const Slot& slot) {
  const size_t index = indexOf(slot);
  return &chunk_[index / kPerChunk]->inodes[index % kPerChunk];
}

}  // namespace reprieve::guard
