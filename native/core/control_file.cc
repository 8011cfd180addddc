#include "control_file.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <limits>

namespace reprieve {

std::optional<std::string_view> readWhole(int fd, ReadBuffer& buffer) {
  char* data = buffer.fixed.data();
  size_t capacity = buffer.fixed.size();
  size_t length = 0;
  // A seq_file returns about a page a call however much is asked for, so only 0 means the end.
  for (;;) {
    const ssize_t got = pread(fd, data + length, capacity - length, static_cast<off_t>(length));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return std::nullopt;
    if (got == 0) return std::string_view(data, length);
    length += static_cast<size_t>(got);
    if (length < capacity) continue;
    if (buffer.grown.empty()) buffer.grown.assign(data, length);
    capacity *= 4;
    buffer.grown.resize(capacity);
    data = buffer.grown.data();
  }
}

std::optional<std::string_view> readRecord(int fd, ReadBuffer& buffer) {
  ssize_t got;
  do {
    got = pread(fd, buffer.fixed.data(), buffer.fixed.size(), 0);
  } while (got < 0 && errno == EINTR);
  if (got < 0) return std::nullopt;
  const auto length = static_cast<size_t>(got);
  if (length == buffer.fixed.size()) return readWhole(fd, buffer);
  return std::string_view(buffer.fixed.data(), length);
}

double parseNumber(std::string_view text) {
  constexpr std::string_view kBlanks = " \t\r\n";
  const size_t first = text.find_first_not_of(kBlanks);
  if (first == std::string_view::npos) return std::numeric_limits<double>::quiet_NaN();
  text = text.substr(first, text.find_last_not_of(kBlanks) - first + 1);
  if (text == "max") return std::numeric_limits<double>::infinity();
  const bool negative = text.front() == '-';
  if (negative) text.remove_prefix(1);
  uint64_t value = 0;
  const auto [end, problem] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (problem != std::errc() || end != text.data() + text.size()) return std::numeric_limits<double>::quiet_NaN();
  return negative ? -static_cast<double>(value) : static_cast<double>(value);
}

/** Unit of sizes in /proc/PID/status, which means KiB (proc_pid_status(5)). */
constexpr std::string_view kKilobytes = " kB";

void parseFields(std::string_view text, std::span<const std::string_view> keys, std::span<double> out) {
  std::fill(out.begin(), out.end(), std::numeric_limits<double>::quiet_NaN());
  const size_t wanted = std::min(keys.size(), out.size());
  size_t missing = wanted;
  while (!text.empty() && missing > 0) {
    const std::string_view line = text.substr(0, text.find('\n'));
    text.remove_prefix(std::min(line.size() + 1, text.size()));
    const size_t blank = line.find_first_of(" \t");
    if (blank == std::string_view::npos) continue;
    const std::string_view key = line.substr(0, blank);
    const bool kilobytes = line.ends_with(kKilobytes);
    const std::string_view value =
        line.substr(blank + 1, line.size() - blank - 1 - (kilobytes ? kKilobytes.size() : 0));
    for (size_t i = 0; i < wanted; i++) {
      if (keys[i] != key || !std::isnan(out[i])) continue;
      out[i] = parseNumber(value) * (kilobytes ? 1024 : 1);
      missing--;
    }
  }
}

Result<ControlFile> ControlFile::open(const Directory& directory, const std::string& name, int access) {
  auto fd = directory.openFile(name, access);
  if (!fd) return fd.error();
  ControlFile file;
  file.fd_ = std::move(*fd);
  file.path_ = directory.pathOf(name);
  return file;
}

Result<std::string_view> ControlFile::read(ReadBuffer& buffer) const {
  const auto text = readWhole(fd_.get(), buffer);
  if (!text) return lastError("pread", path_);
  return *text;
}

Result<double> ControlFile::readNumber() const {
  ReadBuffer buffer;
  const auto text = readRecord(fd_.get(), buffer);
  if (!text) return lastError("pread", path_);
  const double number = parseNumber(*text);
  if (std::isnan(number)) return Error{EINVAL, "parse", path_};
  return number;
}

Result<void> ControlFile::readFields(std::span<const std::string_view> keys, std::span<double> out) const {
  ReadBuffer buffer;
  const auto text = readRecord(fd_.get(), buffer);
  if (!text) return lastError("pread", path_);
  parseFields(*text, keys, out);
  return {};
}

Result<void> ControlFile::write(std::string_view text) const {
  // Control files take each write as one command, so a rest must not be sent as another.
  ssize_t written = pwrite(fd_.get(), text.data(), text.size(), 0);
  // seq_open() in fs/seq_file.c allows no pwrite; cgroup files allow it again, those in /proc (PSI's) do not.
  if (written < 0 && errno == ESPIPE) written = ::write(fd_.get(), text.data(), text.size());
  if (written < 0) return lastError("write", path_);
  if (static_cast<size_t>(written) != text.size()) return Error{EIO, "write", path_};
  return {};
}

}  // namespace reprieve
