// The blocks of a tensor's codes, to and from floats: by the lanes of moments_8bit_lanes.h and
// moments_4bit_lanes.h where these do a block, else element by element.
#pragma once
#include "moments_4bit_lanes.h"
#include "moments_8bit_blocks.h"
#include "philox.h"

namespace {
// A block of codes in some neighbouring elements.
struct MomentCodes {
  int from, size;  // its elements among these
  void* m;         // int8_t, or two a byte in 4 bits, where a block begins with a byte
  uint8_t* v;
  float *m_scale, *v_scale;
};

// Some neighbouring whole blocks of a tensor's codes.
struct MomentRun {
  const AdamwTensor& t;
  int64_t i, row, column;  // where they begin
  int n;                   // their elements
};

FASTFT_HD int moment_block_at(const AdamwTensor& t, int64_t column) {
  const int64_t left = t.columns - column;
  return left < kMomentBlock ? int(left) : int(kMomentBlock);
}

// The blocks from element `begin` to `end`, borders of blocks, or as many of the first as have
// kMomentsTogether elements at most.
static inline MomentRun moment_run(const AdamwTensor& t, int64_t begin, int64_t end) {
  const int64_t row = begin / t.columns, first = begin - row * t.columns;
  int n = 0;
  for (int64_t column = first; n < end - begin;) {
    const int size = moment_block_at(t, column);
    if (n + size > kMomentsTogether) break;
    n += size;
    column = column + size == t.columns ? 0 : column + size;
  }
  return {t, begin, row, first, n};
}

// Its blocks, as f(MomentCodes).
template <class F>
void each_moment_block(const MomentRun& run, F f) {
  const AdamwTensor& t = run.t;
  int64_t row = run.row, column = run.column;
  int64_t scale = row * moment_blocks_of_row(t.columns) + column / kMomentBlock;
  for (int done = 0; done < run.n; scale++) {
    const int size = moment_block_at(t, column);
    const int64_t at = run.i + int64_t(done);
    const int64_t byte = t.four_bit ? row * nibble_bytes_of_row(t.columns) + column / 2 : at;
    f(MomentCodes{done, size, static_cast<int8_t*>(t.exp_avg) + byte,
                  static_cast<uint8_t*>(t.exp_avg_sq) + at, t.exp_avg_scale + scale,
                  t.exp_avg_sq_scale + scale});
    done += size;
    column = column + size == t.columns ? 0 : column + size;
    row += column == 0;
  }
}

static inline void decode_8bit(const MomentCodes& at, float* __restrict m, float* __restrict v) {
  const int8_t* __restrict codes = static_cast<const int8_t*>(at.m);
  const float m_scale = *at.m_scale, v_scale = *at.v_scale;
  if (decode_block(codes, at.v, m_scale, v_scale, at.size, m, v)) return;
  for (int j = 0; j < at.size; j++) m[j] = exp_avg_decode(codes[j], m_scale);
  for (int j = 0; j < at.size; j++) v[j] = exp_avg_sq_decode(at.v[j], v_scale);
}

static inline void decode_4bit(const MomentCodes& at, float* __restrict m, float* __restrict v) {
  const uint8_t* __restrict bytes = static_cast<const uint8_t*>(at.m);
  const float m_scale = *at.m_scale, v_scale = *at.v_scale;
  if (decode_block(bytes, at.v, m_scale, v_scale, at.size, m, v)) return;
  for (int j = 0; j < at.size; j++) v[j] = exp_avg_sq_decode(at.v[j], v_scale);
  for (int j = 0; j < at.size; j++)
    m[j] = nibble_decode(nibble_of(bytes[j / 2], j % 2), m_scale, ft_sqrt(v[j]));
}

// The scales of the finite moments of a block.
static inline void store_scales(const MomentCodes& at, const float* __restrict m,
                                const float* __restrict v) {
  int32_t largest = 0, largest_sq = 0;
  for (int j = 0; j < at.size; j++) {
    const bool finite = both_finite(m[j], v[j]);
    const int32_t a = finite ? magnitude(m[j]) : 0, b = finite ? magnitude(v[j]) : 0;
    largest = a > largest ? a : largest;
    largest_sq = b > largest_sq ? b : largest_sq;
  }
  *at.m_scale = bits_float(uint32_t(largest)), *at.v_scale = bits_float(uint32_t(largest_sq));
}

FASTFT_HD float divisor_of(float scale) { return scale == 0.0f ? 1.0f : scale; }

static inline void encode_sq(const MomentCodes& at, const float* __restrict m,
                             const float* __restrict v, const uint16_t* __restrict random) {
  uint8_t* __restrict codes = at.v;
  const float divisor = divisor_of(*at.v_scale);
  for (int j = 0; j < at.size; j++)
    codes[j] = exp_avg_sq_encode(v[j], both_finite(m[j], v[j]), divisor, swap_bytes(random[j]));
}

static inline void encode_8bit(const MomentCodes& at, const float* __restrict m,
                               const float* __restrict v, const uint16_t* __restrict random) {
  int8_t* __restrict codes = static_cast<int8_t*>(at.m);
  const float divisor = divisor_of(*at.m_scale);
  for (int j = 0; j < at.size; j++)
    codes[j] = exp_avg_encode(m[j], both_finite(m[j], v[j]), divisor, random[j]);
}

// Once v has its codes, and m's scale is to be found.
static inline void encode_4bit(const MomentCodes& at, const float* __restrict m,
                               const float* __restrict v, const uint16_t* __restrict random) {
  float ratios[kMomentBlock];
  const float v_scale = *at.v_scale;
  int32_t largest = 0;
  for (int j = 0; j < at.size; j++) {
    ratios[j] = nibble_ratio(m[j], both_finite(m[j], v[j]), kept_root(at.v[j], v_scale));
    largest = magnitude(ratios[j]) > largest ? magnitude(ratios[j]) : largest;
  }
  *at.m_scale = bits_float(uint32_t(largest));
  const float divisor = divisor_of(*at.m_scale);
  const auto code = [&](int j) {
    return nibble_encode(m[j], ratios[j], both_finite(m[j], v[j]), divisor, random[j]);
  };
  uint8_t* __restrict bytes = static_cast<uint8_t*>(at.m);
  for (int j = 0; j + 1 < at.size; j += 2) bytes[j / 2] = nibble_pair(code(j), code(j + 1));
  if (at.size % 2) bytes[at.size / 2] = nibble_pair(code(at.size - 1), 0);
}

#if defined(FASTFT_WIDE)
// The scales of a run's blocks (of v alone with 4 bits, where m's follows from v's codes), before
// any has its codes: the next block's work hides how long the largest of one takes to come out.
// `plain` says whether none of these leaves a block to the element by element way.
struct MomentScales {
  bool plain = true;
  EncodedBlocks encoded;  // with 8 bits

