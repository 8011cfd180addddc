#include "core/killer.h"

#include <linux/sched.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
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

/** A killer that is given the descriptors of `processes` beforehand. */
struct Prepared {
  Prepared(Victims& scene, std::initializer_list<pid_t> processes)
      : kept(std::make_shared<KeptPidfds>()), killer(scene.events, SIGKILL, nullptr, kept), scene_(scene) {
    CHECK(kept->keep({processes.begin(), processes.size()}) == processes.size());
  }
  int round() {
    const std::array<const Directory*, 1> directories{&scene_.directory};
    auto result = killer.round(directories, "procs");
    REQUIRE(result);
    return *result;
  }

  std::shared_ptr<KeptPidfds> kept;
  Killer killer;

 private:
  Victims& scene_;
};

TEST_CASE_FIXTURE(NoLeaks, "Killer signals who is kept and listed, beside those who are only listed") {
  Victims scene;
  Child kept(sleepForever);
  Child late(sleepForever);
  Prepared prepared(scene, {kept.pid()});
  scene.list({late.pid(), kept.pid()});
  CHECK(prepared.round() == 2);
  CHECK(kept.reap() == SIGKILL);
  CHECK(late.reap() == SIGKILL);
  // Followed like any other, by a descriptor of its own.
  CHECK(waitReady(*scene.events) == std::vector<int32_t>{prepared.killer.token()});
  CHECK(prepared.kept->keep({}) == 0);
  CHECK(prepared.killer.alive() == 0);
  CHECK(prepared.killer.pids().size() == 2);
}

TEST_CASE_FIXTURE(NoLeaks, "Killer does not signal who is kept and not listed any more") {
  Victims scene;
  Child gone(sleepForever);
  Child other(sleepForever);
  Prepared prepared(scene, {gone.pid(), other.pid()});
  scene.list({other.pid()});
  CHECK(prepared.round() == 1);
  CHECK(prepared.killer.pids() == std::vector<pid_t>{other.pid()});
  CHECK(other.reap() == SIGKILL);
  CHECK(kill(gone.pid(), 0) == 0);
}

TEST_CASE_FIXTURE(NoLeaks, "Killer does not signal a kept process that has left its memcg") {
  NEEDS_MEMCG();
  const Memcg memcg;
  const Memcg elsewhere;
  Child stays(memcg.inside(sleepForever));
  Child leaves(memcg.inside(sleepForever));
  const auto lists = [](const Memcg& where, pid_t pid) {
    return where.read("cgroup.procs").find(std::to_string(pid)) != std::string::npos;
  };
  REQUIRE(waitFor([&] { return lists(memcg, stays.pid()) && lists(memcg, leaves.pid()); }));
  auto kept = std::make_shared<KeptPidfds>();
  const std::array<pid_t, 2> both{stays.pid(), leaves.pid()};
  CHECK(kept->keep(both) == 2);
  elsewhere.write("cgroup.procs", std::to_string(leaves.pid()));
  Killer killer(*EventSet::create(), SIGKILL, nullptr, kept);
  const std::array<const Directory*, 1> directories{&memcg.directory()};
  auto count = killer.round(directories, "cgroup.procs");
  REQUIRE(count);
  CHECK(*count == 1);
  CHECK(stays.reap() == SIGKILL);
  CHECK(kill(leaves.pid(), 0) == 0);
  CHECK(lists(elsewhere, leaves.pid()));
}

/** Forks a process that sleeps and has the given number; -1 where that is not allowed (clone(2), set_tid). */
pid_t forkAs(pid_t pid) {
  clone_args arguments{};
  arguments.exit_signal = SIGCHLD;
  arguments.set_tid = reinterpret_cast<uintptr_t>(&pid);
  arguments.set_tid_size = 1;
  const auto made = static_cast<pid_t>(syscall(SYS_clone3, &arguments, sizeof arguments));
  if (made == 0) {
    alarm(20);
    for (;;) pause();
  }
  return made;
}

TEST_CASE_FIXTURE(NoLeaks, "Killer does not take a stranger for the kept process whose number it has got") {
  Victims scene;
  Child listed(sleepForever);
  auto first = std::make_unique<Child>(sleepForever);
  const pid_t number = first->pid();
  Prepared prepared(scene, {number, listed.pid()});
  REQUIRE(kill(number, SIGKILL) == 0);
  CHECK(first->reap() == SIGKILL);
  const pid_t stranger = forkAs(number);
  if (stranger != number) {
    MESSAGE("skipped: needs clone3's set_tid, CAP_SYS_ADMIN");
    return;
  }
  // In no cgroup of the victim's: nobody signals it.
  scene.list({listed.pid()});
  CHECK(prepared.round() == 1);
  CHECK(listed.reap() == SIGKILL);
  CHECK(kill(stranger, 0) == 0);
  int status = 0;
  CHECK(waitpid(stranger, &status, WNOHANG) == 0);
  // Forked into it under that number: a victim by its own right, found by a descriptor of its own.
  scene.list({stranger});
  CHECK(prepared.round() == 1);
  REQUIRE(waitpid(stranger, &status, 0) == stranger);
  CHECK(WIFSIGNALED(status));
  CHECK(prepared.killer.alive() == 0);
}

TEST_CASE_FIXTURE(NoLeaks, "Killer signals nobody who is kept once its words are revoked") {
  Victims scene;
  Child child(sleepForever);
  auto words = SharedWords::create();
  REQUIRE(words);
  auto kept = std::make_shared<KeptPidfds>();
  const std::array<pid_t, 1> pids{child.pid()};
  CHECK(kept->keep(pids) == 1);
  Killer killer(scene.events, SIGKILL, *words, kept);
  scene.list({child.pid()});
  static_cast<std::atomic<uint32_t>*>((*words)->data())[SharedWords::kEpoch].store(0);
  const std::array<const Directory*, 1> directories{&scene.directory};
  auto round = killer.round(directories, "procs");
  REQUIRE_FALSE(round);
  CHECK(round.error().number == ECANCELED);
  CHECK(kill(child.pid(), 0) == 0);
}

TEST_CASE_FIXTURE(NoLeaks, "KeptPidfds holds each process once, those that are there, and lets go of the others") {
  Child one(sleepForever);
  Child two(sleepForever);
  pid_t gone = 0;
  {
    const Child child(sleepForever);
    gone = child.pid();
  }
  KeptPidfds kept;
  CHECK(kept.keep(std::array<pid_t, 5>{two.pid(), one.pid(), two.pid(), gone, 0}) == 2);
  const int descriptor = kept.find(two.pid());
  CHECK(descriptor >= 0);
  CHECK(kept.find(gone) == -1);
  CHECK(kept.keep(std::array<pid_t, 1>{two.pid()}) == 1);
  CHECK(kept.find(two.pid()) == descriptor);
  CHECK(kept.find(one.pid()) == -1);
  kept.close();
  CHECK(kept.find(two.pid()) == -1);
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
