// AdamW of tensors with 8-bit moments: half of a warp, or a whole one, has a block of moments to
// itself, and finds its largest moments by shuffles before it rounds them.
#pragma once
#include <cmath>

#include "adamw_elements.cuh"
#include "moments_8bit.h"

namespace {
// Blocks of 8-bit moments that a CUDA block has.
constexpr int kMomentBlocks = kChunk / kMomentBlock;

// The largest of the values of kLanes neighbours, for each of them.
template <int kLanes>
__device__ uint32_t largest_of(uint32_t value) {
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, value, lanes);
    value = other > value ? other : value;
  }
  return value;
}

__host__ __device__ int64_t moment_blocks(const AdamwTensor& t) {
  return t.numel / t.columns * moment_blocks_of_row(t.columns);
}

// A block of 8-bit moments: `size` elements, none where there is no such block, from `begin` on.
struct MomentBlock {
  int64_t begin, number;  // of its first element, and among the tensor's blocks
  int size;
};

// The scales of a block, and the divisors of its moments.
struct Scales {
  // The bits of |m| and v. As integers they order numbers; Inf and NaN lie above all.
  uint32_t largest = 0, largest_sq = 0;

  __device__ void take(float m, float v) {
    const uint32_t a = uint32_t(magnitude(m)), b = uint32_t(magnitude(v));
    largest = a > largest ? a : largest;
    largest_sq = b > largest_sq ? b : largest_sq;
  }
  template <int kLanes>
  __device__ void reduce() {
    largest = largest_of<kLanes>(largest), largest_sq = largest_of<kLanes>(largest_sq);
  }
  __device__ void store(const AdamwTensor& t, int64_t block) const {
    t.exp_avg_scale[block] = bits_float(largest);
    t.exp_avg_sq_scale[block] = bits_float(largest_sq);
  }
  __device__ float divisor() const { return largest ? bits_float(largest) : 1.0f; }
  __device__ float sq_divisor() const { return largest_sq ? bits_float(largest_sq) : 1.0f; }
  // Says whether all values are numbers and the reciprocals of the scales are, too.
  __device__ bool plain() const {
    const float most = bits_float(0x7f7fffffu), m = divisor(), v = sq_divisor();
    return m >= FASTFT_SMALL_SCALE && m <= most && v >= FASTFT_SMALL_SCALE && v <= most;
  }
};

// Eight elements from `at` on, which have been updated: their moments become codes.
__device__ void store_codes(const Place& at, const float (&m)[8], const float (&v)[8],
                            const Drawn<8>& random, const Scales& scales, bool plain) {
  Vector<uint32_t, 2> m_codes, v_codes;
  bool sure = false;
  if (plain)
    sure = encode_eight(m, v, ft_div(1.0f, scales.divisor()), ft_div(1.0f, scales.sq_divisor()),
                        random.words, m_codes.at, v_codes.at);
  if (!sure) {
    m_codes = v_codes = {};
#pragma unroll
    for (int k = 0; k < 8; k++) {
      const bool finite = both_finite(m[k], v[k]);
      const uint16_t bits = random.at(k);
      const uint8_t code = uint8_t(exp_avg_encode(m[k], finite, scales.divisor(), bits));
      const uint8_t sq_code =
          exp_avg_sq_encode(v[k], finite, scales.sq_divisor(), swap_bytes(bits));
      m_codes.at[k / 4] |= uint32_t(code) << k % 4 * 8, v_codes.at[k / 4] |= uint32_t(sq_code)
                                                                             << k % 4 * 8;
    }
  }
  store(static_cast<int8_t*>(at.t.exp_avg) + at.i, 0, m_codes);
  store(static_cast<uint8_t*>(at.t.exp_avg_sq) + at.i, 0, v_codes);
}

__device__ void store_codes(const Place& at, const float (&m)[1], const float (&v)[1],
                            const Drawn<1>& random, const Scales& scales, bool) {
  const bool finite = both_finite(m[0], v[0]);
  const uint16_t bits = random.at(0);
  static_cast<int8_t*>(at.t.exp_avg)[at.i] = exp_avg_encode(m[0], finite, scales.divisor(), bits);
  static_cast<uint8_t*>(at.t.exp_avg_sq)[at.i] =
      exp_avg_sq_encode(v[0], finite, scales.sq_divisor(), swap_bytes(bits));
}

__device__ void load_codes(const Place& at, float m_scale, float v_scale, float (&m)[8],
                           float (&v)[8]) {
  const auto m_codes = load<2, uint32_t>(static_cast<const int8_t*>(at.t.exp_avg) + at.i, 0);
  const auto v_codes = load<2, uint32_t>(static_cast<const uint8_t*>(at.t.exp_avg_sq) + at.i, 0);
  decode_eight(m_codes.at, v_codes.at, m_scale, v_scale, m, v);
}

