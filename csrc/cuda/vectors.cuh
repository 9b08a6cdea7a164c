// Neighbouring numbers at once, as vectors of up to 16 bytes, and numbers of 16 bits as float32 and
// back. A uint16_t has the bits of a bfloat16, as in bf16.h; __nv_bfloat16 is rounded by the chip.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "bf16.h"

namespace {
template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth < 16 ? sizeof(T) * kWidth : 16) Vector {
  T at[kWidth];
};

template <int kWidth, class T>
__device__ Vector<T, kWidth> load(const void* data, int64_t i) {
  return *reinterpret_cast<const Vector<T, kWidth>*>(static_cast<const T*>(data) + i);
}

template <class T, int kWidth>
__device__ void store(void* data, int64_t i, const Vector<T, kWidth>& values) {
  *reinterpret_cast<Vector<T, kWidth>*>(static_cast<T*>(data) + i) = values;
}

using ::widened;
__device__ float widened(__half x) { return __half2float(x); }
__device__ float widened(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ void put(float* p, float x) { *p = x; }
__device__ void put(__half* p, float x) { *p = __float2half_rn(x); }
__device__ void put(__nv_bfloat16* p, float x) { *p = __float2bfloat16_rn(x); }

// The two numbers in a word.
template <class T>
__device__ float2 unpack(uint32_t word) {
  if constexpr (std::is_same_v<T, __half>)
    return __half22float2(reinterpret_cast<const __half2&>(word));
  else
    return {bf16_lower(word), bf16_upper(word)};
}

// A word of two numbers, rounded by the chip, which has other bits for NaN than bf16.h.
template <class T>
__device__ uint32_t pack(float x, float y) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(x, y);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

// 16 bytes of T as float32 and back. They stay a uint4 in between: nvcc stores a struct of T piece
// by piece.
template <class T, int n>
__device__ void unpack(const uint4& bits, float (&x)[n]) {
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (n == 4) {
      x[i] = bits_float(words[i]);
    } else {
      const float2 pair = unpack<T>(words[i]);
      x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
    }
  }
}

template <class T, int n>
__device__ uint4 pack(const float (&x)[n]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (n == 4)
      words[i] = float_bits(x[i]);
    else
      words[i] = pack<T>(x[2 * i], x[2 * i + 1]);
  }
  return {words[0], words[1], words[2], words[3]};
}
}  // namespace
