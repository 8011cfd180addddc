#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "protocol.h"
#include "slots.h"

namespace reprieve::guard {

/** A scope in which nobody parks: what a handler can leave there is what it has changed and frozen. */
struct TendedScope {
  /** The handler's own number for it; 0: a free place. */
  uint64_t id = 0;
  uint32_t respondMs = 0;
  uint32_t handleMs = 0;
  Condition condition;
  std::array<char, kMostPathBytes + 1> path{};

  std::string_view pathText() const { return {path.data()}; }
};

class Tended {
 public:
  /** Takes a scope in, or its deadlines anew; false where there is no room. */
  bool set(const Message& tend);
  TendedScope* find(uint64_t id);
  void drop(TendedScope& scope);
  bool empty() const { return used_ == 0; }
  /** One of them for which `isDue(scope)` holds, or null. */
  template <typename IsDue>
  const TendedScope* findDue(IsDue isDue) const {
    for (const TendedScope& scope : scopes_) {
      if (scope.id != 0 && isDue(scope)) return &scope;
    }
    return nullptr;
  }
  /** A condition is open in one of them. */
  bool anyOpen() const {
    return findDue([](const TendedScope& scope) { return scope.condition.open; }) != nullptr;
  }

 private:
  /** One a watch; a place is locked memory. */
  static constexpr size_t kMost = 128;

  std::array<TendedScope, kMost> scopes_{};
  size_t used_ = 0;
};

}  // namespace reprieve::guard
