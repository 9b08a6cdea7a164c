// A register of floats, by the compiler's vector types at the width of the instruction set: 16 with
// AVX-512, 8 with AVX2, else 4. Every function has the same bits in each lane with all of them, but
// for sign and payload of a NaN.
#pragma once
#include "bf16.h"
#include "wide.h"

namespace {
#if defined(FASTFT_WIDE)
constexpr int kWidth = kWide;
#else
constexpr int kWidth = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef uint32_t Words __attribute__((vector_size(4 * kWidth)));
typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));

template <class To, class From>
FASTFT_HD To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// What compilers make of these three with the widest registers takes several times as long.
#if defined(__AVX512F__)
FASTFT_HD Words widened_words(Halves x) {
  return bit_cast<Words>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(x)));
}
FASTFT_HD Halves narrowed(Words x) {
  return bit_cast<Halves>(_mm512_cvtepi32_epi16(bit_cast<__m512i>(x)));
}
#elif defined(__AVX2__)
FASTFT_HD Words widened_words(Halves x) {
  return bit_cast<Words>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(x)));
}
FASTFT_HD Halves narrowed(Words x) {
  const __m256i words = bit_cast<__m256i>(x), packed = _mm256_packus_epi32(words, words);
  return bit_cast<Halves>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}
#else
FASTFT_HD Words widened_words(Halves x) { return __builtin_convertvector(x, Words); }
FASTFT_HD Halves narrowed(Words x) { return __builtin_convertvector(x, Halves); }
#endif

FASTFT_HD Floats broadcast(float x) {
#if defined(FASTFT_WIDE)
  return FASTFT_OF_WIDE(set1_ps)(x);
#else
  return Floats{x, x, x, x};
#endif
}

// The larger of each two; b where one of them is NaN.
FASTFT_HD Floats larger(Floats a, Floats b) {
#if defined(FASTFT_WIDE)
  return FASTFT_OF_WIDE(max_ps)(a, b);
#else
  return a > b ? a : b;
#endif
}

#if !defined(FASTFT_WIDE)
FASTFT_HD float fused_one(float a, float b, float c) {
#if defined(__FP_FAST_FMAF)
  return __builtin_fmaf(a, b, c);
#else
  // In double the product is exact. Where the rounded sum lies in the middle of two floats and the
  // exact one does not, it is moved to the exact one's side.
  const double product = static_cast<double>(a) * b, addend = c, sum = product + addend;
  const double added = sum - product, lost = (product - (sum - added)) + (addend - added);
  int64_t bits = bit_cast<int64_t>(sum);
  if ((bits & 0x1fffffff) == 0x10000000 && lost != 0.0)
    bits += (lost < 0.0) == (sum < 0.0) ? 1 : -1;
  return static_cast<float>(bit_cast<double>(bits));
#endif
}
#endif

// a b + c, rounded once.
FASTFT_HD Floats fused(Floats a, Floats b, Floats c) {
#if defined(FASTFT_WIDE)
  return FASTFT_OF_WIDE(fmadd_ps)(a, b, c);
#else
  Floats sum;
  for (int k = 0; k < kWidth; k++) sum[k] = fused_one(a[k], b[k], c[k]);
  return sum;
#endif
}

// a b + c, rounded once where the instruction set does so.
FASTFT_HD Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(FASTFT_WIDE)
  return fused(a, b, c);
#else
  return a * b + c;
#endif
}

// Numbers kept as float32 or as bfloat16, of which a uint16_t has the bits.
FASTFT_HD Floats load(const float* p) {
  Floats x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
FASTFT_HD Floats load(const uint16_t* p) {
  Halves x;
  __builtin_memcpy(&x, p, sizeof x);
  return bit_cast<Floats>(widened_words(x) << 16);
}
FASTFT_HD void store(float* p, Floats x) { __builtin_memcpy(p, &x, sizeof x); }
FASTFT_HD void store(uint16_t* p, Floats x) {
#if defined(__AVX512BF16__)
  constexpr int kSubnormal = 0x20;  // which the unit would take for 0
  if (__builtin_expect(_mm512_fpclass_ps_mask(x, kSubnormal) == 0, 1)) {
    const auto nearest = _mm512_cvtneps_pbh(x);
    __builtin_memcpy(p, &nearest, sizeof nearest);
    return;
  }
#endif
  const Words rounded = bf16_nearest_sum(bit_cast<Words>(x)) >> 16;
  const Words quiet_nan = rounded - rounded + 0x7fc0;
  const Halves halves = narrowed(x == x ? rounded : quiet_nan);
  __builtin_memcpy(p, &halves, sizeof halves);
}

// What is left behind the last whole register.
template <class T>
struct Rest {
  T values[kWidth] = {};
  size_t bytes;

  explicit Rest(int64_t count) : bytes(size_t(count) * sizeof(T)) {}
  Floats read(const T* from) {
    __builtin_memcpy(values, from, bytes);
    return load(values);
  }
  void write(T* to, Floats x) {
    store(values, x);
    __builtin_memcpy(to, values, bytes);
  }
};

FASTFT_HD void put(float* p, float x) { *p = x; }
FASTFT_HD void put(uint16_t* p, float x) { *p = bf16_nearest(x); }

// exp for x <= 0, within 1 ulp: 2^n * e^r with Cephes' minimax polynomial for e^r. Below -87,
// where it is near the smallest normal number, it is 0; NaN stays NaN.
FASTFT_HD Floats exp_negative(Floats x) {
  constexpr float kSmallest = -87.0f;
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  const Floats zero = {}, clamped = larger(zero + kSmallest, x);
  const Floats shifted = fused(clamped, zero + 1.44269504f, zero + kRound);
  const Floats n = shifted - kRound;
  const Floats r = fused(n, zero + 2.12194440e-4f, fused(n, zero - 0.693359375f, clamped));
  Floats p = fused(r, zero + 1.9875691500e-4f, zero + 1.3981999507e-3f);
  p = fused(p, r, zero + 8.3334519073e-3f);
  p = fused(p, r, zero + 4.1665795894e-2f);
  p = fused(p, r, zero + 1.6666665459e-1f);
  p = fused(p, r, zero + 5.0000001201e-1f);
  p = fused(p, r * r, r) + 1.0f;
  const Words power = (bit_cast<Words>(shifted) + (127u - 0x4b400000u)) << 23;
  return x < kSmallest ? zero : p * bit_cast<Floats>(power);
}

// tanh within 2 ulp: Cephes' polynomial near zero, where 1 - e^(-2x) would cancel.
FASTFT_HD Floats hyperbolic_tangent(Floats x) {
  const Floats size = x < 0.0f ? -x : x, square = x * x;
  const Floats zero = {};
  Floats p = fused(square, zero - 5.70498872745e-3f, zero + 2.06390887954e-2f);
  p = fused(p, square, zero - 5.37397155531e-2f);
  p = fused(p, square, zero + 1.33314422036e-1f);
  p = fused(p, square, zero - 3.33332819422e-1f);
  const Floats small = fused(p * square, x, x), e = exp_negative(size * -2.0f);
  const Floats large = (1.0f - e) / (1.0f + e);
  return size < 0.625f ? small : (x < 0.0f ? -large : large);
}
}  // namespace
