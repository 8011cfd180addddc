#include <charconv>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <string_view>
#include <variant>

#include "workload.h"

namespace workload {

namespace {

enum Modes : unsigned {
  kLeak = 1,
  kWork = 2,
  kHold = 4,
  kFork = 8,
  kPopulate = 16,
  kStream = 32,
  kWrite = 64,
  kRead = 128,
  kStuck = 256
};
constexpr unsigned kAll = 511;

struct Mode {
  const char* name;
  unsigned bit;
  int (*run)(const Options&);
  const char* needs;  // an option it cannot do without
  const char* summary;
};

constexpr Mode kModes[] = {
    {"leak", kLeak, leak, nullptr, "allocate and touch memory without end; sleep at the cap"},
    {"work", kWork, work, nullptr, "a service computing on a working set; SIGTERM prints its account as JSON"},
    {"hold", kHold, hold, "--bytes", "touch memory (or write a file) once, then sleep"},
    {"fork", kFork, forkOut, "--children", "processes that each touch memory and all fork on, bounded in total"},
    {"populate", kPopulate, populate, "--bytes",
     "fault all memory in by one system call, print the result, then sleep"},
    {"stream", kStream, stream, "--file", "read a file over and over through the page cache"},
    {"write", kWrite, writeOn, "--file", "write a file of --bytes, and try again whenever that is refused"},
    {"read", kRead, readOn, "--bytes", "read so much into fresh memory by one system call, over and over"},
    {"stuck", kStuck, stuck, nullptr, "sit in a system call that never ends, where the freezer cannot stop it"},
};

enum class Unit { flag, text, path, count, bytes, microseconds, milliseconds, seconds };
constexpr const char* kUnits[] = {"", "TEXT", "PATH", "N", "BYTES", "US", "MS", "SECONDS"};

struct Option {
  const char* name;
  unsigned modes;
  Unit unit;
  std::variant<bool Options::*, const char * Options::*, JoinList Options::*, uint64_t Options::*> field;
  uint64_t least;
  uint64_t most;
  const char* help;
};

constexpr uint64_t kDayUs = 86'400'000'000;
constexpr uint64_t kTiB = 1ull << 40;

constexpr Option kOptions[] = {
    {"--chunk", kLeak, Unit::bytes, &Options::chunk, 1, kTiB, "how much at a time, touched page by page (256KiB)"},
    {"--every", kLeak | kFork, Unit::milliseconds, &Options::everyUs, 0, kDayUs,
     "rest between two chunks or forks, 0 for none (1ms)"},
    {"--cap", kLeak, Unit::bytes, &Options::cap, 0, UINT64_MAX,
     "stop there, in total over all processes and threads (none)"},
    {"--processes", kLeak, Unit::count, &Options::processes, 1, 1024,
     "leaking processes; from 2 on they are children of one that waits (1)"},
    {"--threads", kLeak, Unit::count, &Options::threads, 1, 1024, "leaking threads in each process (1)"},
    {"--set", kWork, Unit::bytes, &Options::set, 4096, kTiB, "the resident working set (24MiB)"},
    {"--scratch", kWork, Unit::bytes, &Options::scratch, 4096, kTiB,
     "mapped, filled, checked and unmapped each round (2MiB)"},
    {"--sweep", kWork, Unit::bytes, &Options::sweep, 0, kTiB,
     "so much more of the set is read, a word a page, each round: it stays in use (0)"},
    {"--pause", kWork, Unit::microseconds, &Options::pauseUs, 0, kDayUs, "between two rounds (200us)"},
    {"--bytes", kHold | kFork | kPopulate | kWrite | kRead, Unit::bytes, &Options::bytes, 1, kTiB,
     "how much memory; for fork, of each child (64KiB)"},
    {"--children", kFork, Unit::count, &Options::children, 1, 10'000,
     "how many in total, children of children included"},
    {"--file", kHold | kStream | kWrite, Unit::path, &Options::file, 0, 0,
     "hold, write: write --bytes to it (kept afterwards); stream: read it"},
    {"--seconds", kStream, Unit::seconds, &Options::secondsUs, 0, kDayUs, "how long to read (10s)"},
    {"--join", kAll, Unit::path, &Options::join, 0, 0,
     "a cgroup directory to move into first; may be given several times"},
    {"--stats", kAll, Unit::path, &Options::statsFile, 0, 0,
     "an existing file of 4096 bytes or more, best on tmpfs, for live numbers"},
    {"--gate", kAll, Unit::flag, &Options::gate, 0, 0,
     "print \"ready\" when set up and start when stdin gets a byte or is closed"},
    {"--delay", kAll, Unit::milliseconds, &Options::delayUs, 0, kDayUs, "wait before the start (0)"},
    {"--name", kAll, Unit::text, &Options::name, 0, 0, "process name, 15 characters are kept"},
    {"--timeout", kAll, Unit::seconds, &Options::timeoutUs, 1, kDayUs,
     "exit 124 after that (60s); SIGKILL a second later if parked"},
    {"--huge", kLeak | kWork, Unit::flag, &Options::huge, 0, 0,
     "with huge pages where the system gives them: far fewer faults"},
    {"--outlive-parent", kAll, Unit::flag, &Options::outliveParent, 0, 0, "do not die with the parent process"},
};

constexpr const char kStatsHelp[] =
    "\nBYTES is a plain number or one with KiB, MiB or GiB. A time is a plain number in the unit\n"
    "shown or one with us, ms or s.\n"
    "\nThe --stats file holds little-endian uint64: magic 0x7265707269657665, pid, iterations,\n"
    "longest stall us, when that ended, bytes touched, moment just before the latest touch,\n"
    "errors, moment the latest iteration or touch ended, how many of the errors were system calls\n"
    "refused (a full memcg may refuse an mmap). Moments are CLOCK_MONOTONIC us.\n"
    "\nExit codes: 0 done, 1 failed, 2 usage, 124 out of time.\n";

int printHelp() {
  std::printf("Usage: reprieve-workload MODE [options]\n\nModes:\n");
  for (const Mode& mode : kModes) std::printf("  %-10s %s\n", mode.name, mode.summary);
  std::printf("\nOptions:\n");
  for (const Option& option : kOptions) {
    char head[32];
    std::snprintf(head, sizeof head, "%s %s", option.name, kUnits[static_cast<int>(option.unit)]);
    std::printf("  %-20s %s", head, option.help);
    const char* separator = " [";
    for (const Mode& mode : kModes) {
      if (option.modes == kAll || (option.modes & mode.bit) == 0) continue;
      std::printf("%s%s", separator, mode.name);
      separator = ", ";
    }
    std::printf(option.modes == kAll ? "\n" : "]\n");
  }
  std::printf("%s", kStatsHelp);
  return std::fflush(stdout) == 0 ? 0 : 1;
}

struct Suffix {
  std::string_view text;
  uint64_t factor;
};
constexpr Suffix kSizes[] = {{"", 1}, {"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}};
constexpr Suffix kTimes[] = {{"us", 1}, {"ms", 1000}, {"s", 1'000'000}};

uint64_t factorOf(std::string_view suffix, Unit unit) {  // 0 if there is no such suffix
  switch (unit) {
    case Unit::count:
      return suffix.empty() ? 1 : 0;
    case Unit::bytes:
      for (const Suffix& size : kSizes)
        if (size.text == suffix) return size.factor;
      return 0;
    default:
      if (suffix.empty()) return kTimes[static_cast<int>(unit) - static_cast<int>(Unit::microseconds)].factor;
      for (const Suffix& time : kTimes)
        if (time.text == suffix) return time.factor;
      return 0;
  }
}

bool parseNumber(const char* text, const Option& option, uint64_t& result) {
  const char* end = text + std::strlen(text);
  uint64_t value = 0;
  const auto [rest, error] = std::from_chars(text, end, value);
  if (error != std::errc{}) return false;
  const uint64_t factor = factorOf({rest, static_cast<size_t>(end - rest)}, option.unit);
  if (factor == 0 || __builtin_mul_overflow(value, factor, &result)) return false;
  return result >= option.least && result <= option.most;
}

const Mode* findMode(std::string_view name) {
  for (const Mode& mode : kModes)
    if (mode.name == name) return &mode;
  return nullptr;
}

const Option* findOption(std::string_view name, const Mode& mode) {
  for (const Option& option : kOptions)
    if (option.name == name && (option.modes & mode.bit) != 0) return &option;
  return nullptr;
}

// Stores one value; false, having said why, if it will not do.
bool store(const Option& option, const char* value, Options& options) {
  if (const auto* text = std::get_if<const char * Options::*>(&option.field)) {
    options.*(*text) = value;
  } else if (std::holds_alternative<JoinList Options::*>(option.field)) {
    if (options.join.count == JoinList::kMost) {
      complain("--join can be given %zu times at most", JoinList::kMost);
      return false;
    }
    options.join.paths[options.join.count++] = value;
  } else if (const auto* number = std::get_if<uint64_t Options::*>(&option.field)) {
    if (!parseNumber(value, option, options.*(*number))) {
      complain("%s cannot be '%s', see --help", option.name, value);
      return false;
    }
  }
  return true;
}

constexpr int kUsage = 2;

int run(int argc, char** argv) {
  for (int i = 1; i < argc; ++i)
    if (std::string_view(argv[i]) == "--help") return printHelp();
  if (argc < 2) {
    complain("a mode is needed, see --help");
    return kUsage;
  }
  const Mode* mode = findMode(argv[1]);
  if (mode == nullptr) {
    complain("there is no mode '%s', see --help", argv[1]);
    return kUsage;
  }

  Options options;
  if (mode->bit == kFork) options.bytes = 64 << 10;
  if (mode->bit == kStream) options.secondsUs = 10'000'000;
  bool complete = mode->needs == nullptr;
  for (int i = 2; i < argc; ++i) {
    const Option* option = findOption(argv[i], *mode);
    if (option == nullptr) {
      complain("%s has no option '%s', see --help", mode->name, argv[i]);
      return kUsage;
    }
    if (!complete && option->name == std::string_view(mode->needs)) complete = true;
    if (const auto* flag = std::get_if<bool Options::*>(&option->field)) {
      options.*(*flag) = true;
    } else if (++i == argc) {
      complain("%s needs a value, see --help", option->name);
      return kUsage;
    } else if (!store(*option, argv[i], options)) {
      return kUsage;
    }
  }
  if (!complete) {
    complain("%s needs %s, see --help", mode->name, mode->needs);
    return kUsage;
  }
  prepare(options);
  return mode->run(options);
}

}  // namespace

}  // namespace workload

int main(int argc, char** argv) { return workload::run(argc, argv); }
