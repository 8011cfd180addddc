#pragma once

#include <cstdint>
#include <ctime>

namespace reprieve::guard {

constexpr uint64_t kMillisecond = 1000;
constexpr uint64_t kSecond = 1'000'000;

/** CLOCK_MONOTONIC in microseconds. */
inline uint64_t clockUs() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * kSecond + static_cast<uint64_t>(now.tv_nsec) / 1000;
}

inline void sleepUs(uint64_t us) {
  const timespec time{static_cast<time_t>(us / kSecond), static_cast<long>(us % kSecond * 1000)};
  // Woken early by a signal or not: every caller looks at the clock again.
  nanosleep(&time, nullptr);
}

}  // namespace reprieve::guard
