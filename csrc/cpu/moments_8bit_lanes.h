// 8-bit moments of a block to and from floats, eight at a time with AVX2: compilers do the widths of 8, 16 and 32 bits
// one by one. The bits of moments_8bit.h. Blocks that are rare are left to it: both functions return false, with
// nothing done, for a size that is not a multiple of 32, for the code of NaN, for Inf and NaN, for a scale whose
// reciprocal may overflow.
#pragma once
#include "moments_8bit.h"

#if defined(__AVX2__) && !defined(__AVX512F__)
#include <immintrin.h>

FASTFT_HD __m256 exp_avg_decode(const int8_t* codes, __m256 scale) {
  const __m256i code = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
  const __m256 root = _mm256_mul_ps(_mm256_cvtepi32_ps(code), _mm256_set1_ps(1.0f / 127.0f));
  const __m256 size = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), root);
  return _mm256_mul_ps(_mm256_mul_ps(_mm256_mul_ps(root, size), _mm256_mul_ps(root, root)), scale);
}

FASTFT_HD __m256 exp_avg_sq_decode(const uint8_t* codes, __m256 scale) {
  const __m128i code = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
  const __m128i octave = _mm_srli_epi16(_mm_mullo_epi16(code, _mm_set1_epi16(171)), 11);  // code / 12
  const __m128i place =
      _mm_sub_epi16(_mm_add_epi16(code, _mm_set1_epi16(kSqOctave)), _mm_mullo_epi16(octave, _mm_set1_epi16(kSqOctave)));
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtepu16_epi32(octave), _mm256_set1_epi32(127));
  const __m256 units = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(place)),
                                     _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  return _mm256_mul_ps(_mm256_mul_ps(units, _mm256_set1_ps(1.0f / (kSqOctave * FASTFT_EXP_AVG_SQ_UNITS))), scale);
}

static bool decode_block(const int8_t* codes, const uint8_t* sq_codes, float scale, float sq_scale, int n, float* m,
                         float* v) {
  __m256i spoilt = _mm256_setzero_si256();
  if (n % 32) return false;
  for (int i = 0; i < n; i += 32) {
    const __m256i read = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i));
    spoilt = _mm256_or_si256(spoilt, _mm256_cmpeq_epi8(read, _mm256_set1_epi8(kExpAvgNan)));
  }
  if (_mm256_movemask_epi8(spoilt)) return false;
  const __m256 scales = _mm256_set1_ps(scale), sq_scales = _mm256_set1_ps(sq_scale);
  for (int i = 0; i < n; i += 8) _mm256_storeu_ps(m + i, exp_avg_decode(codes + i, scales));
  for (int i = 0; i < n; i += 8) _mm256_storeu_ps(v + i, exp_avg_sq_decode(sq_codes + i, sq_scales));
  return true;
}

FASTFT_HD __m256i lanes_random(const uint16_t* bits) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bits)));
}

FASTFT_HD __m256i exp_avg_encode(const float* from, __m256 reciprocal, const uint16_t* bits) {
  const __m256 m = _mm256_loadu_ps(from), one = _mm256_set1_ps(1.0f);
  const __m256 share = _mm256_mul_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), m), reciprocal);
  const __m256 x = _mm256_mul_ps(share, _mm256_set1_ps(FASTFT_EXP_AVG_UNITS));
  const __m256i floor = _mm256_cvttps_epi32(_mm256_sqrt_ps(_mm256_sqrt_ps(x)));
  const __m256i low = _mm256_min_epi32(floor, _mm256_set1_epi32(126));
  const __m256 root = _mm256_cvtepi32_ps(low), next = _mm256_add_ps(root, one);
  const __m256 root2 = _mm256_mul_ps(root, root), next2 = _mm256_mul_ps(next, next);  // exact, as the integers'
  const __m256 below = _mm256_mul_ps(root2, root2), above = _mm256_mul_ps(next2, next2);
  const __m256 drawn = _mm256_mul_ps(_mm256_cvtepi32_ps(lanes_random(bits)), _mm256_sub_ps(above, below));
  const __m256 needed = _mm256_mul_ps(_mm256_sub_ps(x, below), _mm256_set1_ps(65536.0f));
  const __m256i up = _mm256_castps_si256(_mm256_cmp_ps(drawn, needed, _CMP_LT_OQ));
  return _mm256_sign_epi32(_mm256_sub_epi32(low, up), _mm256_castps_si256(m));
}