__device__ void load_codes(const Place& at, float m_scale, float v_scale, float (&m)[1],
                           float (&v)[1]) {
  m[0] = exp_avg_decode(static_cast<const int8_t*>(at.t.exp_avg)[at.i], m_scale);
  v[0] = exp_avg_sq_decode(static_cast<const uint8_t*>(at.t.exp_avg_sq)[at.i], v_scale);
}

// kLanes lanes of a warp update a block, kWidth neighbours each at a time; the others do so with
// another block.
template <class P, int kWidth, int kLanes>
__device__ void update_8bit_block(const AdamwTensor& t, const void* grads, const MomentBlock& block,
                                  float factor, const AdamwHyper& h, const Random& random) {
  constexpr int kVectors = kMomentBlock / kLanes / kWidth;
  const int first = int(threadIdx.x) % kLanes * kWidth;
  const bool there = block.size > 0;
  const float m_scale = there ? t.exp_avg_scale[block.number] : 0.0f;
  const float v_scale = there ? t.exp_avg_sq_scale[block.number] : 0.0f;
  float m[kVectors][kWidth], v[kVectors][kWidth];
  Drawn<kWidth> drawn[kVectors];
  Scales scales;
#pragma unroll
  for (int j = 0; j < kVectors; j++) {
    const int from = first + j * kLanes * kWidth;
    if (from >= block.size) continue;
    const Place at{t, block.begin + from, random};
    float p[kWidth];
    const auto g = neighbours<P, kWidth>(grads, at.i);
    load_codes(at, m_scale, v_scale, m[j], v[j]);
    load_param(at, p, P());
    drawn[j] = at.draw<kWidth>(kStreamMoments);
#pragma unroll
    for (int k = 0; k < kWidth; k++) {
      p[k] = adamw_element(p[k], g.at(k), factor, &m[j][k], &v[j][k], nullptr, h);
      scales.take(m[j][k], v[j][k]);
    }
    store_param(at, p, P());
  }
  scales.reduce<kLanes>();
  // One answer for the warp, as there are shuffles below.
  bool plain = scales.plain();
  for (int other = kLanes; other < kWarp; other *= 2)
    plain &= __shfl_xor_sync(0xffffffffu, uint32_t(plain), other) != 0;
  if (!plain) {
    scales = Scales();
#pragma unroll
    for (int j = 0; j < kVectors; j++)
#pragma unroll
      for (int k = 0; k < kWidth; k++)
        if (first + j * kLanes * kWidth < block.size && both_finite(m[j][k], v[j][k]))
          scales.take(m[j][k], v[j][k]);
    scales.reduce<kLanes>();
  }
  if (there && first == 0) scales.store(t, block.number);
#pragma unroll
  for (int j = 0; j < kVectors; j++) {
    const int from = first + j * kLanes * kWidth;
    if (from < block.size)
      store_codes({t, block.begin + from, random}, m[j], v[j], drawn[j], scales, plain);
  }
}

// Blocks of 8-bit moments from `number` on, as many as make a chunk where none of them is short.
template <class P, int kWidth, int kLanes>
__device__ void update_8bit_blocks(const AdamwTensor& t, const void* grads, int64_t number,
                                   float factor, const AdamwHyper& h, const Random& random) {
  const int64_t of_row = moment_blocks_of_row(t.columns), all = moment_blocks(t);
  constexpr int kTogether = kThreads / kLanes;
  for (int j = 0; j < kMomentBlocks; j += kTogether) {
    MomentBlock block{0, number + j + int(threadIdx.x) / kLanes, 0};
    if (block.number < all) {
      const int64_t row = block.number / of_row;
      const int64_t column = (block.number - row * of_row) * kMomentBlock;
      const int64_t left = t.columns - column;
      block.begin = row * t.columns + column;
      block.size = left < kMomentBlock ? int(left) : int(kMomentBlock);
    }
    update_8bit_block<P, kWidth, kLanes>(t, grads, block, factor, h, random);
  }
}

template <class P>
__device__ void update_8bit(const AdamwTensor& t, const void* grads, int64_t chunk, float factor,
                            const AdamwHyper& h, const Random& random) {
  const uintptr_t together = uintptr_t(t.param) | uintptr_t(grads) | uintptr_t(t.exp_avg) |
                             uintptr_t(t.exp_avg_sq) | uintptr_t(t.residue);
  if ((together & 15) == 0 && t.first % 8 == 0 && t.columns % 8 == 0)
    update_8bit_blocks<P, 8, 16>(t, grads, chunk * kMomentBlocks, factor, h, random);
  else
    update_8bit_blocks<P, 1, kWarp>(t, grads, chunk * kMomentBlocks, factor, h, random);
}
}  // namespace
