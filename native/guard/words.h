#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace reprieve::guard {

/** The page that a handler and its guard share: native/core/shared_words.h, without what allocates. */
class Words {
 public:
  static constexpr size_t kBytes = 4096;

  /** Maps the page; errno is set when it could not be. */
  explicit Words(int descriptor);
  Words(const Words&) = delete;
  Words& operator=(const Words&) = delete;

  explicit operator bool() const { return words_ != nullptr; }
  /** From now on the handler may not act any more, even if it was only stopped and goes on. */
  void revoke() const { words_[kEpoch].store(0); }
  /** Goes up while the handler's event loop turns. */
  uint32_t beats() const { return words_[kBeats].load(); }

 private:
  static constexpr size_t kEpoch = 0;
  static constexpr size_t kBeats = 1;

  std::atomic<uint32_t>* words_ = nullptr;
};

}  // namespace reprieve::guard
