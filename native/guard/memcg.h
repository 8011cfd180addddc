#pragma once

#include <sys/types.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

// What the guard does with cgroups and processes. Nothing here allocates: the guard must act while memory is short.
namespace reprieve::guard {

struct OomState {
  bool killDisabled;
  bool underOom;
};

/** Opens below `root`, close-on-exec; "/" is the root itself, a leading '/' is skipped. A descriptor, or -1 and errno.
 */
int openBeneath(int root, const char* path, int flags);
/** pread(2) at 0: how many bytes, or -1 and errno. */
ssize_t readSmall(int fd, std::span<char> buffer);
/** Of an open memory.oom_control: 0 or an errno. */
int readOomState(int oomControl, OomState& out);
/** One number; "max", and what v1 shows instead (PAGE_COUNTER_MAX), give UINT64_MAX. 0 or an errno. */
int readNumber(int fd, uint64_t& out);
/** One write(2) at offset 0: 0 or an errno. */
int writeText(int fd, std::string_view text);

/** Reads the names of the directories below one, in pieces. The entries `.` and `..` are left out. */
class Listing {
 public:
  /** From where `directory` stands; it stays the caller's, and its position moves. */
  void start(int directory);

  /** The next name, valid until the next call; nullptr at the end, or with error() set. */
  const char* next();
  int error() const { return error_; }

 private:
  int directory_ = -1;
  int error_ = 0;
  size_t at_ = 0;
  size_t end_ = 0;
  // One entry has at most 280 bytes. The walk keeps one of these a level, so it is small.
  alignas(8) std::array<char, 512> buffer_;
};

/** False stops. A process of another pid namespace has the number 0. */
using VisitProcess = bool (*)(void* context, pid_t pid);
/**
 * Calls `visit` for every process of the cgroup (cgroup.procs opened anew: a kept descriptor lies) and, if deep, of all
 * below. 0, or the first errno met; a cgroup that is gone is none.
 */
int forEachProcess(int directory, bool deep, VisitProcess visit, void* context);

/** `directory` is the cgroup itself and lives until `visit` returns; `name` is its last component. False stops. */
using VisitGroup = bool (*)(void* context, int directory, const char* name);
/** How many levels of cgroups below one are looked into. */
constexpr size_t kMaxDepth = 64;
/** All cgroups below, parents first. 0, or the first errno met; ELOOP where cgroups lie deeper than kMaxDepth. */
int forEachDescendant(int directory, VisitGroup visit, void* context);

/** The inodes of the cgroups above, the nearest first; those that do not fit are left out, and free places are 0. */
void readAbove(int directory, std::span<uint64_t> inodes);

/** Whether the kernel could kill somebody here or below: any process with oom_score_adj > -1000. */
bool hasKillableTask(int directory);
/** Whether there is no process here or below; false also where that cannot be told. */
bool isEmpty(int directory);

/** Whether a process is listed in this very cgroup. */
bool isListed(int directory, pid_t pid);

/** /proc/PID, held: whoever gets the number later is not meant by what is opened below it. -1 and errno. */
int openProcess(pid_t pid);
/** Where a process comes from (fields 4, 6 and 22 of proc_pid_stat(5)). */
struct Lineage {
  pid_t parent;
  pid_t session;
  /** In clock ticks since boot. */
  uint64_t started;
};
/** Of what openProcess() gave. 0 or an errno. */
int readLineage(int process, Lineage& out);
/** All processes of /proc. 0 or an errno. */
int forEachProcess(VisitProcess visit, void* context);
/** Start of a process in clock ticks since boot, of what openProcess() gave. 0 or an errno. */
int readStartTime(int process, uint64_t& out);
/** oom_score_adj of what openProcess() gave. 0 or an errno. */
int readScoreAdj(int process, int& out);
int writeScoreAdj(int process, int value);
/** Whether the process with this number is the one that began then, and has not ended. */
bool isAlive(pid_t pid, uint64_t started);

struct Round {
  int signalled;
  /** All that were listed, without ourselves. */
  int listed;
  /** Listed, and not to be signalled: another pid namespace, process 1, EPERM, no descriptor to be had. */
  int unreachable;
};
/**
 * One round of SIGKILL over the cgroup and all below. A pidfd first, then the list is read again, and who still stands
 * in it is signalled: a number that has gone to a stranger is not. Never ourselves, never process 1. Appends to
 * pids[0..count) whom it signalled, each once, as many as fit.
 */
Round killRound(int directory, std::span<pid_t> pids, size_t& count);

}  // namespace reprieve::guard
