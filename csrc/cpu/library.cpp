// The functions that Python calls through ctypes after loading libfastft_cpu.so.
#include <cstdlib>

#include "isa.h"
#include "shim.h"

namespace {
const char* const kNames[] = {"baseline", "avx2", "avx512", "avx512bf16"};

fastft::Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return fastft::Isa::avx512bf16;
  if (avx512) return fastft::Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return fastft::Isa::avx2;
#endif
  return fastft::Isa::baseline;
}

fastft::Isa choose_isa() {
  const fastft::Isa best = best_isa();
  const char* cap = std::getenv("FASTFT_CPU_ISA");
  for (int i = 0; cap && i < static_cast<int>(best); i++)
    if (!std::strcmp(cap, kNames[i])) return static_cast<fastft::Isa>(i);
  return best;
}
}  // namespace

fastft::Isa fastft::isa() {
  static const Isa chosen = choose_isa();
  return chosen;
}

FASTFT_EXPORT const char* fastft_cpu_isa() { return kNames[static_cast<int>(fastft::isa())]; }
FASTFT_EXPORT int fastft_is_intel() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("intel") != 0;
#else
  return 0;
#endif
}
FASTFT_EXPORT const char* fastft_register() { return fastft::register_kernels("CPU"); }
