#pragma once

#include <array>
#include <cstddef>
#include <span>
#include <string_view>

#include "record.h"

// The state files as they lie on disk: lines of one width, read in place.
namespace reprieve::guard {

/** How many lines, the last of which may be cut off. */
size_t countLines(int fd, size_t width);
/** A line of a state file, or less where the file ends within it. */
std::string_view readLine(int fd, size_t index, std::span<char> line);
/** Makes a line free. If that fails it is met again, and there is nothing left to do for it. */
void clearLine(int fd, size_t index, size_t width);
/** pread(2) of whole lines: what it gave, which is empty at the end. */
std::string_view readPiece(int fd, size_t width, size_t first, std::span<char> piece);

/** Calls `visit(index, line)` for every line that is in use; false stops. */
template <typename Visit>
void forEachLine(int fd, size_t width, Visit visit) {
  std::array<char, 16 * kFileLine> piece;
  for (size_t index = 0;;) {
    std::string_view text = readPiece(fd, width, index, piece);
    if (text.empty()) return;
    for (; !text.empty(); index++) {
      const std::string_view line = text.substr(0, width);
      text.remove_prefix(line.size());
      if (!isBlank(line) && !visit(index, line)) return;
    }
  }
}

/** Calls `visit(record)` for every record of `files`; false stops. */
template <typename Visit>
void forEachFile(int fd, Visit visit) {
  forEachLine(fd, kFileLine, [&](size_t, std::string_view line) {
    FileRecord record{};
    return !parseFileRecord(line, record) || visit(record);
  });
}

/** Calls `visit(index, record)` for every record of `scores`; false stops. */
template <typename Visit>
void forEachScore(int fd, Visit visit) {
  forEachLine(fd, kScoreLine, [&](size_t index, std::string_view line) {
    ScoreRecord record{};
    return !parseScoreRecord(line, record) || visit(index, record);
  });
}

}  // namespace reprieve::guard
