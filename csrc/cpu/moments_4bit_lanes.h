// A block of 4-bit first moments and 8-bit second ones to and from floats with AVX2 and AVX-512:
// the bits of moments_4bit.h, in the manner of moments_8bit_lanes.h. Blocks that are rare are left
// to the former here too, by false: those with Inf or NaN, or a scale whose reciprocal may overflow
// or whose moments may be denormal.
#pragma once
#include "moments_4bit.h"
#include "moments_8bit_lanes.h"

#if defined(FASTFT_WIDE)
#if defined(__AVX512F__)
// What a block's codes of v stand for. One that is 24 higher stands for v 4 times as large, whose
// root is twice as large: so roots are drawn of the lowest 24 alone, and looked up by a code's
// place, which is then added to their bits for the power of 2.
struct KeptV {
  WideInt step;  // what 24 add to a place besides themselves
  WideInt v[2], root[2];
};

// The rest of a code by 24 in the lowest bits, and how many 24s it has in the topmost byte.
FASTFT_HD WideInt place_of(WideInt sq_codes, const KeptV& kept) {
  const WideInt times = _mm512_srli_epi32(_mm512_mullo_epi16(sq_codes, wide(171u)), 12);
  return wide_add(sq_codes, _mm512_mullo_epi32(times, kept.step));
}
FASTFT_HD WideInt half_of(WideInt place) { return _mm512_srli_epi32(place, 1); }

FASTFT_HD KeptV kept_v(float sq_scale) {
  KeptV kept;
  kept.step = wide((sq_scale == 0.0f ? 0u : 1u << 24) - 24u);
  WideInt place = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int half = 0; half < 2; half++, place = wide_add(place, wide(16u))) {
    const Wide v = exp_avg_sq_decode(place, wide(sq_scale));
    kept.v[half] = _mm512_sub_epi32(as_bits(v), place);
    kept.root[half] = _mm512_sub_epi32(as_bits(_mm512_sqrt_ps(v)), half_of(place));
  }
  return kept;
}

FASTFT_HD Wide looked_up(const WideInt (&table)[2], WideInt place, WideInt added) {
  return as_floats(wide_add(_mm512_permutex2var_epi32(table[0], place, table[1]), added));
}
FASTFT_HD Wide v_of(WideInt sq_codes, const KeptV& kept) {
  const WideInt place = place_of(sq_codes, kept);
  return looked_up(kept.v, place, place);
}
FASTFT_HD Wide root_of(WideInt sq_codes, const KeptV& kept) {
  const WideInt place = place_of(sq_codes, kept);
  return looked_up(kept.root, place, half_of(place));
}

// The codes of 16 elements, each by 1/7.
FASTFT_HD Wide nibble_sevenths(const uint8_t* bytes) {
  const float s = 1.0f / kNibbleMost, nan = bits_float(0x7fc00000u);
  const Wide of_code = _mm512_setr_ps(0 * s, 1 * s, 2 * s, 3 * s, 4 * s, 5 * s, 6 * s, 7 * s, nan,
                                      -7 * s, -6 * s, -5 * s, -4 * s, -3 * s, -2 * s, -1 * s);
  const WideInt pairs =
      _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
  return _mm512_permutexvar_ps(pairs | _mm512_slli_epi64(pairs, 28), of_code);
}

FASTFT_HD WideInt wide_ceil(Wide value) {
  return _mm512_cvt_roundps_epi32(value, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
}

FASTFT_HD void store_nibbles(const WideInt (&code)[2], uint8_t* bytes) {
  for (int k = 0; k < 2; k++) {
    const WideInt even = code[k] & wide(15u);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(bytes + 8 * k),
                     _mm512_cvtepi64_epi8(even | _mm512_srli_epi64(even, 28)));
  }
}
#else
struct KeptV {
  Wide scale;
};
FASTFT_HD KeptV kept_v(float sq_scale) { return {wide(sq_scale)}; }
FASTFT_HD Wide v_of(WideInt sq_codes, const KeptV& kept) {
  return exp_avg_sq_decode(sq_codes, kept.scale);
}
FASTFT_HD Wide root_of(WideInt sq_codes, const KeptV& kept) {
  return _mm256_sqrt_ps(v_of(sq_codes, kept));
}

