#pragma once

#include <doctest/doctest.h>
#include <sys/types.h>

#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/directory.h"
#include "core/event_set.h"
#include "core/pidfd.h"

namespace reprieve::test {

/** Base of every test case: no descriptor may be left open. */
class NoLeaks {
 public:
  NoLeaks();
  ~NoLeaks();

 private:
  size_t before_;
};

/** Descriptors of this process that are open now. */
size_t openDescriptors();

/** Waits until `condition` holds; false after `ms`. */
bool waitFor(const std::function<bool()>& condition, int ms = 5000);

/** The next tokens that get ready, or none after `ms`. */
std::vector<int32_t> waitReady(EventSet& set, int ms = 5000);

/** A new directory under /tmp, removed with all that is in it. */
class TemporaryDirectory {
 public:
  TemporaryDirectory();
  ~TemporaryDirectory();
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;

  Directory open() const;
  void write(const std::string& name, const std::string& text) const;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

/** A forked process; gone at the end of the scope, and after 20 s in any case. */
class Child {
 public:
  explicit Child(const std::function<void()>& body);
  ~Child();
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;

  pid_t pid() const { return pid_; }
  /** Waits for the end; the signal that ended it, or 0. */
  int reap();

 private:
  pid_t pid_;
};

/** What a child does while it is to be there. */
[[noreturn]] void sleepForever();
/** Touches `bytes` of new memory, then sleeps. */
[[noreturn]] void leak(size_t bytes);

/** Why tests on the real cgroup v1 memory controller cannot run; nothing when they can. */
std::optional<std::string> whyNoMemcg();

/** A memcg of this test's own; killed empty and removed at the end. */
class Memcg {
 public:
  explicit Memcg(const Memcg* parent = nullptr);
  ~Memcg();
  Memcg(const Memcg&) = delete;
  Memcg& operator=(const Memcg&) = delete;

  const Directory& directory() const { return directory_; }
  void write(const std::string& file, const std::string& text) const;
  std::string read(const std::string& file) const;
  /** A limit at which tasks wait instead of being killed. */
  void park(size_t limitBytes) const;
  bool underOom() const;
  /** A child that steps in before it runs `body`. */
  std::function<void()> inside(std::function<void()> body) const;
  /** rmdir, tried until the last charge is gone. */
  bool remove();

 private:
  std::string path_;
  Directory directory_;
  bool removed_ = false;
};

/** Why tests on a real cgroup v2 hierarchy cannot run; nothing when they can. */
std::optional<std::string> whyNoUnified();

/** A cgroup v2 of this test's own; killed empty and removed at the end. */
class UnifiedGroup {
 public:
  UnifiedGroup();
  ~UnifiedGroup();
  UnifiedGroup(const UnifiedGroup&) = delete;
  UnifiedGroup& operator=(const UnifiedGroup&) = delete;

  const Directory& directory() const { return directory_; }
  bool populated() const;
  /** A child that steps in before it runs `body`. */
  std::function<void()> inside(std::function<void()> body) const;
  bool remove();

 private:
  std::string path_;
  Directory directory_;
  bool removed_ = false;
};

}  // namespace reprieve::test

/** Skips the rest of a test case, with the reason, where no cgroup v2 is mounted. */
#define NEEDS_CGROUP2()                                       \
  do {                                                        \
    if (const auto reason = reprieve::test::whyNoUnified()) { \
      MESSAGE("skipped: " << *reason);                        \
      return;                                                 \
    }                                                         \
  } while (false)

/** Skips the rest of a test case, with the reason, where there is no cgroup v1; an error if REPRIEVE_REQUIRE has
 * `host`. */
#define NEEDS_MEMCG()                                                                                    \
  do {                                                                                                   \
    if (const auto reason = reprieve::test::whyNoMemcg()) {                                              \
      const char* required = getenv("REPRIEVE_REQUIRE");                                                 \
      if (required != nullptr && std::string(required).find("host") != std::string::npos) FAIL(*reason); \
      MESSAGE("skipped: " << *reason);                                                                   \
      return;                                                                                            \
    }                                                                                                    \
  } while (false)
