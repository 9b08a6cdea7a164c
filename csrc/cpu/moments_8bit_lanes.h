// 8-bit moments of a block to and from floats with AVX2 and AVX-512, by hand: compilers do the
// widths of 8, 16 and 32 bits one by one. The bits of moments_8bit.h in fewer instructions. Blocks
// that are rare are left to it: those with the code of NaN, with Inf or NaN, with a scale whose
// reciprocal may overflow or be denormal.
#pragma once
#include "moments_8bit.h"
#include "wide.h"

#if defined(FASTFT_WIDE)
constexpr int kCodesTogether = 32;
// Floats from 2^23 to 2^24 are integers: adding this rounds to one.
constexpr float kToInteger = 0x1.8p23f;

FASTFT_HD Wide wide(float value) { return FASTFT_OF_WIDE(set1_ps)(value); }
FASTFT_HD WideInt wide(uint32_t value) { return FASTFT_OF_WIDE(set1_epi32)((int)value); }
FASTFT_HD Wide as_floats(WideInt bits) { return (Wide)bits; }
FASTFT_HD WideInt as_bits(Wide value) { return (WideInt)value; }
FASTFT_HD Wide wide_mul(Wide a, Wide b) { return FASTFT_OF_WIDE(mul_ps)(a, b); }
FASTFT_HD Wide wide_add(Wide a, Wide b) { return FASTFT_OF_WIDE(add_ps)(a, b); }
FASTFT_HD Wide wide_sub(Wide a, Wide b) { return FASTFT_OF_WIDE(sub_ps)(a, b); }
FASTFT_HD Wide wide_fma(Wide a, Wide b, Wide c) { return FASTFT_OF_WIDE(fmadd_ps)(a, b, c); }
FASTFT_HD Wide wide_min(Wide a, Wide b) { return FASTFT_OF_WIDE(min_ps)(a, b); }
FASTFT_HD Wide wide_max(Wide a, Wide b) { return FASTFT_OF_WIDE(max_ps)(a, b); }
FASTFT_HD WideInt wide_add(WideInt a, WideInt b) { return FASTFT_OF_WIDE(add_epi32)(a, b); }
FASTFT_HD WideInt wide_max_bits(WideInt a, WideInt b) { return FASTFT_OF_WIDE(max_epu32)(a, b); }
FASTFT_HD Wide wide_size(Wide a) { return as_floats(as_bits(a) & wide(0x7fffffffu)); }

