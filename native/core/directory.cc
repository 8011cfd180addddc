#include "directory.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <linux/openat2.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <sys/xattr.h>

#include <cstring>
#include <memory>
#include <string_view>

#include "control_file.h"

namespace reprieve {
namespace {

constexpr int kDirectoryFlags = O_RDONLY | O_DIRECTORY | O_CLOEXEC;

bool hasParentComponent(std::string_view path) {
  while (!path.empty()) {
    const size_t slash = path.find('/');
    if (path.substr(0, slash) == "..") return true;
    if (slash == std::string_view::npos) break;
    path.remove_prefix(slash + 1);
  }
  return false;
}

int openat2Beneath(int directory, const std::string& relative, int flags) {
  open_how how{};
  how.flags = static_cast<__u64>(flags);
  how.resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV;
  return static_cast<int>(syscall(SYS_openat2, directory, relative.c_str(), &how, sizeof how));
}

Result<Fd> openBeneathAt(const Directory& directory, const std::string& relative, int flags) {
  // openat2(2) lets `a/../b` pass because it stays beneath; here a `..` has no honest use at all.
  if (hasParentComponent(relative)) return Error{EXDEV, "openat2", directory.pathOf(relative)};
  const char* call = "openat2";
  int fd = openat2Beneath(directory.descriptor(), relative, flags);
  // ENOSYS: before Linux 5.6. EPERM: sandboxes whose filter does not know the call.
  if (fd < 0 && (errno == ENOSYS || errno == EPERM)) {
    call = "openat";
    fd = openBeneathByWalk(directory.descriptor(), relative, flags);
  }
  if (fd < 0) return lastError(call, directory.pathOf(relative));
  return Fd(fd);
}

/** A name below split into the directory that holds it and the last component. */
struct Placed {
  Fd holder;
  int directory;
  std::string leaf;
};

Result<Placed> place(const Directory& directory, const std::string& name, const char* call) {
  // A last component of `..` would be resolved by the kernel after our check of what lies before it.
  if (name.starts_with('/') || hasParentComponent(name)) return Error{EXDEV, call, directory.pathOf(name)};
  const size_t slash = name.rfind('/');
  if (slash == std::string::npos) return Placed{Fd(), directory.descriptor(), name};
  auto holder = openBeneathAt(directory, name.substr(0, slash), kDirectoryFlags);
  if (!holder) return holder.error();
  const int descriptor = holder->get();
  return Placed{std::move(*holder), descriptor, name.substr(slash + 1)};
}

struct CloseDirectoryStream {
  void operator()(DIR* stream) const { closedir(stream); }
};

bool isDirectory(int parent, const dirent& entry) {
  if (entry.d_type != DT_UNKNOWN) return entry.d_type == DT_DIR;
  struct stat status {};
  return fstatat(parent, entry.d_name, &status, AT_SYMLINK_NOFOLLOW) == 0 && S_ISDIR(status.st_mode);
}

}  // namespace

int openBeneathByWalk(int directory, const std::string& relative, int flags) {
  struct stat top {};
  if (fstat(directory, &top) != 0) return -1;
  if (relative.empty()) {
    errno = ENOENT;
    return -1;
  }
  if (relative.front() == '/' || hasParentComponent(relative)) {
    errno = EXDEV;
    return -1;
  }
  Fd holder;
  int at = directory;
  for (size_t from = 0;;) {
    const size_t slash = relative.find('/', from);
    const std::string component = relative.substr(from, slash - from);
    const bool last = slash == std::string::npos;
    // An empty component ("a//b", "a/") means the directory reached so far.
    const char* name = component.empty() ? "." : component.c_str();
    struct stat found {};
    // O_PATH opens a link itself instead of refusing with an errno that depends on the other flags.
    Fd probe(openat(at, name, O_PATH | O_NOFOLLOW | O_CLOEXEC));
    if (!probe || fstat(probe.get(), &found) != 0) return -1;
    if (S_ISLNK(found.st_mode) || found.st_dev != top.st_dev) {
      errno = S_ISLNK(found.st_mode) ? ELOOP : EXDEV;
      return -1;
    }
    if (last) return openat(at, name, flags | O_NOFOLLOW);
    holder = std::move(probe);
    at = holder.get();
    from = slash + 1;
  }
}

Result<Directory> Directory::adopt(Fd fd, std::string path) {
  struct stat status {};
  if (fstat(fd.get(), &status) != 0) return lastError("fstat", std::move(path));
  struct statfs system {};
  if (fstatfs(fd.get(), &system) != 0) return lastError("fstatfs", std::move(path));
  Directory directory;
  directory.fd_ = std::move(fd);
  directory.path_ = std::move(path);
  directory.inode_ = status.st_ino;
  directory.uid_ = status.st_uid;
  directory.fsType_ = system.f_type;
  return directory;
}

Result<Directory> Directory::open(const std::string& path) {
  Fd fd(::open(path.c_str(), kDirectoryFlags));
  if (!fd) return lastError("open", path);
  return adopt(std::move(fd), path);
}

Result<Directory> Directory::openBeneath(const std::string& relative) const {
  auto fd = openBeneathAt(*this, relative, kDirectoryFlags);
  if (!fd) return fd.error();
  return adopt(std::move(*fd), pathOf(relative));
}

Result<Fd> Directory::openFile(const std::string& name, int access) const {
  return openBeneathAt(*this, name, access | O_CLOEXEC);
}

Result<std::vector<std::string>> Directory::subdirectories() const {
  std::vector<std::string> names;
  struct stat status {};
  if (fstat(fd_.get(), &status) != 0) return lastError("fstat", path_);
  // kernfs counts 2 + subdirectories (kernfs_refresh_inode()), so a leaf costs no listing. Not so everywhere: btrfs
  // and overlayfs count differently.
  const bool cgroup = fsType_ == CGROUP_SUPER_MAGIC || fsType_ == CGROUP2_SUPER_MAGIC;
  if (cgroup && status.st_nlink == 2) return names;
  // Opened anew and not duplicated: a duplicate shares its position with every other listing of this directory.
  const int fd = openat(fd_.get(), ".", kDirectoryFlags);
  if (fd < 0) return lastError("openat", path_);
  const std::unique_ptr<DIR, CloseDirectoryStream> stream(fdopendir(fd));
  if (!stream) {
    Error error = lastError("fdopendir", path_);
    ::close(fd);
    return error;
  }
  for (;;) {
    errno = 0;
    const dirent* entry = readdir(stream.get());
    if (entry == nullptr) break;
    const std::string_view name = entry->d_name;
    if (name != "." && name != ".." && isDirectory(fd, *entry)) names.emplace_back(name);
  }
  if (errno != 0) return lastError("readdir", path_);
  return names;
}

Result<std::string> Directory::readFile(const std::string& name) const {
  auto file = ControlFile::open(*this, name, O_RDONLY);
  if (!file) return file.error();
  ReadBuffer buffer;
  auto text = file->read(buffer);
  if (!text) return text.error();
  return std::string(*text);
}

Result<void> Directory::writeFile(const std::string& name, const std::string& text) const {
  // No O_TRUNC: kernfs would have to allocate for the attribute change, which a memcg at its limit refuses.
  auto file = ControlFile::open(*this, name, O_WRONLY);
  if (!file) return file.error();
  return file->write(text);
}

Result<void> Directory::makeDirectory(const std::string& name) const {
  auto where = place(*this, name, "mkdirat");
  if (!where) return where.error();
  if (mkdirat(where->directory, where->leaf.c_str(), 0755) != 0) return lastError("mkdirat", pathOf(name));
  return {};
}

Result<void> Directory::removeDirectory(const std::string& name) const {
  auto where = place(*this, name, "unlinkat");
  if (!where) return where.error();
  if (unlinkat(where->directory, where->leaf.c_str(), AT_REMOVEDIR) != 0) return lastError("unlinkat", pathOf(name));
  return {};
}

Result<std::optional<std::string>> Directory::getAttribute(const std::string& name) const {
  std::string value(256, '\0');
  for (;;) {
    const ssize_t length = fgetxattr(fd_.get(), name.c_str(), value.data(), value.size());
    if (length >= 0) {
      value.resize(static_cast<size_t>(length));
      return std::optional(std::move(value));
    }
    if (errno == ENODATA || errno == EOPNOTSUPP) return std::optional<std::string>();
    // XATTR_SIZE_MAX is 64 KiB (xattr(7)).
    if (errno != ERANGE || value.size() > 65536) return lastError("fgetxattr", path_);
    value.resize(value.size() * 4);
  }
}

Result<bool> Directory::claim() const {
  if (flock(fd_.get(), LOCK_EX | LOCK_NB) == 0) return true;
  if (errno == EWOULDBLOCK) return false;
  return lastError("flock", path_);
}

void Directory::unclaim() const { flock(fd_.get(), LOCK_UN); }

}  // namespace reprieve
