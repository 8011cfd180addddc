#include "lines.h"

#include <sys/stat.h>
#include <unistd.h>

namespace reprieve::guard {

size_t countLines(int fd, size_t width) {
  struct stat status {};
  if (fd < 0 || fstat(fd, &status) != 0) return 0;
  return (static_cast<size_t>(status.st_size) + width - 1) / width;
}

std::string_view readLine(int fd, size_t index, std::span<char> line) {
  const ssize_t got = pread(fd, line.data(), line.size(), static_cast<off_t>(index * line.size()));
  return {line.data(), got > 0 ? static_cast<size_t>(got) : 0};
}

void clearLine(int fd, size_t index, size_t width) {
  std::array<char, kFileLine> blanks;
  blanks.fill(' ');
  blanks[width - 1] = '\n';
  static_cast<void>(pwrite(fd, blanks.data(), width, static_cast<off_t>(index * width)));
}

std::string_view readPiece(int fd, size_t width, size_t first, std::span<char> piece) {
  const ssize_t got = pread(fd, piece.data(), piece.size() / width * width, static_cast<off_t>(first * width));
  return {piece.data(), got > 0 ? static_cast<size_t>(got) : 0};
}

}  // namespace reprieve::guard
