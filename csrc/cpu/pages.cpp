#include "pages.h"

#include <cstdint>

#include "shim.h"
#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef __GLIBC__
#include <malloc.h>
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

// Whether glibc can. Blocks beyond 32 MiB for which the heap has no room come from the system and
// go back to it one by one, and where the heap's end goes back, it does from twice as many bytes
// on: glibc's own rules come near this once a block of almost 32 MiB was freed, but are off for
// good where one of the two was set. What is free already goes back either way: pieces between the
// blocks of tokenizers, data sets and imports, which no tensor fits in.
FASTFT_EXPORT int fastft_keep_freed([[maybe_unused]] int keep) {
#ifdef __GLIBC__
  constexpr int kMost = 32 << 20, kNever = -1;
  const bool known =
      mallopt(M_MMAP_THRESHOLD, kMost) && mallopt(M_TRIM_THRESHOLD, keep ? kNever : 2 * kMost);
  malloc_trim(0);
  return known;
#else
  return 0;
#endif
}
