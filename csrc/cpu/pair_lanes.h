// Thirty-two floats at once with AVX-512, where what is read and written has 16 bits: a register of
// 32-bit words has two of these each, of which the lower become floats by one operation and the
// upper by another, and pairs again by a blend. Compilers widen and narrow half a register at a
// time. Where floats are read and written too, one permutation of the 16-bit values puts the lower
// halves of all words before the upper ones. Every function has the bits of its scalar namesake in
// adamw_math.h.
#pragma once
#include "adamw_math.h"
#include "wide.h"

#if defined(__AVX512F__)
#define FASTFT_PAIR_LANES

// Without `ordered` elements come as they lie in the words, for which all must be 16-bit values.
template <bool ordered>
struct PairLanes {
  static constexpr int kCount = 32;
  __m512 lower, upper;  // the halves of each word
  PairLanes() = default;
  inline __attribute__((always_inline)) PairLanes(__m512 lower, __m512 upper)
      : lower(lower), upper(upper) {}
  inline __attribute__((always_inline)) explicit PairLanes(float value)
      : lower(_mm512_set1_ps(value)), upper(lower) {}
};

template <bool ordered>
FASTFT_HD PairLanes<ordered> ft_mul(PairLanes<ordered> a, PairLanes<ordered> b) {
  return {_mm512_mul_ps(a.lower, b.lower), _mm512_mul_ps(a.upper, b.upper)};
}
template <bool ordered>
FASTFT_HD PairLanes<ordered> ft_add(PairLanes<ordered> a, PairLanes<ordered> b) {
  return {_mm512_add_ps(a.lower, b.lower), _mm512_add_ps(a.upper, b.upper)};
}
template <bool ordered>
FASTFT_HD PairLanes<ordered> ft_sub(PairLanes<ordered> a, PairLanes<ordered> b) {
  return {_mm512_sub_ps(a.lower, b.lower), _mm512_sub_ps(a.upper, b.upper)};
}
template <bool ordered>
FASTFT_HD PairLanes<ordered> ft_div(PairLanes<ordered> a, PairLanes<ordered> b) {
  return {_mm512_div_ps(a.lower, b.lower), _mm512_div_ps(a.upper, b.upper)};
}
template <bool ordered>
FASTFT_HD PairLanes<ordered> ft_sqrt(PairLanes<ordered> a) {
  return {_mm512_sqrt_ps(a.lower), _mm512_sqrt_ps(a.upper)};
}
template <bool ordered>
FASTFT_HD PairLanes<ordered> ft_fma(PairLanes<ordered> a, PairLanes<ordered> b,
                                    PairLanes<ordered> c) {
  return {_mm512_fmadd_ps(a.lower, b.lower, c.lower), _mm512_fmadd_ps(a.upper, b.upper, c.upper)};
}

FASTFT_HD __m512 pair_larger(__m512 a, __m512 b) {
  const __mmask16 is_a =
      _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) | _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  return _mm512_mask_mov_ps(b, is_a, a);
}
template <bool ordered>
FASTFT_HD PairLanes<ordered> ft_larger(PairLanes<ordered> a, PairLanes<ordered> b) {
  return {pair_larger(a.lower, b.lower), pair_larger(a.upper, b.upper)};
}

// Which 16-bit value goes where, that the lower halves of all words come before the upper ones, and
// the way back.
FASTFT_HD __m512i pair_order() {
  alignas(64) static constexpr uint16_t order[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                     21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                     11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_load_si512(order);
}
FASTFT_HD __m512i pair_order_back() {
  alignas(64) static constexpr uint16_t order[32] = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20,
                                                     22, 24, 26, 28, 30, 1,  3,  5,  7,  9,  11,
                                                     13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
  return _mm512_load_si512(order);
}

template <bool ordered>
FASTFT_HD __m512i pair_read(const void* from) {
  const __m512i read = _mm512_loadu_si512(from);
  return ordered ? _mm512_permutexvar_epi16(pair_order(), read) : read;
}
template <bool ordered>
FASTFT_HD void pair_write(__m512i words, void* to) {
  _mm512_storeu_si512(to, ordered ? _mm512_permutexvar_epi16(pair_order_back(), words) : words);
}

// Words of which each has the upper halves of a word of `lower` and of one of `upper`.
template <bool ordered>
FASTFT_HD void pair_write_upper(__m512i lower, __m512i upper, void* to) {
  const __m512i low = _mm512_srli_epi32(lower, 16);
  pair_write<ordered>(_mm512_mask_blend_epi16(0xaaaaaaaa, low, upper), to);
}

FASTFT_HD __m512i pair_lower_bits(__m512i read) { return _mm512_slli_epi32(read, 16); }
FASTFT_HD __m512i pair_upper_bits(__m512i read) {
  return _mm512_and_si512(read, _mm512_set1_epi32(-0x10000));
}

FASTFT_HD __m512 pair_or(__m512 a, __m512 otherwise) {
  return _mm512_mask_mov_ps(a, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), otherwise);
}

