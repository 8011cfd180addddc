#pragma once

#include <array>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "directory.h"
#include "fd.h"
#include "result.h"

namespace reprieve {

/** Room for a control file's text: on the stack unless the file is longer than all that are known. */
struct ReadBuffer {
  std::array<char, 16384> fixed;
  std::string grown;
};

/** Reads from offset 0 to the end; the text lives in `buffer`. errno is set when nothing is returned. */
std::optional<std::string_view> readWhole(int fd, ReadBuffer& buffer);

/**
 * Reads a file whose text the kernel makes in one piece, as it does for numbers and flat keyed files (single_open() and
 * kernfs, fs/seq_file.c): one pread(2) gives all of it, so the one that would say "end" is spared.
 */
std::optional<std::string_view> readRecord(int fd, ReadBuffer& buffer);

/** A decimal integer, or "max" (cgroup v2) as infinity; blanks around it are ignored. NaN for anything else. */
double parseNumber(std::string_view text);

/**
 * Values of a flat keyed text ("key value" lines, as in memory.stat; "Key:\tvalue kB", as in /proc/PID/status, gives
 * bytes); the first line of a key counts, a key that is missing gives NaN.
 */
void parseFields(std::string_view text, std::span<const std::string_view> keys, std::span<double> out);

/** A control file that stays open. Beware of v1's cgroup.procs and tasks: kept open, their list is a stale copy. */
class ControlFile {
 public:
  /** `access` is O_RDONLY, O_WRONLY or O_RDWR. */
  static Result<ControlFile> open(const Directory& directory, const std::string& name, int access);

  /** The whole text, read anew. */
  Result<std::string_view> read(ReadBuffer& buffer) const;
  /** The whole file as one number (see parseNumber); EINVAL when it is none. */
  Result<double> readNumber() const;
  /** Fields of a flat keyed file (see parseFields). */
  Result<void> readFields(std::span<const std::string_view> keys, std::span<double> out) const;
  /** One write(2) at offset 0; EIO when the kernel took only a part. */
  Result<void> write(std::string_view text) const;

  const std::string& path() const { return path_; }
  bool closed() const { return !fd_; }
  void close() { fd_.close(); }

 private:
  Fd fd_;
  std::string path_;
};

}  // namespace reprieve
