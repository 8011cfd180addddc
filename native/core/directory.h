#pragma once

#include <sys/types.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "fd.h"
#include "result.h"

namespace reprieve {

/** A directory held by a descriptor; names below it never lead out of it, through a link or onto another mount. */
class Directory {
 public:
  /** Opens a directory by path; links in the path are followed. */
  static Result<Directory> open(const std::string& path);

  /** Opens a directory below. EXDEV for `..`, absolute paths and other mounts, ELOOP for symbolic links. */
  Result<Directory> openBeneath(const std::string& relative) const;
  /** Opens a file below with open(2)'s access mode; refuses what openBeneath refuses. */
  Result<Fd> openFile(const std::string& name, int access) const;
  /** Names of the directories directly below, in the file system's order. */
  Result<std::vector<std::string>> subdirectories() const;
  /** The text of a file below, opened anew. */
  Result<std::string> readFile(const std::string& name) const;
  /** Writes a file below, opened anew, in one write(2). Nothing is created or truncated. */
  Result<void> writeFile(const std::string& name, const std::string& text) const;
  /** mkdir(2) below, mode 0755. */
  Result<void> makeDirectory(const std::string& name) const;
  /** rmdir(2) below. */
  Result<void> removeDirectory(const std::string& name) const;
  /** An extended attribute of the directory; nothing when there is none or the file system knows none. */
  Result<std::optional<std::string>> getAttribute(const std::string& name) const;
  /** Claims the directory (flock(2)) as long as this is open; false while another open of it has the claim. */
  Result<bool> claim() const;
  void unclaim() const;

  const std::string& path() const { return path_; }
  /** `path()` and a name below it. */
  std::string pathOf(const std::string& name) const { return path_ + '/' + name; }
  int descriptor() const { return fd_.get(); }
  ino_t inode() const { return inode_; }
  uid_t uid() const { return uid_; }
  /** statfs(2)'s f_type. */
  int64_t fsType() const { return fsType_; }
  bool closed() const { return !fd_; }
  void close() { fd_.close(); }

 private:
  static Result<Directory> adopt(Fd fd, std::string path);

  Fd fd_;
  std::string path_;
  ino_t inode_ = 0;
  uid_t uid_ = 0;
  int64_t fsType_ = 0;
};

/**
 * The way for kernels and sandboxes without openat2(2): walks the path component by component. What it checks can
 * change under it where others may write, which is why openat2 is preferred. Gives -1 and errno. Public for its test.
 */
int openBeneathByWalk(int directory, const std::string& relative, int flags);

}  // namespace reprieve