  MomentScales(const MomentRun& run, const float* m, const float* v) {
    each_moment_block(run, [&](const MomentCodes& at) {
      const Largest largest = largest_of(m + at.from, v + at.from, at.size);
      *at.v_scale = bits_float(largest.v);
      plain &= plain_scale(largest.v);
      if (run.t.four_bit) {
        plain &= largest.m < 0x7f800000u;
        return;
      }
      *at.m_scale = bits_float(largest.m);
      plain &= plain_scale(largest.m);
      encoded.add(at.size, *at.m_scale, *at.v_scale);
    });
  }
};

// Returns false where a block is left to the other way.
static bool encode_4bit_wide(const MomentRun& run, const uint16_t* random, const float* m,
                             const float* v) {
  bool plain = true;
  float ratios[kMomentsTogether];
  each_moment_block(run, [&](const MomentCodes& at) {
    const uint32_t largest = encode_v(m + at.from, v + at.from, random + at.from, at.size,
                                      *at.v_scale, at.v, ratios + at.from);
    plain &= plain_scale(largest);
    *at.m_scale = bits_float(largest);
  });
  if (!plain) return false;
  each_moment_block(run, [&](const MomentCodes& at) {
    encode_ratios(m + at.from, ratios + at.from, random + at.from, at.size, *at.m_scale,
                  static_cast<uint8_t*>(at.m));
  });
  return true;
}

static bool encode_wide(const MomentRun& run, const MomentScales& scales, const uint16_t* random,
                        const float* m, const float* v) {
  if (!scales.plain) return false;
  if (run.t.four_bit) return encode_4bit_wide(run, random, m, v);
  int8_t* codes = static_cast<int8_t*>(run.t.exp_avg) + run.i;
  uint8_t* sq_codes = static_cast<uint8_t*>(run.t.exp_avg_sq) + run.i;
  encode_all({m, v, random, codes, sq_codes}, scales.encoded);
  return true;
}
#else
struct MomentScales {
  MomentScales(const MomentRun&, const float*, const float*) {}
};
static inline bool encode_wide(const MomentRun&, const MomentScales&, const uint16_t*, const float*,
                               const float*) {
  return false;
}
#endif

static inline void decode_moments(const MomentRun& run, float* m, float* v) {
  if (run.t.four_bit)
    each_moment_block(run,
                      [&](const MomentCodes& at) { decode_4bit(at, m + at.from, v + at.from); });
  else
    each_moment_block(run,
                      [&](const MomentCodes& at) { decode_8bit(at, m + at.from, v + at.from); });
}

static inline void encode_moments(const MomentRun& run, const MomentScales& scales,
                                  const uint16_t* random, const float* m, const float* v) {
  if (encode_wide(run, scales, random, m, v)) return;
  each_moment_block(run, [&](const MomentCodes& at) {
    store_scales(at, m + at.from, v + at.from);
    encode_sq(at, m + at.from, v + at.from, random + at.from);
    (run.t.four_bit ? encode_4bit : encode_8bit)(at, m + at.from, v + at.from, random + at.from);
  });
}
}  // namespace
