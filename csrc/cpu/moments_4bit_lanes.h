// A block of 4-bit first moments and 8-bit second ones to and from floats with AVX2 and AVX-512:
// the bits of moments_4bit.h, in the manner of moments_8bit_lanes.h. Blocks that are rare are left
// to the former here too, by false: those with Inf or NaN, or a scale whose reciprocal may overflow
// or whose moments may be denormal.
#pragma once
#include "moments_4bit.h"
#include "moments_8bit_lanes.h"

#if defined(FASTFT_WIDE)
#if defined(__AVX512F__)
// What a block's codes of v stand for, and the roots of it. A code that is 24 higher stands for v 4
// times as large, whose root is twice as large: so roots are drawn of the lowest 24 alone.
struct KeptV {
  SqTable v;
  WideInt root[2];  // of the octaves 0 and 1
};

FASTFT_HD KeptV kept_v(float sq_scale) {
  KeptV kept{sq_table(sq_scale), {}};
  const WideInt v = as_bits(kept.v.places), octave = kept.v.octaves & wide(1u << 23);
  kept.root[0] = as_bits(_mm512_sqrt_ps(as_floats(v)));
  kept.root[1] = as_bits(_mm512_sqrt_ps(as_floats(wide_add(v, octave))));
  return kept;
}

