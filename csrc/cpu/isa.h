// Run-time choice of the instruction set. A file X_kernel.cpp is compiled once per set with
// FASTFT_ISA defined and exports FASTFT_KERNEL(name); its host file X.cpp declares them with
// FASTFT_DECLARE_KERNEL and calls through name_kernel(). Kernel files, and the headers that only
// they include, hold static functions and anonymous namespaces only, and include no C++ library
// header: of a std:: function, a class's or a template's that is not inlined the linker keeps one
// copy for everybody, which could be the one compiled with AVX-512 (tests/test_native.py looks).
#pragma once

namespace fastft {
enum class Isa { baseline, avx2, avx512, avx512bf16 };
Isa isa();  // the best of this processor, capped by the environment variable FASTFT_CPU_ISA
}  // namespace fastft

#define FASTFT_JOIN_(a, b) a##_##b
#define FASTFT_JOIN(a, b) FASTFT_JOIN_(a, b)
#define FASTFT_KERNEL(name) FASTFT_JOIN(fastft_##name, FASTFT_ISA)

#if defined(__x86_64__)
#define FASTFT_DECLARE_KERNEL(name, ...)                   \
  extern "C" void fastft_##name##_baseline(__VA_ARGS__);   \
  extern "C" void fastft_##name##_avx2(__VA_ARGS__);       \
  extern "C" void fastft_##name##_avx512(__VA_ARGS__);     \
  extern "C" void fastft_##name##_avx512bf16(__VA_ARGS__); \
  static inline auto name##_kernel() {                     \
    switch (fastft::isa()) {                               \
      case fastft::Isa::avx512bf16:                        \
        return fastft_##name##_avx512bf16;                 \
      case fastft::Isa::avx512:                            \
        return fastft_##name##_avx512;                     \
      case fastft::Isa::avx2:                              \
        return fastft_##name##_avx2;                       \
      default:                                             \
        return fastft_##name##_baseline;                   \
    }                                                      \
  }
#else
#define FASTFT_DECLARE_KERNEL(name, ...)                 \
  extern "C" void fastft_##name##_baseline(__VA_ARGS__); \
  static inline auto name##_kernel() { return fastft_##name##_baseline; }
#endif