// The bits of values, the same for every NaN: rounding would make Inf or 0 of some.
FASTFT_HD __m512i pair_bits(__m512 value) {
  return _mm512_castps_si512(pair_or(value, _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000))));
}

template <bool ordered>
FASTFT_HD void load(const float* from, PairLanes<ordered>* to) {
  *to = {_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16)};
}
template <bool ordered>
FASTFT_HD void store(PairLanes<ordered> value, float* to) {
  _mm512_storeu_ps(to, value.lower);
  _mm512_storeu_ps(to + 16, value.upper);
}

template <bool ordered>
FASTFT_HD void load(const uint16_t* from, PairLanes<ordered>* to) {
  const __m512i read = pair_read<ordered>(from);
  *to = {_mm512_castsi512_ps(pair_lower_bits(read)), _mm512_castsi512_ps(pair_upper_bits(read))};
}

template <bool ordered>
FASTFT_HD void store_nearest(PairLanes<ordered> value, uint16_t* to) {
  const auto sum = [](__m512 value) __attribute__((always_inline)) {
    const __m512i bits = pair_bits(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  };
  pair_write_upper<ordered>(sum(value.lower), sum(value.upper), to);
}

template <bool ordered>
FASTFT_HD void store_stochastic(PairLanes<ordered> value, const uint16_t* random, uint16_t* to) {
  const __m512i read = pair_read<ordered>(random);
  const __m512i lower = _mm512_and_si512(read, _mm512_set1_epi32(0xffff));
  pair_write_upper<ordered>(_mm512_add_epi32(pair_bits(value.lower), lower),
                            _mm512_add_epi32(pair_bits(value.upper), _mm512_srli_epi32(read, 16)),
                            to);
}

template <bool ordered>
FASTFT_HD void load_master(const uint16_t* param, const int16_t* remainder,
                           PairLanes<ordered>* to) {
  const __m512i words = pair_read<ordered>(param), rest = pair_read<ordered>(remainder);
  const __m512i lower = pair_lower_bits(words), upper = pair_upper_bits(words);
  const __m512i lower_rest = _mm512_srai_epi32(_mm512_slli_epi32(rest, 16), 16);
  const __m512i upper_rest = _mm512_srai_epi32(rest, 16);
  *to = {
      pair_or(_mm512_castsi512_ps(_mm512_add_epi32(lower, lower_rest)), _mm512_castsi512_ps(lower)),
      pair_or(_mm512_castsi512_ps(_mm512_add_epi32(upper, upper_rest)),
              _mm512_castsi512_ps(upper))};
}

template <bool ordered>
FASTFT_HD void store_master(PairLanes<ordered> value, uint16_t* param, int16_t* remainder) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  const __m512i lower = pair_bits(value.lower), upper = pair_bits(value.upper);
  pair_write_upper<ordered>(_mm512_add_epi32(lower, half), _mm512_add_epi32(upper, half), param);
  const __m512i upper_rest = _mm512_slli_epi32(upper, 16);
  pair_write<ordered>(_mm512_mask_blend_epi16(0xaaaaaaaa, lower, upper_rest), remainder);
}

FASTFT_HD __m512 pair_finite(__m512 value) {
  const __mmask16 is_finite =
      _mm512_cmp_ps_mask(_mm512_sub_ps(value, value), _mm512_setzero_ps(), _CMP_EQ_OQ);
  return _mm512_maskz_mov_ps(is_finite, value);
}
template <bool ordered>
FASTFT_HD PairLanes<ordered> finite_or_zero(PairLanes<ordered> value) {
  return {pair_finite(value.lower), pair_finite(value.upper)};
}
#endif
