#include "pages.h"

#include <cstdint>

#include "shim.h"
#ifdef __linux__
#include <sys/mman.h>
#endif

void fastft::expect_use([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kPage = 4096, kLargePage = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kPage * kPage;
  if (begin + kLargePage <= end)  // a wish: it may fail
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

FASTFT_EXPORT void fastft_expect_use(void* memory, size_t bytes) {
  fastft::expect_use(memory, bytes);
}
