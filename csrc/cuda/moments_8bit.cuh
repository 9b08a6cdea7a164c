// Eight neighbouring 8-bit moments at once, in about half of the instructions of moments_8bit.h and
// with its bits.
//
// A byte becomes a float by a permutation of bytes, which puts it behind the exponent of 2^23, and
// a subtraction; so does a random number, and a number becomes a byte the same way backwards. No
// conversion, no shift, no mask: on a GPU conversions are four times as dear as additions. The
// fourth root is an approximation, of which rounding_is_sure tells whether it led to the right
// code; where it may not have, as where a block has Inf, NaN or a scale near the smallest float,
// the caller takes moments_8bit.h. Not yet run on a GPU.
#pragma once
#include "moments_8bit.h"

namespace {
// Floats from here on have their integer part as their lowest bits.
constexpr float kBehind = 0x1p23f;
constexpr uint32_t kBehindBits = 0x4b000000u;    // and these as the others
constexpr uint32_t kSignsOfBytes = 0x80808080u;  // of four

// Four bytes by their numbers, which are from 4 on in `high`.
__device__ uint32_t permuted(uint32_t low, uint32_t high, uint32_t selector) {
  return __byte_perm(low, high, selector);
}

// 2^23 + the largest integer that is not above a * b + c - 2^23, for `c` up to 2^23 and results
// below 2^24.
__device__ float floor_behind(float a, float b, float c) { return __fmaf_rd(a, b, c); }

// Within 1.5 * 2^-22 of x^(1/4), relatively; of denormal numbers 0.
__device__ float about_fourth_root(float x) {
  float root;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(x));
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(root));
  return root;
}

__device__ float with_sign_of(float size, float sign) { return copysignf(size, sign); }

// The float 2^23 + byte `k` of `word`.
__device__ float byte_behind(uint32_t word, int k) {
  return bits_float(permuted(word, kBehindBits, 0x7540 + k));
}

// The first moments of eight codes.
__device__ void decode_eight(const uint32_t (&codes)[2], float scale, float (&m)[8]) {
  uint32_t nan = 0;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const uint32_t from_nan = codes[i] ^ kSignsOfBytes;  // 0 to 255 for -128 to 127
    nan |= (from_nan - 0x01010101u) & codes[i] & kSignsOfBytes;
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const float root = ft_mul(ft_sub(byte_behind(from_nan, k), kBehind + 128.0f), 1.0f / 127.0f);
      const float square = ft_mul(root, root);
      m[4 * i + k] = ft_mul(with_sign_of(ft_mul(square, square), root), scale);
    }
  }
  if (nan == 0) return;
#pragma unroll
  for (int k = 0; k < 8; k++)
    if (permuted(codes[k / 4], 0, 0x4440 + k % 4) == 0x80u) m[k] = bits_float(0x7fc00000u);
}

// The second moments of eight codes.
__device__ void decode_sq_eight(const uint32_t (&codes)[2], float scale, float (&v)[8]) {
#pragma unroll
  for (int k = 0; k < 8; k++) {
    const float above = ft_sub(byte_behind(codes[k / 4], k % 4), kBehind - kSqOctave);  // code + 12
    const float octave = floor_behind(above, 1.0f / kSqOctave, kBehind - 1.0f);     // behind 2^23
    const float place = ft_fma(ft_sub(octave, kBehind), -float(kSqOctave), above);  // 12 to 23
    const float unit = ft_mul(place, 1.0f / (kSqOctave * FASTFT_EXP_AVG_SQ_UNITS));
    // 2^octave units
    v[k] = ft_mul(bits_float(float_bits(unit) + (float_bits(octave) << 23)), scale);
  }
}

// Four of the upper bytes (`byte` 3) or lower ones (0) of words.
__device__ uint32_t gathered(const uint32_t (&words)[8], int first, uint32_t byte) {
  const uint32_t pair = byte | (byte + 4) << 4;
  return permuted(permuted(words[first], words[first + 1], pair),
                  permuted(words[first + 2], words[first + 3], pair), 0x5410);
}

// 128 + the random number of element `k` of eight / 2^16; they are two a word.
__device__ float share_behind(const uint32_t (&random)[4], int k) {
  return bits_float(permuted(random[k / 2], 0x43000000u, k % 2 ? 0x7432 : 0x7410));
}

// The codes of eight first moments whose block's scale has this reciprocal; false where one may be
// another, with all of them undefined. `random`: 16 bits of each element, two a word.
__device__ bool encode_eight(const float (&m)[8], float reciprocal, const uint32_t (&random)[4],
                             uint32_t (&codes)[2]) {
  uint32_t words[8];
  bool sure = true;
#pragma unroll
  for (int k = 0; k < 8; k++) {
    const float size =
        ft_mul(ft_mul(bits_float(uint32_t(magnitude(m[k]))), reciprocal), FASTFT_EXP_AVG_UNITS);
    // no closer to code 127 than where all draws give it
    const float x = fminf(size, FASTFT_EXP_AVG_UNITS - 64.0f);
    const float root =
        ft_sub(floor_behind(about_fourth_root(x), 1.0f - 0x1p-21f, kBehind), kBehind);
    const float next = ft_add(root, 1.0f), square = ft_mul(root, root);
    const float next_square = ft_mul(next, next);
    const float below = ft_mul(square, square), above = ft_mul(next_square, next_square);
    sure &= x < above;
    const float share = ft_sub(share_behind(random, k), 128.0f);
    const float code = ft_mul(share, ft_sub(above, below)) < ft_sub(x, below) ? next : root;
    words[k] = float_bits(ft_add(with_sign_of(code, m[k]), 1.5f * kBehind));
  }
#pragma unroll
  for (int i = 0; i < 2; i++) codes[i] = gathered(words, 4 * i, 0);
  return sure;
}

// The codes of eight second moments.
__device__ void encode_sq_eight(const float (&v)[8], float reciprocal, const uint32_t (&random)[4],
                                uint32_t (&codes)[2]) {
  uint32_t words[8];
#pragma unroll
  for (int k = 0; k < 8; k++) {
    const float units = ft_mul(ft_mul(v[k], reciprocal), FASTFT_EXP_AVG_SQ_UNITS);
    const float kept = fmaxf(fminf(units, FASTFT_EXP_AVG_SQ_UNITS), 1.0f);
    // 24 * (bits of kept - bits of 1) + (random number, bytes swapped, << 8): the code is the
    // topmost byte
    words[k] =
        float_bits(kept) * 24u + permuted(random[k / 2], 0x0c000000u, k % 2 ? 0x7234 : 0x7014);
  }
#pragma unroll
  for (int i = 0; i < 2; i++) codes[i] = gathered(words, 4 * i, 3);
}
}  // namespace
