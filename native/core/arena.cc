#include "arena.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <limits>
#include <utility>

namespace reprieve {
namespace {

size_t pageSize() {
  static const auto size = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return size;
}

}  // namespace

Result<Arena> Arena::map(size_t bytes) {
  const size_t page = pageSize();
  if (bytes == 0 || bytes > std::numeric_limits<size_t>::max() - page) return Error{EINVAL, "mmap", {}};
  const size_t size = (bytes + page - 1) / page * page;
  void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) return lastError("mmap");
  Arena arena(data, size);
  if (mlock(data, size) != 0) return lastError("mlock");
  // mlock(2) alone is not enough: within a full memcg it can return before everything is there.
  for (size_t at = 0; at < size; at += page) static_cast<volatile char*>(data)[at] = 0;
  if (madvise(data, size, MADV_DONTDUMP) != 0 || madvise(data, size, MADV_DONTFORK) != 0) return lastError("madvise");
  auto resident = arena.residentBytes();
  if (!resident) return resident.error();
  if (*resident != size) return Error{ENOMEM, "mincore", {}};
  return arena;
}

Arena::Arena(Arena&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

Result<size_t> Arena::residentBytes() const {
  const size_t page = pageSize();
  std::array<unsigned char, 1024> pages;
  size_t resident = 0;
  for (size_t at = 0; at < size_; at += pages.size() * page) {
    const size_t length = std::min(size_ - at, pages.size() * page);
    if (mincore(static_cast<char*>(data_) + at, length, pages.data()) != 0) return lastError("mincore");
    const auto end = pages.begin() + static_cast<std::ptrdiff_t>(length / page);
    // The other bits are reserved (mincore(2)).
    resident += static_cast<size_t>(std::count_if(pages.begin(), end, [](unsigned char p) { return (p & 1) != 0; }));
  }
  return resident * page;
}

void Arena::unmap() {
  if (data_ == nullptr) return;
  munmap(std::exchange(data_, nullptr), std::exchange(size_, 0));
}

}  // namespace reprieve
