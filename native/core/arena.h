#pragma once

#include <cstddef>

#include "result.h"

namespace reprieve {

/** Anonymous memory that is locked and resident from the start, left out of core dumps and children. */
class Arena {
 public:
  /** Maps `bytes` rounded up to whole pages. ENOMEM, EAGAIN or EPERM where the memory cannot be locked. */
  static Result<Arena> map(size_t bytes);

  Arena(Arena&& other) noexcept;
  Arena& operator=(Arena&& other) = delete;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() { unmap(); }

  /** Bytes resident now (mincore(2)), in whole pages. */
  Result<size_t> residentBytes() const;
  void* data() const { return data_; }
  /** Mapped bytes, in whole pages. */
  size_t size() const { return size_; }
  void unmap();

 private:
  Arena(void* data, size_t size) : data_(data), size_(size) {}

  void* data_;
  size_t size_;
};

}  // namespace reprieve
