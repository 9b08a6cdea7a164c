// Numbers of 16 and 32 bits as float32 and back, one or 16 bytes of them at a time.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace {
__device__ float to_float(float x) { return x; }
__device__ float to_float(__half x) { return __half2float(x); }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ void put(float* p, float x) { *p = x; }
__device__ void put(__half* p, float x) { *p = __float2half_rn(x); }
__device__ void put(__nv_bfloat16* p, float x) { *p = __float2bfloat16_rn(x); }

__device__ float2 unpack(unsigned word, __half) {
  return __half22float2(reinterpret_cast<const __half2&>(word));
}
__device__ float2 unpack(unsigned word, __nv_bfloat16) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}
__device__ unsigned pack(float x, float y, __half) {
  const __half2 pair = __floats2half2_rn(x, y);
  return reinterpret_cast<const unsigned&>(pair);
}
__device__ unsigned pack(float x, float y, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
  return reinterpret_cast<const unsigned&>(pair);
}

// 16 bytes of T as float32 and back. They stay a uint4 in between: nvcc stores a struct of T piece
// by piece.
template <class T, int n>
__device__ void unpack(const uint4& bits, float (&x)[n]) {
  const unsigned words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (n == 4) {
      x[i] = __uint_as_float(words[i]);
    } else {
      const float2 pair = unpack(words[i], T());
      x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
    }
  }
}

template <class T, int n>
__device__ uint4 pack(const float (&x)[n]) {
  unsigned words[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (n == 4)
      words[i] = __float_as_uint(x[i]);
    else
      words[i] = pack(x[2 * i], x[2 * i + 1], T());
  }
  return {words[0], words[1], words[2], words[3]};
}
}  // namespace
