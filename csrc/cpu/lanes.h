// Sixteen floats at once with AVX2, by hand where compilers spend half of a loop on getting from 16
// bits to 32 and back. Unpacking and packing work within halves of a register: where floats are
// read and written too, a register of 16-bit values is read with its quarters in the order 0 2 1 3,
// which keeps the elements in order. Every function has the bits of its scalar namesake in
// adamw_math.h.
#pragma once
#include "adamw_math.h"

#if defined(__AVX2__) && !defined(__AVX512F__)
#include <immintrin.h>
#define FASTFT_LANES 16

// Without `ordered` elements come as 16-bit values are unpacked, of which all must be.
template <bool ordered>
struct Lanes {
  __m256 low, high;
  Lanes() = default;
  inline __attribute__((always_inline)) Lanes(__m256 low, __m256 high) : low(low), high(high) {}
  inline __attribute__((always_inline)) explicit Lanes(float value)
      : low(_mm256_set1_ps(value)), high(low) {}
};

template <bool ordered>
FASTFT_HD Lanes<ordered> ft_mul(Lanes<ordered> a, Lanes<ordered> b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
template <bool ordered>
FASTFT_HD Lanes<ordered> ft_add(Lanes<ordered> a, Lanes<ordered> b) {
  return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
template <bool ordered>
FASTFT_HD Lanes<ordered> ft_sub(Lanes<ordered> a, Lanes<ordered> b) {
  return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}
template <bool ordered>
FASTFT_HD Lanes<ordered> ft_div(Lanes<ordered> a, Lanes<ordered> b) {
  return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
}
template <bool ordered>
FASTFT_HD Lanes<ordered> ft_sqrt(Lanes<ordered> a) {
  return {_mm256_sqrt_ps(a.low), _mm256_sqrt_ps(a.high)};
}
template <bool ordered>
FASTFT_HD Lanes<ordered> ft_fma(Lanes<ordered> a, Lanes<ordered> b, Lanes<ordered> c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}

FASTFT_HD __m256 lanes_larger(__m256 a, __m256 b) {
  const __m256 is_a =
      _mm256_or_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ), _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_blendv_ps(b, a, is_a);
}
template <bool ordered>
FASTFT_HD Lanes<ordered> ft_larger(Lanes<ordered> a, Lanes<ordered> b) {
  return {lanes_larger(a.low, b.low), lanes_larger(a.high, b.high)};
}

FASTFT_HD __m256 lanes_or(__m256 a, __m256 otherwise) {
  return _mm256_blendv_ps(a, otherwise, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
}

template <bool ordered>
FASTFT_HD __m256i lanes_read(const uint16_t* from) {
  const __m256i read = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return ordered ? _mm256_permute4x64_epi64(read, 0xD8) : read;
}
template <bool ordered>
FASTFT_HD void lanes_write(__m256i packed, uint16_t* to) {
  if (ordered) packed = _mm256_permute4x64_epi64(packed, 0xD8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), packed);
}
// The upper 16 bits of each.
template <bool ordered>
FASTFT_HD void lanes_write_upper(__m256i low, __m256i high, uint16_t* to) {
  lanes_write<ordered>(_mm256_packus_epi32(_mm256_srli_epi32(low, 16), _mm256_srli_epi32(high, 16)),
                       to);
}
template <bool ordered>
FASTFT_HD Lanes<ordered> lanes_widened(__m256i read) {
  const __m256i zero = _mm256_setzero_si256();
  return {_mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, read)),
          _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, read))};
}

// The bits of values, the same for every NaN: rounding would make Inf or 0 of some.
FASTFT_HD __m256i lanes_bits(__m256 value) {
  return _mm256_castps_si256(lanes_or(value, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000))));
}

template <bool ordered>
FASTFT_HD void load(const float* from, Lanes<ordered>* to) {
  *to = {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
}
template <bool ordered>
FASTFT_HD void load(const uint16_t* from, Lanes<ordered>* to) {
  *to = lanes_widened<ordered>(lanes_read<ordered>(from));
}
template <bool ordered>
FASTFT_HD void store(Lanes<ordered> value, float* to) {
  _mm256_storeu_ps(to, value.low);
  _mm256_storeu_ps(to + 8, value.high);
}

FASTFT_HD __m256i lanes_nearest(__m256 value) {
  const __m256i bits = lanes_bits(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
}
template <bool ordered>
FASTFT_HD void store_nearest(Lanes<ordered> value, uint16_t* to) {
  lanes_write_upper<ordered>(lanes_nearest(value.low), lanes_nearest(value.high), to);
}

template <bool ordered>
FASTFT_HD void store_stochastic(Lanes<ordered> value, const uint16_t* random, uint16_t* to) {
  const __m256i zero = _mm256_setzero_si256(), read = lanes_read<ordered>(random);
  lanes_write_upper<ordered>(
      _mm256_add_epi32(lanes_bits(value.low), _mm256_unpacklo_epi16(read, zero)),
      _mm256_add_epi32(lanes_bits(value.high), _mm256_unpackhi_epi16(read, zero)), to);
}

// With 0x8000 added to both, a remainder is the lower half of the master's bits, and needs no sign.
template <bool ordered>
FASTFT_HD void load_master(const uint16_t* param, const int16_t* remainder, Lanes<ordered>* to) {
  const __m256i half = _mm256_set1_epi32(0x8000), upper = lanes_read<ordered>(param);
  const __m256i lower =
      _mm256_xor_si256(lanes_read<ordered>(reinterpret_cast<const uint16_t*>(remainder)),
                       _mm256_set1_epi16(-0x8000));
  const __m256i low = _mm256_sub_epi32(_mm256_unpacklo_epi16(lower, upper), half);
  const __m256i high = _mm256_sub_epi32(_mm256_unpackhi_epi16(lower, upper), half);
  const Lanes<ordered> alone = lanes_widened<ordered>(upper);
  *to = {lanes_or(_mm256_castsi256_ps(low), alone.low),
         lanes_or(_mm256_castsi256_ps(high), alone.high)};
}

template <bool ordered>
FASTFT_HD void store_master(Lanes<ordered> value, uint16_t* param, int16_t* remainder) {
  const __m256i half = _mm256_set1_epi32(0x8000), zero = _mm256_setzero_si256();
  const __m256i low = _mm256_add_epi32(lanes_bits(value.low), half);
  const __m256i high = _mm256_add_epi32(lanes_bits(value.high), half);
  lanes_write_upper<ordered>(low, high, param);
  const __m256i lower = _mm256_packus_epi32(_mm256_blend_epi16(low, zero, 0xAA),
                                            _mm256_blend_epi16(high, zero, 0xAA));
  lanes_write<ordered>(_mm256_xor_si256(lower, _mm256_set1_epi16(-0x8000)),
                       reinterpret_cast<uint16_t*>(remainder));
}

FASTFT_HD __m256 lanes_finite(__m256 value) {
  const __m256 is_finite =
      _mm256_cmp_ps(_mm256_sub_ps(value, value), _mm256_setzero_ps(), _CMP_EQ_OQ);
  return _mm256_and_ps(value, is_finite);
}
template <bool ordered>
FASTFT_HD Lanes<ordered> finite_or_zero(Lanes<ordered> value) {
  return {lanes_finite(value.low), lanes_finite(value.high)};
}
#endif
