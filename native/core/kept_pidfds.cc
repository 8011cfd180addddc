#include "kept_pidfds.h"

#include <algorithm>

#include "pidfd.h"

namespace reprieve {
size_t KeptPidfds::keep(std::span<const pid_t> pids) {
  std::vector<Kept> next;
  next.reserve(pids.size());
  for (const pid_t pid : pids) {
    const auto held = std::find_if(kept_.begin(), kept_.end(), [pid](const Kept& kept) { return kept.pid == pid; });
    const bool lives = held != kept_.end() && held->pidfd && !hasExited(held->pidfd.get());
    Fd pidfd = lives ? std::move(held->pidfd) : openPidfd(pid);
    if (pidfd) next.push_back({pid, std::move(pidfd)});
  }
  const auto before = [](const Kept& a, const Kept& b) { return a.pid < b.pid; };
  const auto same = [](const Kept& a, const Kept& b) { return a.pid == b.pid; };
  std::stable_sort(next.begin(), next.end(), before);
  next.erase(std::unique(next.begin(), next.end(), same), next.end());
  kept_ = std::move(next);
  return kept_.size();
}

int KeptPidfds::find(pid_t pid) const {
  const auto place = std::lower_bound(kept_.begin(), kept_.end(), pid,
                                      [](const Kept& kept, pid_t number) { return kept.pid < number; });
  return place != kept_.end() && place->pid == pid ? place->pidfd.get() : -1;
}

}  // namespace reprieve
