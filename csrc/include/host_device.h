// Marks a function of one element for CPU and CUDA. It is static: a CPU kernel file is compiled
// once per instruction set and must share no inline function.
#pragma once

#if defined(__CUDACC__)
#define FASTFT_HD static __host__ __device__ __forceinline__
#else
#define FASTFT_HD static inline __attribute__((always_inline, unused))
#endif
