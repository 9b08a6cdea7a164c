// The blocks of a tensor's codes, to and from floats: by the lanes of moments_8bit_lanes.h and
// moments_4bit_lanes.h where these do a block, else element by element.
#pragma once
#include "moments_4bit_lanes.h"
#include "philox.h"

constexpr int kMomentsTogether = 4 * kMomentBlock;  // elements, in whole blocks

// A block of codes in some neighbouring elements.
struct MomentCodes {
  int from, size;  // its elements among these
  void* m;         // int8_t, or two a byte in 4 bits, where a block begins with a byte
  uint8_t* v;
  float *m_scale, *v_scale;
};

// The blocks in `n` elements from element `i` on, as f(MomentCodes).
template <class F>
void each_moment_block(const AdamwTensor& t, int64_t i, int n, F f) {
  int64_t row = i / t.columns, column = i - row * t.columns;
  int64_t scale = row * moment_blocks_of_row(t.columns) + column / kMomentBlock;
  for (int done = 0; done < n; scale++) {
    const int64_t left = t.columns - column;
    const int size = left < kMomentBlock ? int(left) : int(kMomentBlock);
    const int64_t byte =
        t.four_bit ? row * nibble_bytes_of_row(t.columns) + column / 2 : i + int64_t(done);
    f(MomentCodes{done, size, static_cast<int8_t*>(t.exp_avg) + byte,
                  static_cast<uint8_t*>(t.exp_avg_sq) + i + done, t.exp_avg_scale + scale,
                  t.exp_avg_sq_scale + scale});
    done += size;
    column = column + size == t.columns ? 0 : column + size;
    row += column == 0;
  }
}

// How many elements from `begin` on, the first of a block, make whole blocks and at most
// kMomentsTogether.
static inline int whole_moment_blocks(const AdamwTensor& t, int64_t begin, int64_t end) {
  int64_t n = 0;
  for (int64_t column = begin % t.columns; n < end - begin;) {
    const int64_t left = t.columns - column;
    const int64_t size = left < kMomentBlock ? left : int64_t(kMomentBlock);
    if (n + size > kMomentsTogether) break;
    n += size;
    column = column + size == t.columns ? 0 : column + size;
  }
  return int(n);
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
// Each block while the first roots of the next one are drawn.
static void encode_8bit_wide(const AdamwTensor& t, int64_t i, int n, const uint16_t* random,
                             const float* m, const float* v) {
  Encoded last{};
  Roots roots;
  each_moment_block(t, i, n, [&](const MomentCodes& at) {
    int8_t* codes = static_cast<int8_t*>(at.m);
    const Encoded block{at.size,     m + at.from, v + at.from, random + at.from,
                        *at.m_scale, *at.v_scale, codes,       at.v};
    if (at.from == 0) draw_roots(roots, block);
    if (at.from > 0) encode_block(last, roots, block);
    last = block;
  });
  encode_block(last, roots, last);
}

// Pass by pass over all blocks: the next block's work hides how long the largest of one takes to
// come out. Returns false where a block is left to the element by element way.
static bool encode_wide(const AdamwTensor& t, int64_t i, int n, const uint16_t* random,
                        const float* m, const float* v) {
  bool plain = true;
  each_moment_block(t, i, n, [&](const MomentCodes& at) {
    const Largest largest = largest_of(m + at.from, v + at.from, at.size);
    plain &=
        plain_scale(largest.v) & (t.four_bit ? largest.m < 0x7f800000u : plain_scale(largest.m));
    *at.m_scale = bits_float(largest.m), *at.v_scale = bits_float(largest.v);
  });
  if (!plain) return false;
  if (!t.four_bit) {
    encode_8bit_wide(t, i, n, random, m, v);
    return true;
  }
  float ratios[kMomentsTogether];
  each_moment_block(t, i, n, [&](const MomentCodes& at) {
    const uint32_t largest = encode_v(m + at.from, v + at.from, random + at.from, at.size,
                                      *at.v_scale, at.v, ratios + at.from);
    plain &= plain_scale(largest);
    *at.m_scale = bits_float(largest);
  });
  if (!plain) return false;
  each_moment_block(t, i, n, [&](const MomentCodes& at) {
    encode_ratios(m + at.from, ratios + at.from, random + at.from, at.size, *at.m_scale,
                  static_cast<uint8_t*>(at.m));
  });
  return true;
}
#else
static inline bool encode_wide(const AdamwTensor&, int64_t, int, const uint16_t*, const float*,
                               const float*) {
  return false;
}
#endif

// `n` elements from element `i` on, the first of a block, in whole blocks.
static inline void decode_moments(const AdamwTensor& t, int64_t i, int n, float* m, float* v) {
  each_moment_block(t, i, n, [&](const MomentCodes& at) {
    (t.four_bit ? decode_4bit : decode_8bit)(at, m + at.from, v + at.from);
  });
}

static inline void encode_moments(const AdamwTensor& t, int64_t i, int n, const uint16_t* random,
                                  const float* m, const float* v) {
  if (encode_wide(t, i, n, random, m, v)) return;
  each_moment_block(t, i, n, [&](const MomentCodes& at) {
    store_scales(at, m + at.from, v + at.from);
    encode_sq(at, m + at.from, v + at.from, random + at.from);
    (t.four_bit ? encode_4bit : encode_8bit)(at, m + at.from, v + at.from, random + at.from);
  });
}
