#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "directory.h"
#include "fd.h"
#include "result.h"

namespace reprieve {

/** What happened to a watched directory, or to an entry of it. */
struct DirectoryEvent {
  int32_t token;
  std::string name;
  bool created;
  bool removed;
  bool attributes;
  bool overflow;
};

/** One epoll set. Everything in it is known by a token >= 1 that is never used again; 0 is the directory listener. */
class EventSet {
 public:
  static constexpr int32_t kDirectoryToken = 0;

  static Result<std::shared_ptr<EventSet>> create();

  /** Takes an eventfd into the set; it must be nonblocking. */
  Result<int32_t> addEventfd(Fd eventfd);
  /** Registers a new eventfd for `file` at the directory's cgroup.event_control (cgroup v1). */
  Result<int32_t> addCgroupEvent(const Directory& directory, const std::string& file, const std::string& argument);
  /** Listens to subdirectories made and removed, and to attribute changes (inotify(7)). */
  Result<int32_t> watchDirectory(const Directory& directory);
  /**
   * Tells when the kernel notifies a file of cgroup v2 (memory.events, memory.events.local, cgroup.events), read here
   * for the last time when it is taken in. One whose cgroup was removed is told at most once more.
   */
  Result<int32_t> watchFile(const Directory& directory, const std::string& name);
  /** What watched directories have to tell; never blocks. */
  Result<std::vector<DirectoryEvent>> readDirectoryEvents();
  /** Makes the eventfd of a token ready, as the kernel does; other tokens are ignored. */
  void trigger(int32_t token);
  /** Forgets an eventfd, a file or a directory; other tokens are ignored. */
  void remove(int32_t token);

  /** A token of the caller's own, for watchExit. */
  int32_t takeToken();
  /** Tells once under `token` that the process has exited. Call forgetExit before closing the pidfd. */
  Result<void> watchExit(int pidfd, int32_t token);
  void forgetExit(int pidfd);
  /** Tells under `token` as long as the descriptor is readable: read it empty. Call forgetReadable before closing it.
   */
  Result<void> watchReadable(int fd, int32_t token);
  void forgetReadable(int fd);

  /** Tokens that are ready, each once; returns how many. Never blocks and never allocates. */
  size_t drain(std::span<int32_t> ready);

  int descriptor() const { return epoll_.get(); }
  /** Descriptors in the set: eventfds, files, pidfds and other readable ones, and one for the directory listener while
   * a directory is watched. */
  size_t size() const { return eventfds_.size() + files_.size() + others_ + (inotify_ ? 1 : 0); }
  bool closed() const { return !epoll_; }
  void close();

 private:
  /** How `drain` makes a descriptor unready. */
  enum class Drain : uint8_t { kNot, kCounter, kFile };

  Result<void> add(int fd, uint32_t events, int32_t token, Drain how);
  static uint64_t pack(int32_t token, int fd, Drain how);
  void makeUnready(uint64_t data);
  bool interpret(uint32_t mask, DirectoryEvent& event) const;

  Fd epoll_;
  Fd inotify_;
  int32_t lastToken_ = kDirectoryToken;
  size_t others_ = 0;
  std::unordered_map<int32_t, Fd> eventfds_;
  std::unordered_map<int32_t, Fd> files_;
  std::unordered_map<int32_t, int> watchOf_;
  // inotify_add_watch(2) gives the same watch for the same directory, so one watch may have several tokens.
  std::unordered_multimap<int, int32_t> tokensOf_;
};

}  // namespace reprieve