FASTFT_HD Wide root_of(WideInt parts, const KeptV& kept) {
  const WideInt low = _mm512_permutex2var_epi32(kept.root[0], sq_place(parts), kept.root[1]);
  const WideInt pairs = parts & kept.v.octaves & wide(0xff000000u);
  return as_floats(wide_add(low, _mm512_srli_epi32(pairs, 1)));
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
  SqTable v;
};
FASTFT_HD KeptV kept_v(float sq_scale) { return {sq_table(sq_scale)}; }
FASTFT_HD Wide root_of(WideInt parts, const KeptV& kept) {
  return _mm256_sqrt_ps(v_of(parts, kept.v));
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

FASTFT_HD void decode_together(const uint8_t* bytes, const uint8_t* sq_codes, Wide scale,
                               const KeptV& kept, float* m, float* v) {
  for (int i = 0; i < kCodesTogether; i += kWide) {
    const WideInt parts = sq_parts(wide_unsigned(sq_codes + i));
    const Wide root = wide_mul(scale, root_of(parts, kept));
    FASTFT_OF_WIDE(storeu_ps)(m + i, wide_mul(nibble_sevenths(bytes + i / 2), root));
    FASTFT_OF_WIDE(storeu_ps)(v + i, v_of(parts, kept.v));
  }
}

static bool decode_block(const uint8_t* bytes, const uint8_t* sq_codes, float scale, float sq_scale,
                         int n, float* m, float* v) {
  if (!plain_scale(float_bits(sq_scale))) return false;
  const KeptV kept = kept_v(sq_scale);
  const int left = n % kCodesTogether, whole = n - left;
  for (int i = 0; i < whole; i += kCodesTogether)
    decode_together(bytes + i / 2, sq_codes + i, wide(scale), kept, m + i, v + i);
  if (!left) return true;
  uint8_t last[kCodesTogether / 2] = {}, sq_last[kCodesTogether] = {};
  float last_m[kCodesTogether], last_v[kCodesTogether];
  memcpy(last, bytes + whole / 2, size_t(nibble_bytes_of_row(left)));
  memcpy(sq_last, sq_codes + whole, size_t(left));
  decode_together(last, sq_last, wide(scale), kept, last_m, last_v);
  memcpy(m + whole, last_m, size_t(left) * 4), memcpy(v + whole, last_v, size_t(left) * 4);
  return true;
}

// The codes of a block's v, and the ratios of m to the roots for which these stand. Returns the
// bits of the largest ratio.
static inline uint32_t encode_v(const float* m, const float* v, const uint16_t* bits, int n,
                                float sq_scale, uint8_t* sq_codes, float* ratios) {
  const Wide reciprocal = wide(reciprocal_of(sq_scale));
  // where all of v is zero, so are the ratios
  const KeptV kept = kept_v(sq_scale == 0.0f ? 1.0f : sq_scale);
  const WideInt size = wide(sq_scale == 0.0f ? 0u : 0x7fffffffu);
  WideInt most = wide(0u);
  const auto together = [&](const float* m, const float* v, const uint16_t* bits, uint8_t* sq_codes,
                            float* ratios) __attribute__((always_inline)) {
    WideInt code[kCodesTogether / kWide];
    for (int k = 0; k < kCodesTogether / kWide; k++) {
      code[k] = exp_avg_sq_encode(FASTFT_OF_WIDE(loadu_ps)(v + kWide * k), reciprocal,
                                  wide_random(bits + kWide * k));
      const Wide value = as_floats(as_bits(FASTFT_OF_WIDE(loadu_ps)(m + kWide * k)) & size);
      const Wide ratio = wide_min(FASTFT_OF_WIDE(div_ps)(value, root_of(sq_parts(code[k]), kept)),
                                  wide(FASTFT_LARGEST_FLOAT));
      FASTFT_OF_WIDE(storeu_ps)(ratios + kWide * k, ratio);
      most = wide_max_bits(most, as_bits(ratio));
    }
    store_sq_codes(code, sq_codes);
  };
  const int left = n % kCodesTogether, whole = n - left;
  for (int i = 0; i < whole; i += kCodesTogether)
    together(m + i, v + i, bits + i, sq_codes + i, ratios + i);
  if (left) {
    Rest rest(m + whole, v + whole, bits + whole, left);
    together(rest.m, rest.v, rest.bits, rest.sq_codes, rest.m);
    memcpy(sq_codes + whole, rest.sq_codes, size_t(left));
    memcpy(ratios + whole, rest.m, size_t(left) * 4);
  }
  return wide_largest(most);
}

// Rounded up unless the random share is no less than the rest above the code below.
FASTFT_HD WideInt nibble_encode(Wide m, Wide ratio, Wide reciprocal, WideInt random) {
  const Wide y = wide_mul(wide_mul(ratio, reciprocal), wide((float)kNibbleMost));
  const Wide most = wide_min(y, wide((float)kNibbleMost));
  return wide_with_sign(wide_ceil(wide_sub(most, random_share(random))), m);
}

FASTFT_HD void encode_together(const float* m, const float* ratios, Wide reciprocal,
                               const uint16_t* bits, uint8_t* bytes) {
  WideInt code[kCodesTogether / kWide];
  for (int k = 0; k < kCodesTogether / kWide; k++)
    code[k] = nibble_encode(FASTFT_OF_WIDE(loadu_ps)(m + kWide * k),
                            FASTFT_OF_WIDE(loadu_ps)(ratios + kWide * k), reciprocal,
                            wide_random(bits + kWide * k));
  store_nibbles(code, bytes);
}

// The codes of a block's m, whose ratios have this largest one.
static inline void encode_ratios(const float* m, const float* ratios, const uint16_t* bits, int n,
                                 float scale, uint8_t* bytes) {
  const Wide reciprocal = wide(reciprocal_of(scale));
  const int left = n % kCodesTogether, whole = n - left;
  for (int i = 0; i < whole; i += kCodesTogether)
    encode_together(m + i, ratios + i, reciprocal, bits + i, bytes + i / 2);
  if (!left) return;
  Rest rest(m + whole, ratios + whole, bits + whole, left);
  encode_together(rest.m, rest.v, reciprocal, rest.bits, rest.codes);
  memcpy(bytes + whole / 2, rest.codes, size_t(nibble_bytes_of_row(left)));
}
#else
static inline bool decode_block(const uint8_t*, const uint8_t*, float, float, int, float*, float*) {
  return false;
}
#endif
