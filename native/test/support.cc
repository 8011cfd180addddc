#include "support.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <thread>

// AddressSanitizer turns these into nothing; the tests want to see what the kernel does.
extern "C" int mlock(const void* address, size_t length) noexcept {
  return static_cast<int>(syscall(SYS_mlock, address, length));
}
extern "C" int munlock(const void* address, size_t length) noexcept {
  return static_cast<int>(syscall(SYS_munlock, address, length));
}

namespace reprieve::test {
namespace {

constexpr const char* kMemoryHierarchy = "/sys/fs/cgroup/memory";
constexpr unsigned kLifeSeconds = 20;

/** The first mount point of cgroup v2, or nothing. */
std::string unifiedMount() {
  std::ifstream mounts("/proc/self/mounts");
  std::string device;
  std::string point;
  std::string type;
  for (std::string rest; mounts >> device >> point >> type && std::getline(mounts, rest);) {
    if (type == "cgroup2") return point;
  }
  return {};
}

/** The process id in the name lets the runner find what a crash leaves behind. */
std::string groupName() {
  static int count = 0;
  return "reprieve-test-native-" + std::to_string(getpid()) + '-' + std::to_string(++count);
}

/** Kills who is in it and removes it, tried until the last charge is gone. */
bool removeGroup(const Directory& directory, const std::string& path) {
  return waitFor([&] {
    auto procs = directory.readFile("cgroup.procs");
    for (const char* at = procs ? procs->c_str() : ""; *at != '\0';) {
      char* end = nullptr;
      const auto pid = static_cast<pid_t>(std::strtol(at, &end, 10));
      if (pid > 0) kill(pid, SIGKILL);
      // Children of this process are reaped here: as long as they are not, some kernels hold the directory busy.
      if (pid > 0) waitpid(pid, nullptr, WNOHANG);
      at = end + 1;
    }
    return rmdir(path.c_str()) == 0 || errno == ENOENT;
  });
}

}  // namespace

size_t openDescriptors() {
  size_t count = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) count++;
  return count;
}

NoLeaks::NoLeaks() : before_(openDescriptors()) {}
NoLeaks::~NoLeaks() { CHECK(openDescriptors() == before_); }

bool waitFor(const std::function<bool()>& condition, int ms) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(ms);
  while (!condition()) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

std::vector<int32_t> waitReady(EventSet& set, int ms) {
  pollfd entry{set.descriptor(), POLLIN, 0};
  std::vector<int32_t> ready(256);
  ready.resize(poll(&entry, 1, ms) == 1 ? set.drain(ready) : 0);
  return ready;
}

TemporaryDirectory::TemporaryDirectory() : path_("/tmp/reprieve-test-XXXXXX") {
  REQUIRE(mkdtemp(path_.data()) != nullptr);
}

TemporaryDirectory::~TemporaryDirectory() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

Directory TemporaryDirectory::open() const {
  auto directory = Directory::open(path_);
  REQUIRE(directory);
  return std::move(*directory);
}

void TemporaryDirectory::write(const std::string& name, const std::string& text) const {
  std::ofstream(path_ + '/' + name) << text;
}

Child::Child(const std::function<void()>& body) : pid_(fork()) {
  REQUIRE(pid_ >= 0);
  if (pid_ > 0) return;
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  alarm(kLifeSeconds);
  body();
  _exit(0);
}

Child::~Child() {
  if (pid_ <= 0) return;
  kill(pid_, SIGKILL);
  reap();
}

int Child::reap() {
  int status = 0;
  if (pid_ > 0) waitpid(pid_, &status, 0);
  pid_ = -1;
  return WIFSIGNALED(status) ? WTERMSIG(status) : 0;
}

void sleepForever() {
  for (;;) pause();
}

void leak(size_t bytes) {
  auto* data =
      static_cast<volatile char*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  for (size_t at = 0; at < bytes; at += 4096) data[at] = 1;
  sleepForever();
}

std::optional<std::string> whyNoMemcg() {
  if (geteuid() != 0) return "needs root";
  auto hierarchy = Directory::open(kMemoryHierarchy);
  if (!hierarchy || hierarchy->fsType() != CGROUP_SUPER_MAGIC || !hierarchy->readFile("memory.oom_control")) {
    return std::string("needs the cgroup v1 memory controller at ") + kMemoryHierarchy;
  }
  return std::nullopt;
}

Memcg::Memcg(const Memcg* parent) {
  path_ = (parent != nullptr ? parent->path_ : kMemoryHierarchy) + '/' + groupName();
  REQUIRE(mkdir(path_.c_str(), 0755) == 0);
  auto directory = Directory::open(path_);
  REQUIRE(directory);
  directory_ = std::move(*directory);
}

Memcg::~Memcg() {
  if (!removed_) CHECK(remove());
}

bool Memcg::remove() {
  static_cast<void>(directory_.writeFile("memory.oom_control", "0"));
  removed_ = removeGroup(directory_, path_);
  return removed_;
}

void Memcg::write(const std::string& file, const std::string& text) const {
  auto written = directory_.writeFile(file, text);
  REQUIRE(written);
}

std::string Memcg::read(const std::string& file) const {
  auto text = directory_.readFile(file);
  REQUIRE(text);
  return *text;
}

void Memcg::park(size_t limitBytes) const {
  write("memory.oom_control", "1");
  write("memory.limit_in_bytes", std::to_string(limitBytes));
}

bool Memcg::underOom() const { return read("memory.oom_control").find("under_oom 1") != std::string::npos; }

std::function<void()> Memcg::inside(std::function<void()> body) const {
  return [this, body = std::move(body)] {
    if (!directory_.writeFile("cgroup.procs", "0")) _exit(1);
    body();
  };
}

std::optional<std::string> whyNoUnified() {
  if (geteuid() != 0) return "needs root";
  if (unifiedMount().empty()) return "needs a cgroup v2 hierarchy";
  return std::nullopt;
}

UnifiedGroup::UnifiedGroup() : path_(unifiedMount() + '/' + groupName()) {
  REQUIRE(mkdir(path_.c_str(), 0755) == 0);
  auto directory = Directory::open(path_);
  REQUIRE(directory);
  directory_ = std::move(*directory);
}

UnifiedGroup::~UnifiedGroup() {
  if (!removed_) CHECK(remove());
}

bool UnifiedGroup::remove() {
  removed_ = removeGroup(directory_, path_);
  return removed_;
}

bool UnifiedGroup::populated() const {
  auto events = directory_.readFile("cgroup.events");
  REQUIRE(events);
  return events->find("populated 1") != std::string::npos;
}

std::function<void()> UnifiedGroup::inside(std::function<void()> body) const {
  return [this, body = std::move(body)] {
    if (!directory_.writeFile("cgroup.procs", "0")) _exit(1);
    body();
  };
}

}  // namespace reprieve::test