// The codes of 8 elements, each by 1/7.
FASTFT_HD Wide nibble_sevenths(const uint8_t* bytes) {
  const float s = 1.0f / kNibbleMost, nan = bits_float(0x7fc00000u);
  const Wide positive = _mm256_setr_ps(0 * s, 1 * s, 2 * s, 3 * s, 4 * s, 5 * s, 6 * s, 7 * s);
  const Wide negative = _mm256_setr_ps(nan, -7 * s, -6 * s, -5 * s, -4 * s, -3 * s, -2 * s, -1 * s);
  int32_t read;
  memcpy(&read, bytes, sizeof read);
  const WideInt pairs = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(read));
  const WideInt code = pairs | _mm256_slli_epi64(pairs, 28);
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(positive, code),
                          _mm256_permutevar8x32_ps(negative, code),
                          as_floats(_mm256_slli_epi32(code, 28)));
}

FASTFT_HD WideInt wide_ceil(Wide value) { return _mm256_cvtps_epi32(_mm256_ceil_ps(value)); }

FASTFT_HD void store_nibbles(const WideInt (&code)[4], uint8_t* bytes) {
  const WideInt nibbles = packed_codes(code) & _mm256_set1_epi8(15);
  const WideInt pairs = _mm256_maddubs_epi16(nibbles, _mm256_set1_epi16(16 << 8 | 1));
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(bytes),
      _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1)));
}
#endif

// For `n` codes, a multiple of kCodesTogether.
FASTFT_HD void decode_nibbles(const uint8_t* bytes, const uint8_t* sq_codes, float scale,
                              float sq_scale, int n, float* m, float* v) {
  const KeptV kept = kept_v(sq_scale);
  for (int i = 0; i < n; i += kWide) {
    const WideInt codes = wide_unsigned(sq_codes + i);
    const Wide root = wide_mul(wide(scale), root_of(codes, kept));
    FASTFT_OF_WIDE(storeu_ps)(m + i, wide_mul(nibble_sevenths(bytes + i / 2), root));
    FASTFT_OF_WIDE(storeu_ps)(v + i, v_of(codes, kept));
  }
}

static bool decode_block(const uint8_t* bytes, const uint8_t* sq_codes, float scale, float sq_scale,
                         int n, float* m, float* v) {
  if (!plain_scale(float_bits(sq_scale))) return false;
  const int left = n % kCodesTogether, whole = n - left;
  decode_nibbles(bytes, sq_codes, scale, sq_scale, whole, m, v);
  if (left) {
    uint8_t last[kCodesTogether / 2], sq_last[kCodesTogether] = {};
    float last_m[kCodesTogether], last_v[kCodesTogether];
    memcpy(last, bytes + whole / 2, size_t(nibble_bytes_of_row(left)));
    memcpy(sq_last, sq_codes + whole, size_t(left));
    decode_nibbles(last, sq_last, scale, sq_scale, kCodesTogether, last_m, last_v);
    memcpy(m + whole, last_m, size_t(left) * 4), memcpy(v + whole, last_v, size_t(left) * 4);
  }
  return true;
}

// Rounded up but where the random share of a place is no less than the rest.
FASTFT_HD WideInt nibble_encode(Wide m, Wide ratio, Wide reciprocal, WideInt random) {
  const Wide y = wide_mul(wide_mul(ratio, reciprocal), wide((float)kNibbleMost));
  const Wide most = wide_min(y, wide((float)kNibbleMost));
  return wide_with_sign(wide_ceil(wide_sub(most, random_share(random))), m);
}

