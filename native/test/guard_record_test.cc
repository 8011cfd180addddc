#include <unistd.h>

#include <array>
#include <cstdio>
#include <limits>

#include "guard/record.h"
#include "support.h"

namespace reprieve::guard::test {
namespace {

using namespace std::string_literals;
constexpr uint64_t kNone = std::numeric_limits<uint64_t>::max();

std::string checked(const std::string& text, size_t width) {
  std::array<char, 16> crc{};
  std::snprintf(crc.data(), crc.size(), "%08x ", crc32(text));
  std::string line = crc.data() + text;
  line.resize(width - 1, ' ');
  return line + '\n';
}
std::string fileLine(const std::string& text) { return checked(text, kFileLine); }
std::string scoreLine(const std::string& text) { return checked(text, kScoreLine); }

const std::string kGood = "file memory.oom_control 42 0 1 /jobs/web%201";

TEST_CASE("crc32 is zlib's") {
  CHECK(crc32("") == 0);
  CHECK(crc32("123456789") == 0xcbf43926);
  CHECK(crc32("\0\xff"s) == 0x6cdbfd72);
}

TEST_CASE("isBlank") {
  CHECK(isBlank(""));
  CHECK(isBlank(std::string(1023, ' ') + '\n'));
  CHECK(isBlank(std::string(1024, '\0')));
  CHECK_FALSE(isBlank("  x  \n"));
}

TEST_CASE("parseFileRecord takes what TypeScript writes") {
  FileRecord record{};
  const std::string line = fileLine(kGood);
  REQUIRE(line.size() == kFileLine);
  REQUIRE(parseFileRecord(line, record));
  CHECK(record.kind == Kind::kFile);
  CHECK(record.name == "memory.oom_control");
  CHECK(record.inode == 42);
  CHECK(record.was == "0");
  CHECK(record.wrote == "1");
  CHECK(record.path == "/jobs/web%201");

  for (const char* text : {
           "file freezer.state 1 THAWED FROZEN /",
           "file memory.limit_in_bytes 1 9223372036854771712 1048576 /a",
           "file memory.limit_in_bytes 18446744073709551615 -1 1048576 a",
           "file memory.max 1 max 1048576 /a",
           "file cgroup.freeze 1 0 1 /\xc3\xa4\xff",
           "keep memory.oom_control 1 1 1 /a",
           "home deep 1 0 0 /a",
           "home flat 1 0 0 /a",
           "made - 1 /old%0aplace - /reprieve-handler-1",
           "made freezer 1 / - /a/reprieve-frozen-1-1",
           "made window 1 - - /a/reprieve-window-1-1",
       }) {
    CAPTURE(text);
    CHECK(parseFileRecord(fileLine(text), record));
  }
}

TEST_CASE("parseFileRecord needs no padding and takes NULs for it") {
  FileRecord record{};
  std::string line = fileLine(kGood);
  line.resize(9 + kGood.size());
  CHECK(parseFileRecord(line, record));
  line.resize(kFileLine, '\0');
  CHECK(parseFileRecord(line, record));
}

TEST_CASE("a line that was torn at any byte is none") {
  const std::string before = fileLine("file memory.limit_in_bytes 77 1048576 2097152 /jobs/other/one%25");
  const std::string after = fileLine(kGood);
  FileRecord record{};
  for (size_t at = 0; at < kFileLine; at++) {
    CAPTURE(at);
    // Over a free line, over NULs, and over a line that was longer.
    const bool whole = at >= 9 + kGood.size();
    CHECK(parseFileRecord(after.substr(0, at) + std::string(kFileLine - at, ' '), record) == whole);
    CHECK(parseFileRecord(after.substr(0, at) + std::string(kFileLine - at, '\0'), record) == whole);
    CHECK(parseFileRecord(after.substr(0, at), record) == whole);
    const bool either = at == 0 || after.substr(at) == before.substr(at);
    CHECK(parseFileRecord(after.substr(0, at) + before.substr(at), record) == either);
  }
}

TEST_CASE("a line with one bit turned is none") {
  FileRecord record{};
  std::string line = fileLine(kGood);
  for (size_t at = 0; at < 9 + kGood.size(); at++) {
    for (int bit = 0; bit < 8; bit++) {
      CAPTURE(at);
      CAPTURE(bit);
      line[at] = static_cast<char>(line[at] ^ (1 << bit));
      // The digits of the crc may be written in capitals.
      const bool capital = at < 8 && bit == 5 && line[at] >= 'A' && line[at] <= 'F';
      CHECK(parseFileRecord(line, record) == capital);
      line[at] = static_cast<char>(line[at] ^ (1 << bit));
    }
  }
}

TEST_CASE("parseFileRecord refuses what is not of that shape, however right its crc") {
  FileRecord record{};
  for (const std::string& text : {
           ""s,
           "file"s,
           "file memory.oom_control 42 0 1"s,
           "file memory.oom_control 42 0 1 "s,
           "file memory.oom_control 42 0 1 /a more"s,
           "file  memory.oom_control 42 0 1 /a"s,
           " file memory.oom_control 42 0 1 /a"s,
           "rock memory.oom_control 42 0 1 /a"s,
           "file memory.oom_control -42 0 1 /a"s,
           "file memory.oom_control 18446744073709551616 0 1 /a"s,
           "file memory.oom_control 4x 0 1 /a"s,
           "file memory.oom_control 42 zero 1 /a"s,
           "file memory.oom_control 42 0 -1 /a"s,
           "file freezer.state 42 0 1 /a"s,
           "file memory.limit_in_bytes 42 1k 2k /a"s,
           "file ../memory.max 42 1 2 /a"s,
           "file .. 42 1 2 /a"s,
           "file a/memory.max 42 1 2 /a"s,
           "file - 42 1 2 /a"s.replace(5, 1, "\xff"),
           "keep memory.limit_in_bytes 42 1 1 /a"s,
           "home - 42 0 0 /a"s,
           "made deep 42 / - /a"s,
           "made - 42 %zz - /a"s,
           "made freezer 42 %zz - /a"s,
           "made window 42 / - /a"s,
           "made - 42 - - %zz"s,
           "file memory.oom_control 42 0 1 /a%"s,
           "file memory.oom_control 42 0 1 /a%2"s,
           "file memory.oom_control 42 0 1 /a%00"s,
           "file memory.oom_control 42 0 1 /a%g0"s,
           "file memory.oom_control 42 0 1 /a%-1"s,
           "file memory.oom_control 42 0 1 /a\0b"s,
       }) {
    CAPTURE(text);
    CHECK_FALSE(parseFileRecord(fileLine(text), record));
  }
}

TEST_CASE("parseScoreRecord") {
  ScoreRecord record{};
  REQUIRE(parseScoreRecord(scoreLine("123 4567 8901 -500 1000 42"), record));
  CHECK(record.pid == 123);
  CHECK(record.started == 4567);
  CHECK(record.raisedAt == 8901);
  CHECK(record.was == -500);
  CHECK(record.wrote == 1000);
  CHECK(record.home == 42);
  for (const char* text :
       {"123 4567 8901 0 1000", "123 4567 8901 0 1000 42 1", "0 4567 8901 0 1000 42", "-1 4567 8901 0 1000 42",
        "2147483648 1 1 0 1 1", "123 4567 8901 0 1001 42", "123 4567 8901 -1001 0 42", "123 4567 8901 x 0 42",
        "123 -1 8901 0 1 42", "123 1 1 -2147483648 0 42", "123  1 1 0 1 42"}) {
    CAPTURE(text);
    CHECK_FALSE(parseScoreRecord(scoreLine(text), record));
  }
  const std::string line = scoreLine("123 4567 8901 0 1000 42");
  for (size_t at = 0; at < line.find("  "); at++) {
    CAPTURE(at);
    CHECK_FALSE(parseScoreRecord(line.substr(0, at), record));
  }
}

TEST_CASE("parseOwner takes what is there") {
  Owner owner;
  SUBCASE("all") {
    parseOwner("version 1\npid 12\nstarted 99\nmemory /sys/a b\nfreezer /f\nunified /u\n", owner);
    CHECK(owner.version == 1);
    CHECK(owner.pid == 12);
    CHECK(owner.started == 99);
    CHECK(owner.memory == "/sys/a b");
    CHECK(owner.freezer == "/f");
    CHECK(owner.unified == "/u");
  }
  SUBCASE("the first of two counts, and what is unknown does not") {
    parseOwner("color red\n\npid 12\npid 13\nversion\nmemory /a\nmemory /b\nstarted 9", owner);
    CHECK(owner.version == 0);
    CHECK(owner.pid == 12);
    CHECK(owner.started == 9);
    CHECK(owner.memory == "/a");
    CHECK(owner.freezer.empty());
  }
  SUBCASE("what is wrong is left out") {
    parseOwner("version one\npid -1\npid 0\npid 99999999999\nstarted 1x\nmemory relative\nfreezer /a\0b\nunified \n"s,
               owner);
    CHECK(owner.version == 0);
    CHECK(owner.pid == 0);
    CHECK(owner.started == 0);
    CHECK(owner.memory.empty());
    CHECK(owner.freezer.empty());
    CHECK(owner.unified.empty());
  }
  SUBCASE("nothing") { parseOwner("", owner); }
}

TEST_CASE("decodePath") {
  std::array<char, 8> out{};
  REQUIRE(decodePath("/a%20%25", out));
  CHECK(std::string(out.data()) == "/a %");
  REQUIRE(decodePath("%FF%ff", out));
  CHECK(std::string(out.data()) == "\xff\xff");
  CHECK(decodePath("1234567", out));
  CHECK_FALSE(decodePath("12345678", out));
  CHECK(decodePath("", out));
  CHECK_FALSE(decodePath("%0", out));
  CHECK_FALSE(decodePath("", std::span<char>()));
}

TEST_CASE("parseValue makes values comparable") {
  const auto page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  uint64_t value = 0;
  const auto parsed = [&value](const char* name, const std::string& text) {
    value = 4711;
    return parseValue(name, text, value);
  };
  SUBCASE("limits: whole pages, and three ways to say none") {
    CHECK((parsed("memory.limit_in_bytes", std::to_string(page * 3 + 1)) && value == page * 3));
    CHECK((parsed("memory.max", "max\n") && value == kNone));
    CHECK((parsed("memory.limit_in_bytes", "-1") && value == kNone));
    CHECK((parsed("memory.memsw.limit_in_bytes", "9223372036854771712\n") && value == kNone));
    CHECK((parsed("memory.soft_limit_in_bytes", "9223372036854775807") && value == kNone));
    CHECK((parsed("memory.high", "0") && value == 0));
  }
  SUBCASE("switches and states") {
    CHECK((parsed("memory.oom_control", "1\n") && value == 1));
    CHECK((parsed("cgroup.freeze", "0\n") && value == 0));
    CHECK((parsed("freezer.state", "THAWED\n") && value == 0));
    CHECK((parsed("freezer.state", "FREEZING\n") && value == 1));
    CHECK((parsed("freezer.state", "FROZEN") && value == 1));
    CHECK((parsed("memory.swappiness", "61") && value == 61));
  }
  SUBCASE("nothing else") {
    for (const char* text : {"", "\n", "-2", "1 2", "x", "1k", "99999999999999999999"}) {
      CAPTURE(text);
      CHECK_FALSE(parsed("memory.max", text));
    }
    CHECK_FALSE(parsed("cgroup.freeze", "max"));
    CHECK_FALSE(parsed("freezer.state", "1"));
  }
}

TEST_CASE("Line puts text together and cuts off what does not fit") {
  Line line;
  CHECK(line.add("a ").add(uint64_t{18446744073709551615U}).add(" ").addSigned(-1000).view() ==
        "a 18446744073709551615 -1000");
  CHECK(std::string(line.text()) == line.view());
  line.clear();
  CHECK(std::string(line.addSigned(std::numeric_limits<int64_t>::min()).text()) == "-9223372036854775808");
  const std::string large(5000, 'x');
  line.clear();
  CHECK(line.add(large).add(large).add(uint64_t{12}).view().size() == 1535);
  CHECK(std::string(line.text()).size() == 1535);
}

}  // namespace
}  // namespace reprieve::guard::test
