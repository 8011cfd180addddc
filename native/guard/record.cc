#include "record.h"

#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <limits>

namespace reprieve::guard {
namespace {

constexpr std::string_view kPadding(" \n\0", 3);
constexpr size_t kCrcDigits = 8;
constexpr int kScoreMax = 1000;  // OOM_SCORE_ADJ_MAX of <linux/oom.h>

constexpr std::array<uint32_t, 256> makeCrcTable() {
  std::array<uint32_t, 256> table{};
  for (uint32_t i = 0; i < table.size(); i++) {
    uint32_t value = i;
    for (int bit = 0; bit < 8; bit++) value = (value >> 1) ^ ((value & 1) != 0 ? 0xedb88320U : 0U);
    table[i] = value;
  }
  return table;
}
constexpr auto kCrcTable = makeCrcTable();

/** The whole text as a number, without sign, blanks or anything else. */
template <typename T>
bool toNumber(std::string_view text, T& out, int base = 10) {
  const auto [end, problem] = std::from_chars(text.data(), text.data() + text.size(), out, base);
  return problem == std::errc() && end == text.data() + text.size();
}

/** Takes the next field off: what stands before the next blank. False if there is none, or an empty one. */
bool takeField(std::string_view& text, std::string_view& field) {
  field = text.substr(0, text.find(' '));
  text.remove_prefix(std::min(field.size() + 1, text.size()));
  return !field.empty();
}

/** What stands after a crc that is right for it, without the padding. */
bool takeChecked(std::string_view line, std::string_view& text) {
  const size_t last = line.find_last_not_of(kPadding);
  if (last == std::string_view::npos || last <= kCrcDigits || line[kCrcDigits] != ' ') return false;
  uint32_t crc = 0;
  if (!toNumber(line.substr(0, kCrcDigits), crc, 16)) return false;
  text = line.substr(kCrcDigits + 1, last - kCrcDigits);
  return crc32(text) == crc;
}

/** A file's name and nothing that leads elsewhere. */
bool isFileName(std::string_view name) {
  if (name.starts_with('.')) return false;
  return std::all_of(name.begin(), name.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '.' || c == '_' || c == '-';
  });
}

/** The byte that an encoded path begins with; `text` loses it. False for a malformed code. */
bool takeByte(std::string_view& text, char& out) {
  out = text.front();
  if (out != '%') {
    text.remove_prefix(1);
    return true;
  }
  uint8_t code = 0;
  if (text.size() < 3 || !toNumber(text.substr(1, 2), code, 16) || code == 0) return false;
  out = static_cast<char>(code);
  text.remove_prefix(3);
  return true;
}

bool isPath(std::string_view encoded) {
  char ignored = 0;
  if (encoded.empty() || encoded.find('\0') != std::string_view::npos) return false;
  while (!encoded.empty()) {
    if (!takeByte(encoded, ignored)) return false;
  }
  return true;
}

bool isLimit(std::string_view name) {
  return name.ends_with("_in_bytes") || name == "memory.max" || name == "memory.high" || name == "memory.low" ||
         name == "memory.min" || name == "memory.swap.max" || name == "memory.swap.high";
}

bool parseKind(std::string_view text, Kind& out) {
  if (text == "file") {
    out = Kind::kFile;
  } else if (text == "keep") {
    out = Kind::kKeep;
  } else if (text == "home") {
    out = Kind::kHome;
  } else if (text == "made") {
    out = Kind::kMade;
  } else {
    return false;
  }
  return true;
}

/** Whether what a kind must have beside its path is there. */
bool isWhole(const FileRecord& record) {
  uint64_t ignored = 0;
  switch (record.kind) {
    case Kind::kFile:
      return isFileName(record.name) && parseValue(record.name, record.was, ignored) &&
             parseValue(record.name, record.wrote, ignored);
    case Kind::kKeep:
      return record.name == "memory.oom_control";
    case Kind::kHome:
      return record.name == "deep" || record.name == "flat";
    case Kind::kMade:
      return record.name == "window" ? record.was == "-"
                                     : (record.name == "-" || record.name == "freezer") && isPath(record.was);
  }
  return false;
}

}  // namespace

uint32_t crc32(std::string_view text) {
  uint32_t crc = 0xffffffffU;
  for (const char c : text) crc = (crc >> 8) ^ kCrcTable[(crc ^ static_cast<unsigned char>(c)) & 0xff];
  return ~crc;
}

bool isBlank(std::string_view line) { return line.find_first_not_of(kPadding) == std::string_view::npos; }