// For `n` moments, a multiple of kCodesTogether.
FASTFT_HD bool encode_nibbles(const float* m, const float* v, const uint16_t* bits, int n,
                              uint8_t* bytes, uint8_t* sq_codes, float* scale, float* sq_scale) {
  LargestBits largest;
  for (int i = 0; i < n; i += kCodesTogether) largest.take(m + i, v + i);
  const uint32_t v_scale = wide_largest(largest.v);
  if (wide_largest(largest.m) >= 0x7f800000u || !plain_scale(v_scale)) return false;
  *sq_scale = bits_float(v_scale);
  const Wide sq_reciprocal = wide(v_scale ? 1.0f / *sq_scale : 1.0f);
  // where all of v is zero, so are the ratios
  const KeptV kept = kept_v(v_scale ? *sq_scale : 1.0f);
  const WideInt size = wide(v_scale ? 0x7fffffffu : 0u);
  float ratios[kMomentBlock];
  WideInt most = wide(0u), code[kCodesTogether / kWide];
  for (int i = 0; i < n; i += kCodesTogether) {
    for (int k = 0, j = i; k < kCodesTogether / kWide; k++, j += kWide) {
      code[k] =
          exp_avg_sq_encode(FASTFT_OF_WIDE(loadu_ps)(v + j), sq_reciprocal, wide_random(bits + j));
      const Wide value = as_floats(as_bits(FASTFT_OF_WIDE(loadu_ps)(m + j)) & size);
      const Wide ratio = wide_min(FASTFT_OF_WIDE(div_ps)(value, root_of(code[k], kept)),
                                  wide(FASTFT_LARGEST_FLOAT));
      FASTFT_OF_WIDE(storeu_ps)(ratios + j, ratio);
      most = wide_max_bits(most, as_bits(ratio));
    }
    store_sq_codes(code, sq_codes + i);
  }
  const uint32_t m_scale = wide_largest(most);
  if (!plain_scale(m_scale)) return false;
  *scale = bits_float(m_scale);
  const Wide reciprocal = wide(m_scale ? 1.0f / *scale : 1.0f);
  for (int i = 0; i < n; i += kCodesTogether) {
    for (int k = 0, j = i; k < kCodesTogether / kWide; k++, j += kWide)
      code[k] = nibble_encode(FASTFT_OF_WIDE(loadu_ps)(m + j), FASTFT_OF_WIDE(loadu_ps)(ratios + j),
                              reciprocal, wide_random(bits + j));
    store_nibbles(code, bytes + i / 2);
  }
  return true;
}

static bool encode_block(const float* m, const float* v, const uint16_t* bits, int n,
                         uint8_t* bytes, uint8_t* sq_codes, float* scale, float* sq_scale) {
  if (n % kCodesTogether == 0)
    return encode_nibbles(m, v, bits, n, bytes, sq_codes, scale, sq_scale);
  float all_m[kMomentBlock] = {}, all_v[kMomentBlock] = {};
  uint16_t all_bits[kMomentBlock] = {};
  uint8_t all[kMomentBlock / 2], sq_all[kMomentBlock];
  memcpy(all_m, m, size_t(n) * 4), memcpy(all_v, v, size_t(n) * 4);
  memcpy(all_bits, bits, size_t(n) * 2);
  const int up = n + kCodesTogether - n % kCodesTogether;
  if (!encode_nibbles(all_m, all_v, all_bits, up, all, sq_all, scale, sq_scale)) return false;
  memcpy(bytes, all, size_t(nibble_bytes_of_row(n))), memcpy(sq_codes, sq_all, size_t(n));
  return true;
}
#else
static inline bool decode_block(const uint8_t*, const uint8_t*, float, float, int, float*, float*) {
  return false;
}
static inline bool encode_block(const float*, const float*, const uint16_t*, int, uint8_t*,
                                uint8_t*, float*, float*) {
  return false;
}
#endif
