#include "core/killer.h"

#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <csignal>
#include <memory>
#include <new>

#include "support.h"

namespace reprieve::test {
namespace {

/** A directory with a list of processes in a plain file: what the killer reads is up to the test. */
class Victims {
 public:
  Victims() : events(*EventSet::create()), killer(events), directory(temporary.open()) {}

  void list(std::initializer_list<pid_t> pids) {
    std::string text;
    for (const pid_t pid : pids) text += std::to_string(pid) + '\n';
    temporary.write("procs", text);
  }
  int round() {
    const std::array<const Directory*, 1> directories{&directory};
    auto result = killer.round(directories, "procs");
    REQUIRE(result);
    return *result;
  }

  TemporaryDirectory temporary;
  std::shared_ptr<EventSet> events;
  Killer killer;
  Directory directory;
};

TEST_CASE_FIXTURE(NoLeaks, "Killer signals each listed process once and tells when it is gone") {
  Victims scene;
  Child child(sleepForever);
  scene.list({child.pid()});
  CHECK(scene.round() == 1);
  CHECK(scene.killer.pids() == std::vector<pid_t>{child.pid()});
  CHECK(waitReady(*scene.events) == std::vector<int32_t>{scene.killer.token()});
  CHECK(scene.killer.alive() == 0);
  CHECK(child.reap() == SIGKILL);
  CHECK(scene.round() == 0);
  CHECK(scene.events->size() == 0);
  CHECK(scene.killer.pids().size() == 1);
}

TEST_CASE_FIXTURE(NoLeaks, "Killer does not signal again who dies late") {
  Victims scene;
  // Held by the kernel in exit until its parent has been told: a tracee that stops at PTRACE_EVENT_EXIT.
  Child child(sleepForever);
  REQUIRE(ptrace(PTRACE_SEIZE, child.pid(), nullptr, PTRACE_O_TRACEEXIT) == 0);
  scene.list({child.pid()});
  CHECK(scene.round() == 1);
  int status = 0;
  REQUIRE(waitpid(child.pid(), &status, 0) == child.pid());
  REQUIRE(WIFSTOPPED(status));
  CHECK(scene.round() == 0);
  CHECK(scene.killer.alive() == 1);
  CHECK(scene.killer.pids().size() == 1);
  REQUIRE(ptrace(PTRACE_DETACH, child.pid(), nullptr, nullptr) == 0);
  CHECK(child.reap() == SIGKILL);
  CHECK(scene.killer.alive() == 0);
}

TEST_CASE_FIXTURE(NoLeaks, "Killer signals nobody once its words are revoked") {
  Victims scene;
  Child listed(sleepForever);
  Child single(sleepForever);
  auto words = SharedWords::create();
  REQUIRE(words);
  Killer killer(scene.events, SIGKILL, *words);
  scene.list({listed.pid()});
  static_cast<std::atomic<uint32_t>*>((*words)->data())[SharedWords::kEpoch].store(0);
  const std::array<const Directory*, 1> directories{&scene.directory};
  auto round = killer.round(directories, "procs");
  REQUIRE_FALSE(round);
  CHECK(round.error().number == ECANCELED);
  auto process = Pidfd::open(single.pid());
  REQUIRE(process);
  auto signalled = killer.signal(*process);
  REQUIRE_FALSE(signalled);
  CHECK(signalled.error().number == ECANCELED);
  CHECK(killer.pids().empty());
  CHECK(killer.alive() == 0);
  // And neither of them is gone.
  CHECK(kill(listed.pid(), 0) == 0);
  CHECK_FALSE(process->exited());
}

TEST_CASE_FIXTURE(NoLeaks, "Killer never signals its own process, and counts whom it cannot reach") {
  Victims scene;
  scene.list({getpid(), 0});
  CHECK(scene.round() == 0);
  CHECK(scene.killer.unreachable() == 1);
  scene.list({});
  CHECK(scene.round() == 0);
  CHECK(scene.killer.unreachable() == 0);
}

TEST_CASE_FIXTURE(NoLeaks, "Killer passes over processes that are gone already") {
  Victims scene;
  pid_t gone = 0;
  {
    const Child child(sleepForever);
    gone = child.pid();
  }
  scene.list({gone});
  CHECK(scene.round() == 0);
  CHECK(scene.killer.unreachable() == 0);
}

TEST_CASE_FIXTURE(NoLeaks, "Killer counts a directory that is gone as empty, and serves the others before it fails") {
  Victims scene;
  CHECK(scene.round() == 0);
  REQUIRE(scene.directory.makeDirectory("procs"));
  Victims other;
  Child child(sleepForever);
  other.list({child.pid()});
  const std::array<const Directory*, 2> directories{&scene.directory, &other.directory};
  auto result = scene.killer.round(directories, "procs");
  REQUIRE_FALSE(result);
  CHECK(result.error().number == EISDIR);
  CHECK(child.reap() == SIGKILL);
}

TEST_CASE_FIXTURE(NoLeaks, "Killer.signal takes one process by its pidfd") {
  Victims scene;
  Child child(sleepForever);
  auto process = Pidfd::open(child.pid());
  REQUIRE(process);
  CHECK(*scene.killer.signal(*process) == 1);
  CHECK(waitReady(*scene.events) == std::vector<int32_t>{scene.killer.token()});
  CHECK(child.reap() == SIGKILL);
  CHECK(*scene.killer.signal(*process) == 0);
  CHECK(scene.killer.alive() == 0);
  auto self = Pidfd::open(getpid());
  CHECK(*scene.killer.signal(*self) == 0);
}

TEST_CASE_FIXTURE(NoLeaks,
                  "a killer that is closed leaves nothing in the set, even while a pidfd of the caller lives on") {
  Victims scene;
  Child child(sleepForever);
  auto process = Pidfd::open(child.pid());
  REQUIRE(process);
  CHECK(*scene.killer.signal(*process) == 1);
  scene.killer.close();
  scene.killer.close();
  CHECK(scene.killer.closed());
  CHECK(scene.events->size() == 0);
  CHECK(waitFor([&] { return process->exited(); }));
  CHECK(waitReady(*scene.events, 20).empty());
}

TEST_CASE_FIXTURE(NoLeaks, "Killer kills though the event set is closed") {
  Victims scene;
  Child child(sleepForever);
  scene.list({child.pid()});
  scene.events->close();
  CHECK(scene.round() == 1);
  CHECK(child.reap() == SIGKILL);
  CHECK(scene.killer.alive() == 0);
}

TEST_CASE_FIXTURE(NoLeaks, "Killer.release asks for each that is alive") {
  Victims scene;
  CHECK(scene.killer.release().reaped + scene.killer.release().refused == 0);
  Child child([] { leak(8 << 20); });
  scene.list({child.pid()});
  CHECK(scene.round() == 1);
  // Whether it is reaped or has gone by itself is a race; neither may fail.
  const auto [reaped, refused] = scene.killer.release();
  CHECK(reaped + refused <= 1);
  CHECK(child.reap() == SIGKILL);
}

/** Forks whenever there is room, all in the same cgroup, until told off by SIGKILL or by `budget` running out. */
[[noreturn]] void bomb(std::atomic<int>& budget) {
  signal(SIGCHLD, SIG_IGN);
  for (;;) {
    if (budget.fetch_sub(1) <= 0) sleepForever();
    if (fork() == 0) alarm(20);
  }
}

TEST_CASE_FIXTURE(NoLeaks, "Killer ends a fork bomb in a cgroup") {
  NEEDS_MEMCG();
  const Memcg memcg;
  memcg.write("memory.limit_in_bytes", std::to_string(512 << 20));
  void* shared = mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  auto& budget = *new (shared) std::atomic<int>(1000);
  Child child(memcg.inside([&] { bomb(budget); }));
  REQUIRE(waitFor([&] { return budget < 950; }));

  auto events = *EventSet::create();
  Killer killer(events);
  const std::array<const Directory*, 1> directories{&memcg.directory()};
  int rounds = 0;
  CHECK(waitFor(
      [&] {
        rounds++;
        auto count = killer.round(directories, "cgroup.procs");
        REQUIRE(count);
        return *count == 0 && killer.alive() == 0 && memcg.read("cgroup.procs").empty();
      },
      15000));
  MESSAGE("rounds: " << rounds << ", processes: " << killer.pids().size());
  CHECK(killer.pids().size() >= 1);
  CHECK(killer.unreachable() == 0);
  CHECK(child.reap() == SIGKILL);
  munmap(shared, 4096);
}

TEST_CASE_FIXTURE(NoLeaks, "Killer copes with processes that exit while it looks") {
  NEEDS_MEMCG();
  const Memcg memcg;
  // Short-lived processes one after the other; the budget ends it should the killer not.
  Child child(memcg.inside([] {
    signal(SIGCHLD, SIG_IGN);
    for (int i = 0; i < 20000; i++) {
      if (fork() == 0) _exit(0);
    }
    sleepForever();
  }));
  REQUIRE(waitFor([&] { return !memcg.read("cgroup.procs").empty(); }));
  auto events = *EventSet::create();
  Killer killer(events);
  const std::array<const Directory*, 1> directories{&memcg.directory()};
  CHECK(waitFor(
      [&] {
        auto count = killer.round(directories, "cgroup.procs");
        REQUIRE(count);
        return killer.alive() == 0 && memcg.read("cgroup.procs").empty();
      },
      15000));
  CHECK(child.reap() == SIGKILL);
}

}  // namespace
}  // namespace reprieve::test
