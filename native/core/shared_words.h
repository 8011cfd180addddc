#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "fd.h"
#include "result.h"

namespace reprieve {

/** A page that the handler and its guard both have mapped. */
class SharedWords {
 public:
  static constexpr size_t kBytes = 4096;
  /** 1 while the handler may act; the guard stores 0 before it acts itself. */
  static constexpr size_t kEpoch = 0;
  /** Goes up whenever the handler's event loop turns. */
  static constexpr size_t kBeats = 1;

  /** A new page (memfd_create(2)), with the epoch valid. */
  static Result<std::shared_ptr<SharedWords>> create();

  SharedWords(Fd fd, void* data) : fd_(std::move(fd)), data_(data) {}
  SharedWords(const SharedWords&) = delete;
  SharedWords& operator=(const SharedWords&) = delete;
  ~SharedWords();

  /** True once the guard has taken over: whoever was stopped and resumes must not act any more. */
  bool revoked() const { return words()[kEpoch].load() == 0; }

  void* data() const { return data_; }
  int descriptor() const { return fd_.get(); }
  /** Nobody else will be given it; the page stays mapped. */
  void close() { fd_.close(); }

 private:
  std::atomic<uint32_t>* words() const { return static_cast<std::atomic<uint32_t>*>(data_); }

  Fd fd_;
  void* data_;
};

}  // namespace reprieve
