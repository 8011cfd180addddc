// The lines of the state files and the owner's text, as anything at all and as anything with a right crc.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "guard/record.h"

namespace {

using namespace reprieve::guard;

void require(bool holds) {
  if (!holds) abort();
}

bool within(std::string_view part, std::string_view whole) {
  return part.data() >= whole.data() && part.data() + part.size() <= whole.data() + whole.size();
}

void tryLine(std::string_view line) {
  FileRecord file{};
  if (parseFileRecord(line, file)) {
    require(!isBlank(line));
    require(within(file.name, line) && within(file.was, line) && within(file.wrote, line) && within(file.path, line));
    std::array<char, kFileLine> path;
    require(file.path.size() >= kFileLine || decodePath(file.path, path));
    require(file.name.find('/') == std::string_view::npos && file.name.find('\0') == std::string_view::npos);
    uint64_t value = 0;
    require(file.kind != Kind::kFile ||
            (parseValue(file.name, file.was, value) && parseValue(file.name, file.wrote, value)));
  }
  ScoreRecord score{};
  if (parseScoreRecord(line, score)) {
    require(score.pid > 0 && std::abs(score.was) <= 1000 && std::abs(score.wrote) <= 1000);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  // Copies of just that size, so that the sanitizer sees a step beyond.
  const std::string text(reinterpret_cast<const char*>(data), size);
  tryLine(text);
  std::array<char, 16> crc{};
  std::snprintf(crc.data(), crc.size(), "%08x ", crc32(text));
  const std::string line = crc.data() + text;
  tryLine(line);
  tryLine(line + "   \n");

  Owner owner;
  parseOwner(text, owner);
  for (const std::string_view path : {owner.memory, owner.freezer, owner.unified}) {
    require(path.empty() || (within(path, text) && path.front() == '/'));
  }
  std::array<char, 16> decoded;
  static_cast<void>(decodePath(text, decoded));
  for (const char* name : {"memory.max", "freezer.state", "cgroup.freeze"}) {
    uint64_t value = 0;
    static_cast<void>(parseValue(name, text, value));
  }
  return 0;
}
