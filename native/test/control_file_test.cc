#include "core/control_file.h"

#include <fcntl.h>

#include <array>
#include <cmath>

#include "support.h"

namespace reprieve::test {
namespace {

TEST_CASE("parseNumber") {
  CHECK(parseNumber("42\n") == 42);
  CHECK(parseNumber(" -1000 \n") == -1000);
  CHECK(parseNumber("9223372036854771712\n") == 9223372036854771712.0);
  CHECK(parseNumber("max\n") == HUGE_VAL);
  for (const char* text : {"", "\n", "12x", "1 2", "x", "-", "--1", "0x10", "1.5", "nan", "99999999999999999999999"}) {
    CAPTURE(text);
    CHECK(std::isnan(parseNumber(text)));
  }
}

TEST_CASE("parseFields") {
  const std::array<std::string_view, 4> keys{"anon", "file", "none", "anon_thp"};
  std::array<double, 4> out{};

  SUBCASE("finds whole keys only, in any order") {
    parseFields("file 2\nanon_thp 3\nanon 1\n", keys, out);
    CHECK(out[0] == 1);
    CHECK(out[1] == 2);
    CHECK(std::isnan(out[2]));
    CHECK(out[3] == 3);
  }
  SUBCASE("garbage gives NaN and nothing else") {
    parseFields("anon\n\nanon 1 2\nfile -\n \n\nx", keys, out);
    for (const double value : out) CHECK(std::isnan(value));
  }
  SUBCASE("kB are bytes in thousands of 1024, after tabs and blanks") {
    const std::array<std::string_view, 3> status{"RssAnon:", "VmSwap:", "Threads:"};
    std::array<double, 3> values{};
    parseFields("Name:\tx\nRssAnon:\t     123 kB\nVmSwap:\t0 kB\nThreads:\t4\n", status, values);
    CHECK(values == std::array<double, 3>{123 * 1024, 0, 4});
  }
  SUBCASE("the last line needs no end") {
    parseFields("x 1\nfile 7", keys, out);
    CHECK(out[1] == 7);
  }
  SUBCASE("the same key may be asked for twice") {
    const std::array<std::string_view, 2> twice{"file", "file"};
    parseFields("file 7\n", twice, out);
    CHECK(out[0] == 7);
    CHECK(out[1] == 7);
  }
  SUBCASE("nothing at all") {
    parseFields("", keys, out);
    CHECK(std::isnan(out[0]));
    parseFields("file 1\n", {}, {});
  }
}

TEST_CASE_FIXTURE(NoLeaks, "ControlFile is read anew each time") {
  const TemporaryDirectory temporary;
  temporary.write("file", "usage 1\n");
  auto file = ControlFile::open(temporary.open(), "file", O_RDWR);
  REQUIRE(file);
  CHECK(file->path() == temporary.path() + "/file");
  const std::array<std::string_view, 1> keys{"usage"};
  std::array<double, 1> out{};
  REQUIRE(file->readFields(keys, out));
  CHECK(out[0] == 1);
  REQUIRE(file->write("usage 2\n"));
  REQUIRE(file->readFields(keys, out));
  CHECK(out[0] == 2);
}

TEST_CASE_FIXTURE(NoLeaks, "ControlFile reads files of any length") {
  const TemporaryDirectory temporary;
  for (const size_t length : {size_t{0}, size_t{16383}, size_t{16384}, size_t{16385}, size_t{300000}}) {
    CAPTURE(length);
    std::string text(length, 'x');
    text += "\nlast 5\n";
    temporary.write("file", text);
    auto file = ControlFile::open(temporary.open(), "file", O_RDONLY);
    REQUIRE(file);
    ReadBuffer buffer;
    auto read = file->read(buffer);
    REQUIRE(read);
    CHECK(*read == text);
    const std::array<std::string_view, 1> keys{"last"};
    std::array<double, 1> out{};
    REQUIRE(file->readFields(keys, out));
    CHECK(out[0] == 5);
  }
}

TEST_CASE_FIXTURE(NoLeaks, "ControlFile writes files of /proc that know no offset") {
  auto self = Directory::open("/proc/self");
  REQUIRE(self);
  auto name = ControlFile::open(*self, "comm", O_RDWR);
  REQUIRE(name);
  ReadBuffer buffer;
  const std::string before(*name->read(buffer));
  for (const char* text : {"first", "second"}) {
    REQUIRE(name->write(text));
    CHECK(*name->read(buffer) == std::string(text) + '\n');
  }
  REQUIRE(name->write(before.substr(0, before.size() - 1)));
}

TEST_CASE_FIXTURE(NoLeaks, "ControlFile says what failed") {
  const TemporaryDirectory temporary;
  temporary.write("file", "text\n");
  const Directory directory = temporary.open();
  auto missing = ControlFile::open(directory, "none", O_RDONLY);
  REQUIRE_FALSE(missing);
  CHECK(missing.error().number == ENOENT);
  auto file = ControlFile::open(directory, "file", O_RDONLY);
  REQUIRE(file);
  auto number = file->readNumber();
  REQUIRE_FALSE(number);
  CHECK(number.error().number == EINVAL);
  CHECK(number.error().path == temporary.path() + "/file");
  auto written = file->write("1");
  REQUIRE_FALSE(written);
  CHECK(written.error().number == EBADF);
  CHECK(std::string(written.error().syscall) == "write");
  auto writeOnly = ControlFile::open(directory, "file", O_WRONLY);
  REQUIRE(writeOnly);
  ReadBuffer buffer;
  auto read = writeOnly->read(buffer);
  REQUIRE_FALSE(read);
  CHECK(read.error().number == EBADF);
  CHECK(std::string(read.error().syscall) == "pread");
}

}  // namespace
}  // namespace reprieve::test
