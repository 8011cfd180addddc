#include "tended.h"

#include <algorithm>

namespace reprieve::guard {

bool Tended::set(const Message& tend) {
  TendedScope* scope = find(tend.inode);
  if (scope == nullptr) {
    const auto free = std::find_if(scopes_.begin(), scopes_.end(), [](const auto& place) { return place.id == 0; });
    if (free == scopes_.end()) return false;
    scope = free;
    used_++;
  }
  // Told again: what is open there is as before.
  scope->id = tend.inode;
  scope->respondMs = tend.respondMs;
  scope->handleMs = tend.handleMs;
  scope->path.fill('\0');
  std::copy(tend.path.begin(), tend.path.end(), scope->path.begin());
  return true;
}

TendedScope* Tended::find(uint64_t id) {
  if (id == 0) return nullptr;
  const auto found = std::find_if(scopes_.begin(), scopes_.end(), [id](const auto& scope) { return scope.id == id; });
  return found != scopes_.end() ? found : nullptr;
}

void Tended::drop(TendedScope& scope) {
  scope = {};
  used_--;
}

}  // namespace reprieve::guard
