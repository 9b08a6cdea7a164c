// Eight neighbouring 4-bit moments at once, a word of codes, with the bits of moments_4bit.h.
//
// As in moments_8bit.cuh no conversion and no comparison: a code becomes a float where it lies in
// its half of the word, behind the exponent of 2^23; a quotient becomes the next code or not by a
// subtraction and an addition that round up, which leaves no doubt: rounded up, no sum passes the
// whole number above it. Not yet run on a GPU.
#pragma once
#include "moments_4bit.h"
#include "moments_8bit.cuh"

namespace {
constexpr uint32_t kSignsOfNibbles = 0x88888888u;  // of eight

// The bits of `from` where `mask` is set, and those of `beside`.
__device__ uint32_t selected(uint32_t from, uint32_t mask, uint32_t beside) {
  uint32_t bits;  // nvcc would need two operations
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(bits) : "r"(from), "r"(mask), "r"(beside));
  return bits;
}

// The first moments of eight codes over these roots of their second ones.
__device__ void decode_nibbles(uint32_t codes, float scale, const float (&roots)[8],
                               float (&m)[8]) {
  const uint32_t from_nan = codes ^ kSignsOfNibbles;  // 0 to 15 for -8 to 7
#pragma unroll
  for (int k = 0; k < 8; k++) {
    constexpr float kUnits[4] = {1.0f, 16.0f, 256.0f, 4096.0f};
    const float unit = kUnits[k % 4];
    const uint32_t half = k < 4 ? from_nan : from_nan >> 16;
    const float behind = bits_float(selected(half, 15u << k % 4 * 4, kBehindBits));
    const float code = ft_sub(behind, kBehind + 8.0f * unit);  // times `unit`
    m[k] = ft_mul(ft_mul(code, 1.0f / kNibbleMost / unit), ft_mul(scale, roots[k]));
  }
  if (((from_nan - 0x11111111u) & codes & kSignsOfNibbles) == 0) return;
#pragma unroll
  for (int k = 0; k < 8; k++)
    if ((from_nan >> 4 * k & 15u) == 0) m[k] = bits_float(0x7fc00000u);
}

// The signs of eight numbers as those of a word's nibbles, above bits of no meaning.
__device__ uint32_t signs_of(const float (&m)[8]) {
  uint32_t signs = 0;
#pragma unroll
  for (int k = 7; k >= 0; k--) signs = __funnelshift_l(float_bits(m[k]), signs, 4);
  return signs;
}

// The codes of eight moments whose quotients by their roots are these, without their signs, in a
// block whose scale has this reciprocal.
__device__ uint32_t encode_nibbles(const float (&ratios)[8], uint32_t signs, float reciprocal,
                                   const uint32_t (&random)[4]) {
  uint32_t sizes = 0;
#pragma unroll
  for (int k = 0; k < 8; k++) {
    const float y = ft_mul(ft_mul(ratios[k], reciprocal), float(kNibbleMost));
    // 2^23 + 8 + the next whole number above y - random number / 2^16
    const float code = __fadd_ru(__fsub_ru(y, share_behind(random, k)), kBehind + (128.0f + 8.0f));
    sizes = __funnelshift_r(sizes, float_bits(code), 4);
  }
  sizes ^= kSignsOfNibbles;
  // Those with a sign as 16 less themselves: all bits turned over, and one more, which no nibble
  // hands on to its neighbour.
  const uint32_t negative = signs & kSignsOfNibbles, ones = negative >> 3;
  return ((sizes ^ (negative - ones)) + ones) ^ negative;
}
}  // namespace
