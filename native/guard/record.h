#pragma once

#include <sys/types.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

// The text of an instance's state files, as TypeScript writes it before each change. Pure: no system calls.
namespace reprieve::guard {

/** Bytes of a line of `files` and of `scores`, the end of line among them. */
constexpr size_t kFileLine = 1024;
constexpr size_t kScoreLine = 128;

enum class Kind { kFile, kKeep, kHome, kMade };

/** A change of a control file, or what else has to be known. The texts lie in the line it was parsed from. */
struct FileRecord {
  Kind kind;
  std::string_view name;
  uint64_t inode;
  std::string_view was;
  std::string_view wrote;
  /** Still percent-encoded: fit to be printed. See decodePath. */
  std::string_view path;
};

/** A raised oom_score_adj. Times are clock ticks since boot. */
struct ScoreRecord {
  pid_t pid;
  uint64_t started;
  uint64_t raisedAt;
  int was;
  int wrote;
  uint64_t home;
};

/** The `owner` file. Texts lie in what it was parsed from; empty where there is no such line. */
struct Owner {
  uint64_t version = 0;
  pid_t pid = 0;
  uint64_t started = 0;
  std::string_view memory;
  std::string_view freezer;
  std::string_view unified;
};

/** CRC-32 as zlib has it. */
uint32_t crc32(std::string_view text);
/** A free slot: nothing but blanks, NULs and the end of line. */
bool isBlank(std::string_view line);
/** False for a line that was torn, or is not of that shape. */
bool parseFileRecord(std::string_view line, FileRecord& out);
bool parseScoreRecord(std::string_view line, ScoreRecord& out);
/** Lines that are not understood are left out; of a key that comes twice the first counts. */
void parseOwner(std::string_view text, Owner& out);
/** "%20" and the like into bytes, with a NUL at the end. False if malformed, or if it does not fit. */
bool decodePath(std::string_view encoded, std::span<char> out);

/**
 * The value of a control file in a form that can be compared: a limit in whole pages' bytes, UINT64_MAX for none
 * ("max", -1, and v1's largest number), a switch as its number, FROZEN and FREEZING as 1, THAWED as 0. False for
 * anything else.
 */
bool parseValue(std::string_view name, std::string_view text, uint64_t& out);

/** A line of text of fixed size; what does not fit is cut off. */
class Line {
 public:
  Line& add(std::string_view text);
  Line& add(uint64_t number);
  Line& addSigned(int64_t number);

  void clear() { size_ = 0; }
  std::string_view view() const { return {data_.data(), size_}; }
  /** With a NUL at the end. */
  const char* text();

 private:
  std::array<char, 1536> data_;
  size_t size_ = 0;
};

}  // namespace reprieve::guard
