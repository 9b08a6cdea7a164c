// The blocks of a tensor's codes, to and from floats: by the lanes of moments_8bit_lanes.h and
// moments_4bit_lanes.h where these do a block, else element by element.
#pragma once
#include "moments_4bit_lanes.h"
#include "philox.h"

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

// How many elements from `begin` on, the first of a block, make whole blocks and at most `most`.
static inline int whole_moment_blocks(const AdamwTensor& t, int64_t begin, int64_t end, int most) {
  int64_t n = 0;
  for (int64_t column = begin % t.columns; n < end - begin;) {
    const int64_t left = t.columns - column;
    const int64_t size = left < kMomentBlock ? left : int64_t(kMomentBlock);
    if (n + size > most) break;
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

// The bits of a block's largest finite moments.
struct Largest {
  int32_t m = 0, v = 0;
  Largest(const float* __restrict m_of, const float* __restrict v_of, int size) {
    for (int j = 0; j < size; j++) {
      const bool finite = both_finite(m_of[j], v_of[j]);
      const int32_t a = finite ? magnitude(m_of[j]) : 0, b = finite ? magnitude(v_of[j]) : 0;
      m = a > m ? a : m;
      v = b > v ? b : v;
    }
  }
};

// The scale with these bits, and what a block's values are divided by.
FASTFT_HD float store_scale(int32_t largest, float* scale) {
  *scale = bits_float(uint32_t(largest));
  return largest ? *scale : 1.0f;
}

static inline void encode_sq(const MomentCodes& at, const float* __restrict m,
                             const float* __restrict v, const uint16_t* __restrict random,
                             float divisor) {
  uint8_t* __restrict codes = at.v;
  for (int j = 0; j < at.size; j++)
    codes[j] = exp_avg_sq_encode(v[j], both_finite(m[j], v[j]), divisor, swap_bytes(random[j]));
}

static inline void encode_8bit(const MomentCodes& at, const float* __restrict m,
                               const float* __restrict v, const uint16_t* __restrict random) {
  int8_t* __restrict codes = static_cast<int8_t*>(at.m);
  if (encode_block(m, v, random, at.size, codes, at.v, at.m_scale, at.v_scale)) return;
  const Largest largest(m, v, at.size);
  const float divisor = store_scale(largest.m, at.m_scale);
  for (int j = 0; j < at.size; j++)
    codes[j] = exp_avg_encode(m[j], both_finite(m[j], v[j]), divisor, random[j]);
  encode_sq(at, m, v, random, store_scale(largest.v, at.v_scale));
}

static inline void encode_4bit(const MomentCodes& at, const float* __restrict m,
                               const float* __restrict v, const uint16_t* __restrict random) {
  uint8_t* __restrict bytes = static_cast<uint8_t*>(at.m);
  if (encode_block(m, v, random, at.size, bytes, at.v, at.m_scale, at.v_scale)) return;
  encode_sq(at, m, v, random, store_scale(Largest(m, v, at.size).v, at.v_scale));
  float ratio[kMomentBlock];
  const float v_scale = *at.v_scale;
  int32_t largest = 0;
  for (int j = 0; j < at.size; j++) {
    ratio[j] = nibble_ratio(m[j], both_finite(m[j], v[j]), kept_root(at.v[j], v_scale));
    largest = magnitude(ratio[j]) > largest ? magnitude(ratio[j]) : largest;
  }
  const float divisor = store_scale(largest, at.m_scale);
  const auto code = [&](int j) {
    return nibble_encode(m[j], ratio[j], both_finite(m[j], v[j]), divisor, random[j]);
  };
  for (int j = 0; j + 1 < at.size; j += 2) bytes[j / 2] = nibble_pair(code(j), code(j + 1));
  if (at.size % 2) bytes[at.size / 2] = nibble_pair(code(at.size - 1), 0);
}

// `n` elements from element `i` on, the first of a block, in whole blocks.
static inline void decode_moments(const AdamwTensor& t, int64_t i, int n, float* m, float* v) {
  each_moment_block(t, i, n, [&](const MomentCodes& at) {
    (t.four_bit ? decode_4bit : decode_8bit)(at, m + at.from, v + at.from);
  });
}

static inline void encode_moments(const AdamwTensor& t, int64_t i, int n, const uint16_t* random,
                                  const float* m, const float* v) {
  each_moment_block(t, i, n, [&](const MomentCodes& at) {
    (t.four_bit ? encode_4bit : encode_8bit)(at, m + at.from, v + at.from, random + at.from);
  });
}