#if defined(__AVX512F__)
FASTFT_HD WideInt wide_signed(const int8_t* codes) {
  return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
}
FASTFT_HD WideInt wide_unsigned(const uint8_t* codes) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
}
FASTFT_HD WideInt wide_random(const uint16_t* bits) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bits)));
}
FASTFT_HD Wide wide_floor(Wide value) {
  return _mm512_roundscale_ps(value, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
// An integer, or the next one where a < b, with the sign of another number.
FASTFT_HD WideInt wide_code(Wide low, Wide a, Wide b, Wide sign) {
  const __mmask16 less = _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ);
  const Wide size = _mm512_mask_add_ps(low, less, low, wide(1.0f));
  constexpr int kFirstElseThird = 0xb8;  // the third where the second has a bit, else the first
  return _mm512_cvtps_epi32(as_floats(
      _mm512_ternarylogic_epi32(as_bits(size), wide(0x80000000u), as_bits(sign), kFirstElseThird)));
}
FASTFT_HD WideInt wide_with_sign(WideInt size, Wide sign) {
  return _mm512_mask_sub_epi32(size, _mm512_movepi32_mask(as_bits(sign)), wide(0u), size);
}
FASTFT_HD WideInt wide_swapped(WideInt random) {  // bytes 0 and 1 as bytes 2 and 1
  const __m128i order = _mm_setr_epi8(-1, 1, 0, -1, -1, 5, 4, -1, -1, 9, 8, -1, -1, 13, 12, -1);
  return _mm512_shuffle_epi8(random, _mm512_broadcast_i32x4(order));
}
FASTFT_HD uint32_t wide_largest(WideInt bits) { return _mm512_reduce_max_epu32(bits); }
FASTFT_HD void store_codes(const WideInt (&code)[2], void* to) {
  __m128i* out = static_cast<__m128i*>(to);
  _mm_storeu_si128(out, _mm512_cvtepi32_epi8(code[0]));
  _mm_storeu_si128(out + 1, _mm512_cvtepi32_epi8(code[1]));
}
FASTFT_HD void store_sq_codes(const WideInt (&code)[2], void* to) { store_codes(code, to); }
#else
FASTFT_HD WideInt wide_signed(const int8_t* codes) {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
}
FASTFT_HD WideInt wide_unsigned(const uint8_t* codes) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
}
FASTFT_HD WideInt wide_random(const uint16_t* bits) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bits)));
}
FASTFT_HD Wide wide_floor(Wide value) { return _mm256_floor_ps(value); }
FASTFT_HD WideInt wide_with_sign(WideInt size, Wide sign) {
  return _mm256_sign_epi32(size, as_bits(sign));
}
// An integer, or the next one where a < b, with the sign of another number.
FASTFT_HD WideInt wide_code(Wide low, Wide a, Wide b, Wide sign) {
  const WideInt less = as_bits(_mm256_cmp_ps(a, b, _CMP_LT_OQ));
  return wide_with_sign(_mm256_sub_epi32(_mm256_cvtps_epi32(low), less), sign);
}
FASTFT_HD WideInt wide_swapped(WideInt random) {  // bytes 0 and 1 as bytes 2 and 1
  const __m128i order = _mm_setr_epi8(-1, 1, 0, -1, -1, 5, 4, -1, -1, 9, 8, -1, -1, 13, 12, -1);
  return _mm256_shuffle_epi8(random, _mm256_broadcastsi128_si256(order));
}
FASTFT_HD uint32_t wide_largest(WideInt bits) {
  __m128i four = _mm_max_epu32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
  four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0x4e));
  return (uint32_t)_mm_cvtsi128_si32(_mm_max_epu32(four, _mm_shuffle_epi32(four, 0xb1)));
}
// 32 codes in order, of which packing four registers leaves the quarters mixed.
FASTFT_HD __m256i in_order(__m256i packed) {
  return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
FASTFT_HD __m256i packed_codes(const WideInt (&code)[4]) {
  const __m256i low = _mm256_packs_epi32(code[0], code[1]);
  const __m256i high = _mm256_packs_epi32(code[2], code[3]);
  return in_order(_mm256_packs_epi16(low, high));
}
FASTFT_HD void store_codes(const WideInt (&code)[4], void* to) {
  _mm256_storeu_si256(static_cast<__m256i*>(to), packed_codes(code));
}
FASTFT_HD void store_sq_codes(const WideInt (&code)[4], void* to) {
  const __m256i low = _mm256_packus_epi32(code[0], code[1]);
  const __m256i high = _mm256_packus_epi32(code[2], code[3]);
  _mm256_storeu_si256(static_cast<__m256i*>(to), in_order(_mm256_packus_epi16(low, high)));
}
#endif

// Says whether a scale, by its bits, is 0 or a number whose reciprocal is a normal one.
FASTFT_HD bool plain_scale(uint32_t scale) {
  return scale == 0 || (scale >= float_bits(FASTFT_SMALL_SCALE) && scale <= float_bits(0x1p126f));
}

// Of plain scales. No number of a block times it is above 1: at most 1 + 2^-24, which rounds to 1.
FASTFT_HD float reciprocal_of(float scale) { return scale == 0.0f ? 1.0f : 1.0f / scale; }

FASTFT_HD Wide exp_avg_decode(const int8_t* codes, Wide scale) {
  const Wide root = wide_mul(FASTFT_OF_WIDE(cvtepi32_ps)(wide_signed(codes)), wide(1.0f / 127.0f));
  return wide_mul(wide_mul(wide_mul(root, wide_size(root)), wide_mul(root, root)), scale);
}

// v's code, 12 * octave + place, times 2^23 / 12 rounded up: the octave is where a float has its
// exponent, and the four bits below are another number for each place.
FASTFT_HD WideInt sq_parts(WideInt codes) {
  return FASTFT_OF_WIDE(mullo_epi32)(codes, wide(699051u));
}
constexpr float kSqUnit = 1.0f / (kSqOctave * FASTFT_EXP_AVG_SQ_UNITS);
FASTFT_HD WideInt sq_place(WideInt parts) { return FASTFT_OF_WIDE(srli_epi32)(parts, 19); }

#if defined(__AVX512F__)
// What the codes of a block's v stand for, whose scale is plain.
struct SqTable {
  Wide places;      // of octave 0, by those four bits
  WideInt octaves;  // the bits that an octave adds: none to 0
};

FASTFT_HD SqTable sq_table(float scale) {
  constexpr auto of = [](int place) { return float(kSqOctave + place) * kSqUnit; };
  alignas(64) static constexpr float unit[16] = {of(0), of(1), of(2), 0, of(3), of(4),  of(5),  0,
                                                 of(6), of(7), of(8), 0, of(9), of(10), of(11), 0};
  return {wide_mul(_mm512_loadu_ps(unit), wide(scale)), wide(scale == 0.0f ? 0u : 0xff800000u)};
}

FASTFT_HD Wide v_of(WideInt parts, const SqTable& table) {
  const Wide found = _mm512_permutexvar_ps(sq_place(parts), table.places);
  return as_floats(wide_add(as_bits(found), parts & table.octaves));
}
#else
struct SqTable {
  Wide scale;
};

FASTFT_HD SqTable sq_table(float scale) { return {wide(scale)}; }

// A table of 12 does not fit in a register. As a float's bits, 12 * octave + place in such units is
// 2^octave * (1 + place / 12) and at most 85 last places more: 12 times it is an integer again once
// its lower bits are cut off.
FASTFT_HD Wide v_of(WideInt parts, const SqTable& table) {
  const Wide twelfth = as_floats(wide_add(parts, wide(float_bits(1.0f))));
  const WideInt units = as_bits(wide_mul(twelfth, wide(float(kSqOctave)))) & wide(0xfff80000u);
  return wide_mul(wide_mul(as_floats(units), wide(kSqUnit)), table.scale);
}
#endif

// The random numbers / 2^16.
FASTFT_HD Wide random_share(WideInt random) {
  return wide_sub(as_floats(random | wide(0x43000000u)), wide(128.0f));
}

// `share` of the scale is in units, `fourth_root` its own.
FASTFT_HD WideInt exp_avg_encode(Wide m, Wide share, Wide fourth_root, WideInt random) {
  const Wide low = wide_floor(fourth_root), next = wide_add(low, wide(1.0f));
  const Wide square = wide_mul(low, low), next_square = wide_mul(next, next);
  const Wide below = wide_mul(square, square), above = wide_mul(next_square, next_square);
  const Wide step = wide_mul(random_share(random), wide_sub(above, below));
  return wide_code(low, step, wide_sub(share, below), m);
}

// One operation, where compilers that see the number make three of it.
FASTFT_HD WideInt wide_times_24(WideInt value) {
  WideInt factor = wide(24u);
  asm("" : "+v"(factor));
  return FASTFT_OF_WIDE(mullo_epi32)(value, factor);
}

FASTFT_HD WideInt exp_avg_sq_encode(Wide v, Wide reciprocal, WideInt random) {
  const Wide units = wide_mul(wide_mul(v, reciprocal), wide(2.0f * FASTFT_EXP_AVG_SQ_UNITS));
  // 24 * (bits of units - bits of 2) + (random number, bytes swapped, << 8): the code is the
  // topmost byte. 24 * (bits of 2) is 0 modulo 2^32.
  const WideInt place = wide_times_24(as_bits(wide_max(units, wide(2.0f))));
  return FASTFT_OF_WIDE(srli_epi32)(wide_add(place, wide_swapped(random)), 24);
}

FASTFT_HD bool has_nan_code(const int8_t* codes) {
  const __m256i read = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
  return _mm256_movemask_epi8(_mm256_cmpeq_epi8(read, _mm256_set1_epi8(kExpAvgNan)));
}

FASTFT_HD void decode_together(const int8_t* codes, const uint8_t* sq_codes, Wide scale,
                               const SqTable& table, float* m, float* v) {
  for (int i = 0; i < kCodesTogether; i += kWide) {
    FASTFT_OF_WIDE(storeu_ps)(m + i, exp_avg_decode(codes + i, scale));
    FASTFT_OF_WIDE(storeu_ps)(v + i, v_of(sq_parts(wide_unsigned(sq_codes + i)), table));
  }
}

static bool decode_block(const int8_t* codes, const uint8_t* sq_codes, float scale, float sq_scale,
                         int n, float* m, float* v) {
  const int left = n % kCodesTogether, whole = n - left;
  int8_t last[kCodesTogether] = {};
  if (left) memcpy(last, codes + whole, size_t(left));
  bool spoilt = has_nan_code(last);
  for (int i = 0; i < whole; i += kCodesTogether) spoilt |= has_nan_code(codes + i);
  if (spoilt || !plain_scale(float_bits(sq_scale))) return false;
  const Wide scales = wide(scale);
  const SqTable table = sq_table(sq_scale);
  for (int i = 0; i < whole; i += kCodesTogether)
    decode_together(codes + i, sq_codes + i, scales, table, m + i, v + i);
  if (!left) return true;
  uint8_t sq_last[kCodesTogether] = {};
  float last_m[kCodesTogether], last_v[kCodesTogether];
  memcpy(sq_last, sq_codes + whole, size_t(left));
  decode_together(last, sq_last, scales, table, last_m, last_v);
  memcpy(m + whole, last_m, size_t(left) * 4), memcpy(v + whole, last_v, size_t(left) * 4);
  return true;
}

namespace {
// The last elements of a block, fewer than kCodesTogether, with zeros behind them.
struct Rest {
  float m[kCodesTogether] = {}, v[kCodesTogether] = {};
  uint16_t bits[kCodesTogether] = {};
  uint8_t codes[kCodesTogether], sq_codes[kCodesTogether];

  Rest(const float* m_of, const float* v_of, const uint16_t* bits_of, int left) {
    memcpy(m, m_of, size_t(left) * 4), memcpy(v, v_of, size_t(left) * 4);
    if (bits_of) memcpy(bits, bits_of, size_t(left) * 2);
  }
};
}  // namespace

// The bits of a block's largest moments.
struct Largest {
  uint32_t m, v;
};

static inline Largest largest_of(const float* m, const float* v, int n) {
  WideInt largest = wide(0u), largest_sq = wide(0u);
  const auto take = [&](const float* m, const float* v) __attribute__((always_inline)) {
    for (int i = 0; i < kCodesTogether; i += kWide) {
      largest = wide_max_bits(largest, as_bits(wide_size(FASTFT_OF_WIDE(loadu_ps)(m + i))));
      largest_sq = wide_max_bits(largest_sq, as_bits(FASTFT_OF_WIDE(loadu_ps)(v + i)));
    }
  };
  const int left = n % kCodesTogether, whole = n - left;
  for (int i = 0; i < whole; i += kCodesTogether) take(m + i, v + i);
  if (left) {
    const Rest rest(m + whole, v + whole, nullptr, left);
    take(rest.m, rest.v);
  }
  return {wide_largest(largest), wide_largest(largest_sq)};
}
#else
static inline bool decode_block(const int8_t*, const uint8_t*, float, float, int, float*, float*) {
  return false;
}
#endif
