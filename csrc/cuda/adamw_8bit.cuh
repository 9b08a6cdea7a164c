// AdamW of tensors with 8-bit moments: half of a warp, or a whole one, has a block of moments to
// itself, and finds its largest moments by shuffles before it rounds them.
#pragma once
#include <cmath>

#include "moment_blocks.cuh"

namespace {
// The scales of a block.
struct Scales {
  Largest m, v;

  __device__ void take(float new_m, float new_v) { m.take(new_m), v.take(new_v); }
  template <int kLanes>
  __device__ void reduce() {
    m.reduce<kLanes>(), v.reduce<kLanes>();
  }
  __device__ void store(const AdamwTensor& t, int64_t block) const {
    t.exp_avg_scale[block] = m.scale(), t.exp_avg_sq_scale[block] = v.scale();
  }
};

// Eight elements from `at` on, which have been updated: their moments become codes.
__device__ void store_codes(const Place& at, const float (&m)[8], const float (&v)[8],
                            const Drawn<8>& random, const Scales& scales, bool plain) {
  Vector<uint32_t, 2> m_codes, v_codes;
  bool sure = false;
  if (plain) {
    sure = encode_eight(m, ft_div(1.0f, scales.m.divisor()), random.words, m_codes.at);
    encode_sq_eight(v, ft_div(1.0f, scales.v.divisor()), random.words, v_codes.at);
  }
  if (!sure) {
    m_codes = v_codes = {};
#pragma unroll
    for (int k = 0; k < 8; k++) {
      const bool finite = both_finite(m[k], v[k]);
      const uint16_t bits = random.at(k);
      const uint8_t code = uint8_t(exp_avg_encode(m[k], finite, scales.m.divisor(), bits));
      const uint8_t sq_code = exp_avg_sq_encode(v[k], finite, scales.v.divisor(), swap_bytes(bits));
      m_codes.at[k / 4] |= uint32_t(code) << k % 4 * 8;
      v_codes.at[k / 4] |= uint32_t(sq_code) << k % 4 * 8;
    }
  }
  store(static_cast<int8_t*>(at.t.exp_avg) + at.i, 0, m_codes);
  store(static_cast<uint8_t*>(at.t.exp_avg_sq) + at.i, 0, v_codes);
}

__device__ void store_codes(const Place& at, const float (&m)[1], const float (&v)[1],
                            const Drawn<1>& random, const Scales& scales, bool) {
  const bool finite = both_finite(m[0], v[0]);
  const uint16_t bits = random.at(0);
  static_cast<int8_t*>(at.t.exp_avg)[at.i] = exp_avg_encode(m[0], finite, scales.m.divisor(), bits);
  static_cast<uint8_t*>(at.t.exp_avg_sq)[at.i] =
      exp_avg_sq_encode(v[0], finite, scales.v.divisor(), swap_bytes(bits));
}

__device__ void load_codes(const Place& at, float m_scale, float v_scale, float (&m)[8],
                           float (&v)[8]) {
  const auto m_codes = load<2, uint32_t>(static_cast<const int8_t*>(at.t.exp_avg) + at.i, 0);
  const auto v_codes = load<2, uint32_t>(static_cast<const uint8_t*>(at.t.exp_avg_sq) + at.i, 0);
  decode_sq_eight(v_codes.at, v_scale, v);
  decode_eight(m_codes.at, m_scale, m);
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
  const bool plain = in_whole_warp<kLanes>(scales.m.plain() && scales.v.plain());
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
}  // namespace
