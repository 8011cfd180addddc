#include "words.h"

#include <sys/mman.h>

namespace reprieve::guard {

Words::Words(int descriptor) {
  void* memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
  if (memory != MAP_FAILED) words_ = static_cast<std::atomic<uint32_t>*>(memory);
}

}  // namespace reprieve::guard
