#include "shared_words.h"

#include <sys/mman.h>
#include <unistd.h>

namespace reprieve {

Result<std::shared_ptr<SharedWords>> SharedWords::create() {
  Fd fd(memfd_create("reprieve-words", MFD_CLOEXEC));
  if (!fd) return lastError("memfd_create");
  if (ftruncate(fd.get(), kBytes) != 0) return lastError("ftruncate");
  void* data = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
  if (data == MAP_FAILED) return lastError("mmap");
  auto words = std::make_shared<SharedWords>(std::move(fd), data);
  words->words()[kEpoch].store(1);
  return words;
}

SharedWords::~SharedWords() { munmap(data_, kBytes); }

}  // namespace reprieve