bool parseFileRecord(std::string_view line, FileRecord& out) {
  std::string_view text;
  std::string_view kind;
  std::string_view inode;
  if (!takeChecked(line, text)) return false;
  if (!takeField(text, kind) || !takeField(text, out.name) || !takeField(text, inode) || !takeField(text, out.was) ||
      !takeField(text, out.wrote) || !takeField(text, out.path)) {
    return false;
  }
  return text.empty() && toNumber(inode, out.inode) && parseKind(kind, out.kind) && isPath(out.path) && isWhole(out);
}

/** Not by std::abs, which the least of all numbers has none of. */
bool isScore(int value) { return value >= -kScoreMax && value <= kScoreMax; }

bool parseScoreRecord(std::string_view line, ScoreRecord& out) {
  std::string_view text;
  std::array<std::string_view, 6> fields;
  if (!takeChecked(line, text)) return false;
  for (std::string_view& field : fields) {
    if (!takeField(text, field)) return false;
  }
  return text.empty() && toNumber(fields[0], out.pid) && out.pid > 0 && toNumber(fields[1], out.started) &&
         toNumber(fields[2], out.raisedAt) && toNumber(fields[3], out.was) && isScore(out.was) &&
         toNumber(fields[4], out.wrote) && isScore(out.wrote) && toNumber(fields[5], out.home);
}

void parseOwner(std::string_view text, Owner& out) {
  while (!text.empty()) {
    std::string_view line = text.substr(0, text.find('\n'));
    text.remove_prefix(std::min(line.size() + 1, text.size()));
    const std::string_view key = line.substr(0, line.find(' '));
    if (key.size() == line.size()) continue;
    const std::string_view value = line.substr(key.size() + 1);
    pid_t pid = 0;
    uint64_t number = 0;
    if (key == "version" && out.version == 0 && toNumber(value, number)) out.version = number;
    if (key == "pid" && out.pid == 0 && toNumber(value, pid) && pid > 0) out.pid = pid;
    if (key == "started" && out.started == 0 && toNumber(value, number)) out.started = number;
    if (!value.starts_with('/') || value.find('\0') != std::string_view::npos) continue;
    if (key == "memory" && out.memory.empty()) out.memory = value;
    if (key == "freezer" && out.freezer.empty()) out.freezer = value;
    if (key == "unified" && out.unified.empty()) out.unified = value;
  }
}

bool decodePath(std::string_view encoded, std::span<char> out) {
  size_t length = 0;
  while (!encoded.empty()) {
    // One place is the NUL's.
    if (length + 1 >= out.size() || !takeByte(encoded, out[length])) return false;
    length++;
  }
  if (length >= out.size()) return false;
  out[length] = '\0';
  return true;
}

bool parseValue(std::string_view name, std::string_view text, uint64_t& out) {
  while (!text.empty() && (text.back() == '\n' || text.back() == ' ')) text.remove_suffix(1);
  if (name == "freezer.state") {
    out = text == "THAWED" ? 0 : 1;
    return text == "THAWED" || text == "FREEZING" || text == "FROZEN";
  }
  if (!isLimit(name)) return toNumber(text, out);
  constexpr uint64_t kNone = std::numeric_limits<uint64_t>::max();
  const auto page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  if (text == "max" || text == "-1") {
    out = kNone;
    return true;
  }
  if (!toNumber(text, out)) return false;
  out -= out % page;
  // PAGE_COUNTER_MAX in <linux/page_counter.h>, in bytes: what v1 shows where there is no limit.
  if (out >= static_cast<uint64_t>(LONG_MAX) / page * page) out = kNone;
  return true;
}

Line& Line::add(std::string_view text) {
  // One place is the NUL's.
  const size_t fits = std::min(text.size(), data_.size() - 1 - size_);
  std::memcpy(data_.data() + size_, text.data(), fits);
  size_ += fits;
  return *this;
}

Line& Line::add(uint64_t number) {
  std::array<char, 20> digits{};
  const auto [end, problem] = std::to_chars(digits.data(), digits.data() + digits.size(), number);
  return add(std::string_view(digits.data(), static_cast<size_t>(end - digits.data())));
}

Line& Line::addSigned(int64_t number) {
  if (number >= 0) return add(static_cast<uint64_t>(number));
  return add("-").add(~static_cast<uint64_t>(number) + 1);
}

const char* Line::text() {
  data_[size_] = '\0';
  return data_.data();
}

}  // namespace reprieve::guard
