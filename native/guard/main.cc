#include <fcntl.h>
#include <unistd.h>

#include <charconv>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <system_error>

#include "guard.h"
#include "hardening.h"
#include "restore.h"

#ifndef REPRIEVE_VERSION
#define REPRIEVE_VERSION "development build"
#endif

namespace reprieve::guard {
namespace {

enum Exit { kDone = 0, kFailed = 1, kUsage = 2 };

constexpr std::string_view kHelp =
    "usage: reprieve-guard watch <within-ms> <silence-ms> <kill-handler 0|1> <instance>\n"
    "           (started by a handler, with its descriptors)\n"
    "       reprieve-guard restore [--dry-run] <base-directory> [<instance>]\n"
    "       reprieve-guard --version\n";

void say(int descriptor, std::string_view text) {
  [[maybe_unused]] const ssize_t written = write(descriptor, text.data(), text.size());
}

int refuseUsage() {
  say(STDERR_FILENO, kHelp);
  return kUsage;
}

bool parse(std::string_view text, uint32_t most, uint32_t& out) {
  const auto [end, problem] = std::from_chars(text.data(), text.data() + text.size(), out);
  return problem == std::errc() && end == text.data() + text.size() && out <= most;
}

/** It becomes the name of a file. */
bool isName(std::string_view text) {
  return !text.empty() && text.size() <= 200 && text.front() != '.' && text.find('/') == std::string_view::npos;
}

int watch(char** argv) {
  constexpr uint32_t kMostMs = 86'400'000;
  Settings settings{};
  uint32_t kill = 0;
  if (!parse(argv[2], kMostMs, settings.withinMs) || !parse(argv[3], kMostMs, settings.silenceMs)) return refuseUsage();
  if (!parse(argv[4], 1, kill) || !isName(argv[5])) return refuseUsage();
  settings.killHandler = kill == 1;
  settings.instance = argv[5];
  for (const int fd : {Guard::kSocket, Guard::kWords, Guard::kInstance, Guard::kBase}) {
    if (fcntl(fd, F_GETFD) < 0) return refuseUsage();
  }
  standApart();
  keepDescriptors(Guard::kBase);
  static Guard guard(settings);
  return guard.run();
}

}  // namespace
}  // namespace reprieve::guard

int main(int argc, char** argv) {
  using namespace reprieve::guard;
  const std::string_view command(argc > 1 ? argv[1] : "");
  // Without the end of main(): nothing has to be undone, and what holds descriptors lets go of them with the process.
  if (command == "watch") _exit(argc == 6 ? watch(argv) : refuseUsage());
  if (command == "restore") _exit(runRestore(argc - 1, argv + 1));
  if (command != "--version") _exit(refuseUsage());
  say(STDOUT_FILENO, "reprieve-guard " REPRIEVE_VERSION "\n");
  _exit(kDone);
}
