// AdamW of tensors with 4-bit first moments: as adamw_8bit.cuh has it, but that the first moment's
// code is of its quotient by the root of the second one as that is kept. So a block finds the scale
// of v, rounds v, finds the scale of the quotients and rounds these. A thread has whole bytes of
// codes: eight neighbours, or two.
#pragma once
#include <cmath>

#include "moment_blocks.cuh"
#include "moments_4bit.cuh"

namespace {
// Quotients of moments by roots, NaN where a moment is no number, and on their way to become codes.
template <int kWidth>
struct Ratios {
  float sizes[kWidth];
  uint32_t signs;  // of the moments, as the topmost bits of nibbles
};

__device__ void load_nibbles(const Place& at, int64_t byte, bool, float m_scale, float v_scale,
                             float (&m)[8], float (&v)[8]) {
  const auto codes = load<1, uint32_t>(static_cast<const uint8_t*>(at.t.exp_avg) + byte, 0);
  const auto sq_codes = load<2, uint32_t>(static_cast<const uint8_t*>(at.t.exp_avg_sq) + at.i, 0);
  decode_sq_eight(sq_codes.at, v_scale, v);
  float roots[8];
#pragma unroll
  for (int k = 0; k < 8; k++) roots[k] = ft_sqrt(v[k]);
  decode_nibbles(codes.at[0], m_scale, roots, m);
}

__device__ void load_nibbles(const Place& at, int64_t byte, bool odd, float m_scale, float v_scale,
                             float (&m)[1], float (&v)[1]) {
  const uint8_t sq_code = static_cast<const uint8_t*>(at.t.exp_avg_sq)[at.i];
  v[0] = exp_avg_sq_decode(sq_code, v_scale);
  m[0] = nibble_decode(nibble_of(static_cast<const uint8_t*>(at.t.exp_avg)[byte], odd), m_scale,
                       kept_root(sq_code, v_scale));
}

// Elements from `at` on, which have been updated: their second moments become codes, and the first
// ones quotients by the roots of what these stand for.
__device__ Ratios<1> store_squares(const Place& at, const float (&m)[1], const float (&v)[1],
                                   const Drawn<1>& random, const Largest& scale, bool) {
  const bool finite = both_finite(m[0], v[0]);
  const uint8_t code = exp_avg_sq_encode(v[0], finite, scale.divisor(), swap_bytes(random.at(0)));
  static_cast<uint8_t*>(at.t.exp_avg_sq)[at.i] = code;
  const float ratio = nibble_ratio(m[0], finite, kept_root(code, scale.scale()));
  return {{finite ? ratio : bits_float(0x7fc00000u)}, float_bits(m[0]) >> 28};
}

__device__ Ratios<8> store_squares(const Place& at, const float (&m)[8], const float (&v)[8],
                                   const Drawn<8>& random, const Largest& scale, bool plain) {
  Vector<uint32_t, 2> codes{};
  Ratios<8> ratios;
  ratios.signs = signs_of(m);
  if (plain) {
    float kept[8];
    encode_sq_eight(v, ft_div(1.0f, scale.divisor()), random.words, codes.at);
    // over a root of 0 every quotient is 0, as over one of Inf
    decode_sq_eight(codes.at, scale.bits ? scale.scale() : INFINITY, kept);
#pragma unroll
    for (int k = 0; k < 8; k++)
      ratios.sizes[k] = ft_div(bits_float(uint32_t(magnitude(m[k]))), ft_sqrt(kept[k]));
  } else {
#pragma unroll
    for (int k = 0; k < 8; k++) {
      const bool finite = both_finite(m[k], v[k]);
      const uint8_t code =
          exp_avg_sq_encode(v[k], finite, scale.divisor(), swap_bytes(random.at(k)));
      codes.at[k / 4] |= uint32_t(code) << k % 4 * 8;
      const float ratio = nibble_ratio(m[k], finite, kept_root(code, scale.scale()));
      ratios.sizes[k] = finite ? ratio : bits_float(0x7fc00000u);
    }
  }
  store(static_cast<uint8_t*>(at.t.exp_avg_sq) + at.i, 0, codes);
  return ratios;
}

// The code of one element.
template <int kWidth>
__device__ uint32_t nibble(const Ratios<kWidth>& ratios, int k, const Drawn<kWidth>& random,
                           const Largest& scale) {
  const bool finite = ratios.sizes[k] == ratios.sizes[k];
  const float sign = ratios.signs >> 4 * k & 8u ? -1.0f : 1.0f;
  return uint32_t(nibble_encode(sign, ratios.sizes[k], finite, scale.divisor(), random.at(k))) &
         15u;
}

// kLanes lanes of a warp update a block, kWidth neighbours each at a time, of which a lane's next
// ones follow where they share a byte; the others do so with another block.
template <class P, int kWidth, int kLanes>
__device__ void update_4bit_block(const AdamwTensor& t, const void* grads, const MomentBlock& block,
                                  float factor, const AdamwHyper& h, const Random& random) {
  constexpr int kVectors = kMomentBlock / kLanes / kWidth, kOfByte = kWidth == 1 ? 2 : 1;
  const int first = int(threadIdx.x) % kLanes * kWidth * kOfByte;
  const auto from = [&](int j) {
    return first + j % kOfByte + j / kOfByte * kLanes * kWidth * kOfByte;
  };
  const int64_t column = block.begin - block.row * t.columns;
  const int64_t first_byte = block.row * nibble_bytes_of_row(t.columns) + column / 2;
  const bool there = block.size > 0;
  const float m_scale = there ? t.exp_avg_scale[block.number] : 0.0f;
  const float v_scale = there ? t.exp_avg_sq_scale[block.number] : 0.0f;
  float m[kVectors][kWidth], v[kVectors][kWidth], spoilt = 0.0f;
  Drawn<kWidth> drawn[kVectors]{};
  Largest sq_scale;
#pragma unroll
  for (int j = 0; j < kVectors; j++) {
    if (from(j) >= block.size) continue;
    const Place at{t, block.begin + from(j), random};
    float p[kWidth];
    const auto g = neighbours<P, kWidth>(grads, at.i);
    load_nibbles(at, first_byte + from(j) / 2, from(j) % 2, m_scale, v_scale, m[j], v[j]);
    load_param(at, p, P());
    drawn[j] = at.draw<kWidth>(kStreamMoments);
#pragma unroll
    for (int k = 0; k < kWidth; k++) {
      p[k] = adamw_element(p[k], g.at(k), factor, &m[j][k], &v[j][k], nullptr, h);
      sq_scale.take(v[j][k]);
      spoilt = ft_fma(m[j][k], 0.0f, spoilt);  // NaN once there was NaN or Inf
    }
    store_param(at, p, P());
  }
  if (spoilt != 0.0f) sq_scale.bits = ~0u;
  sq_scale.reduce<kLanes>();
  const bool plain = in_whole_warp<kLanes>(sq_scale.plain());
  if (!plain) {
    sq_scale = Largest();
#pragma unroll
    for (int j = 0; j < kVectors; j++)
#pragma unroll
      for (int k = 0; k < kWidth; k++)
        if (from(j) < block.size && both_finite(m[j][k], v[j][k])) sq_scale.take(v[j][k]);
    sq_scale.reduce<kLanes>();
  }
  Ratios<kWidth> ratios[kVectors]{};
  Largest scale;
#pragma unroll
  for (int j = 0; j < kVectors; j++) {
    if (from(j) >= block.size) continue;
    ratios[j] =
        store_squares({t, block.begin + from(j), random}, m[j], v[j], drawn[j], sq_scale, plain);
#pragma unroll
    for (int k = 0; k < kWidth; k++) scale.take(ratios[j].sizes[k]);
  }
  scale.reduce<kLanes>();
  const bool all_plain = in_whole_warp<kLanes>(plain && scale.plain());
  if (!all_plain) {
    scale = Largest();
#pragma unroll
    for (int j = 0; j < kVectors; j++)
#pragma unroll
      for (int k = 0; k < kWidth; k++) {
        if (from(j) >= block.size) continue;
        float& size = ratios[j].sizes[k];
        if (size > FASTFT_LARGEST_FLOAT) size = FASTFT_LARGEST_FLOAT;
        if (size == size) scale.take(size);
      }
    scale.reduce<kLanes>();
  }
  if (there && first == 0) {
    t.exp_avg_scale[block.number] = scale.scale();
    t.exp_avg_sq_scale[block.number] = sq_scale.scale();
  }
  auto* const bytes = static_cast<uint8_t*>(t.exp_avg) + first_byte;
#pragma unroll
  for (int j = 0; j < kVectors; j += kOfByte) {
    if (from(j) >= block.size) continue;
    if constexpr (kWidth == 8) {
      Vector<uint32_t, 1> codes{};
      if (all_plain) {
        codes.at[0] = encode_nibbles(ratios[j].sizes, ratios[j].signs,
                                     ft_div(1.0f, scale.divisor()), drawn[j].words);
      } else {
#pragma unroll
        for (int k = 0; k < 8; k++) codes.at[0] |= nibble(ratios[j], k, drawn[j], scale) << 4 * k;
      }
      store(bytes + from(j) / 2, 0, codes);
    } else {
      uint32_t pair = nibble(ratios[j], 0, drawn[j], scale);
      pair |= nibble(ratios[j + 1], 0, drawn[j + 1], scale) << 4;
      bytes[from(j) / 2] = uint8_t(pair);
    }
  }
}
}  // namespace