FASTFT_HD __m256i exp_avg_sq_encode(const float* from, __m256 reciprocal, const uint16_t* bits) {
  const __m256 most = _mm256_set1_ps(FASTFT_EXP_AVG_SQ_UNITS), one = _mm256_set1_ps(1.0f);
  const __m256 units = _mm256_mul_ps(_mm256_mul_ps(_mm256_loadu_ps(from), reciprocal), most);
  const __m256i place =
      _mm256_sub_epi32(_mm256_castps_si256(_mm256_max_ps(_mm256_min_ps(units, most), one)), _mm256_castps_si256(one));
  const __m256i twelve = _mm256_add_epi32(_mm256_slli_epi32(place, 3), _mm256_slli_epi32(place, 2));
  return _mm256_srli_epi32(_mm256_add_epi32(twelve, _mm256_slli_epi32(lanes_random(bits), 7)), 23);
}

// Four registers of one code in each 32 bits as 32 codes in order, of which packing leaves the quarters mixed.
FASTFT_HD void store_codes(__m256i packed, void* to) {
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(static_cast<__m256i*>(to), _mm256_permutevar8x32_epi32(packed, order));
}

FASTFT_HD float lanes_maximum(__m256 values) {
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

static bool encode_block(const float* m, const float* v, const uint16_t* bits, const uint16_t* sq_bits, int n,
                         int8_t* codes, uint8_t* sq_codes, float* scale, float* sq_scale) {
  if (n % 32) return false;
  __m256 largest = _mm256_setzero_ps(), largest_sq = largest, spoilt = largest;
  for (int i = 0; i < n; i += 8) {
    const __m256 value = _mm256_loadu_ps(m + i), sq = _mm256_loadu_ps(v + i);
    largest = _mm256_max_ps(largest, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), value));
    largest_sq = _mm256_max_ps(largest_sq, sq);
    spoilt = _mm256_add_ps(spoilt, _mm256_add_ps(_mm256_sub_ps(value, value), _mm256_sub_ps(sq, sq)));
  }
  const float m_scale = lanes_maximum(largest), v_scale = lanes_maximum(largest_sq);
  if (_mm256_movemask_ps(_mm256_cmp_ps(spoilt, spoilt, _CMP_UNORD_Q))) return false;
  if (m_scale < FASTFT_SMALL_SCALE || v_scale < FASTFT_SMALL_SCALE) return false;
  *scale = m_scale, *sq_scale = v_scale;
  const __m256 reciprocal = _mm256_set1_ps(1.0f / m_scale), sq_reciprocal = _mm256_set1_ps(1.0f / v_scale);
  for (int i = 0; i < n; i += 32) {
    __m256i code[4];
    for (int k = 0; k < 4; k++) code[k] = exp_avg_encode(m + i + 8 * k, reciprocal, bits + i + 8 * k);
    const __m256i low = _mm256_packs_epi32(code[0], code[1]), high = _mm256_packs_epi32(code[2], code[3]);
    store_codes(_mm256_packs_epi16(low, high), codes + i);
    for (int k = 0; k < 4; k++) code[k] = exp_avg_sq_encode(v + i + 8 * k, sq_reciprocal, sq_bits + i + 8 * k);
    const __m256i sq_low = _mm256_packus_epi32(code[0], code[1]), sq_high = _mm256_packus_epi32(code[2], code[3]);
    store_codes(_mm256_packus_epi16(sq_low, sq_high), sq_codes + i);
  }
  return true;
}
#else
static inline bool decode_block(const int8_t*, const uint8_t*, float, float, int, float*, float*) { return false; }
static inline bool encode_block(const float*, const float*, const uint16_t*, const uint16_t*, int, int8_t*, uint8_t*,
                                float*, float*) {
  return false;
}
#endif
