// AdamW over a run of one tensor's elements; compiled once per instruction set (isa.h). What is kept as fp32 is updated
// where it lies; what is kept in 16 bits is widened block by block into the first-level cache, updated there by the
// same loop, and rounded back: one loop for the arithmetic, however the values are kept. 8-bit moments likewise, in whole
// blocks of theirs.
#include "adamw_math.h"
#include "isa.h"
#include "moments_8bit.h"
#include "philox_lanes.h"

namespace {
constexpr int kBlock = 512;  // elements

struct alignas(64) Block {
  float param[kBlock], grad[kBlock], exp_avg[kBlock], exp_avg_sq[kBlock], max_exp_avg_sq[kBlock];
  uint16_t bits[kBlock + kPhiloxGroup];
};

struct Random {
  uint64_t seed, first;  // global index of the block's first element
  uint32_t step;

  // The bits of `n` elements.
  const uint16_t* draw(uint32_t stream, int n, uint16_t* bits) const {
    const int skip = int(first % kPhiloxGroup);
    for (int i = 0; i < skip + n; i += kPhiloxGroup) philox_group(first - skip + i, step, stream, seed, bits + i);
    return bits + skip;
  }
};

template <bool amsgrad>
void update(float* __restrict param, const float* __restrict grad, float* __restrict exp_avg,
            float* __restrict exp_avg_sq, float* __restrict max_exp_avg_sq, int64_t n, float factor,
            const AdamwHyper& hyper) {
  const AdamwHyper h = hyper;
  for (int64_t i = 0; i < n; i++)
    param[i] = adamw_element(param[i], grad[i], factor, &exp_avg[i], &exp_avg_sq[i],
                             amsgrad ? &max_exp_avg_sq[i] : nullptr, h);
}

void widen(const uint16_t* __restrict from, float* __restrict to, int n) {
  for (int i = 0; i < n; i++) to[i] = bf16_to_float(from[i]);
}

void round_stochastic(const float* __restrict from, const uint16_t* __restrict bits, uint16_t* __restrict to, int n) {
  for (int i = 0; i < n; i++) to[i] = bf16_stochastic(from[i], bits[i]);
}

void load_param(AdamwRounding rounding, const uint16_t* __restrict param, const void* residue, float* __restrict to,
                int n) {
  if (rounding == kExact) {
    const int16_t* __restrict remainder = static_cast<const int16_t*>(residue);
    for (int i = 0; i < n; i++) to[i] = master_join(param[i], remainder[i]);
  } else if (rounding == kKahan) {
    const uint16_t* __restrict compensation = static_cast<const uint16_t*>(residue);
    for (int i = 0; i < n; i++) to[i] = kahan_join(param[i], compensation[i]);
  } else {
    widen(param, to, n);
  }
}

void store_param(AdamwRounding rounding, const float* __restrict from, uint16_t* __restrict param, void* residue, int n,
                 const Random& random, uint16_t* bits) {
  if (rounding == kExact) {
    int16_t* __restrict remainder = static_cast<int16_t*>(residue);
    for (int i = 0; i < n; i++) master_split(from[i], &param[i], &remainder[i]);
  } else if (rounding == kKahan) {
    uint16_t* __restrict compensation = static_cast<uint16_t*>(residue);
    for (int i = 0; i < n; i++) kahan_split(from[i], &param[i], &compensation[i]);
  } else if (rounding == kStochastic) {
    round_stochastic(from, random.draw(kStreamParam, n, bits), param, n);
  } else {
    for (int i = 0; i < n; i++) param[i] = bf16_nearest(from[i]);
  }
}

// The blocks of 8-bit moments in `n` elements from element `i` on, as f(offset from i, elements, scale).
template <class F>
void each_moment_block(const AdamwTensor& t, int64_t i, int n, F f) {
  const int64_t row = i / t.columns;
  int64_t column = i - row * t.columns;
  int64_t scale = row * ((t.columns + kMomentBlock - 1) / kMomentBlock) + column / kMomentBlock;
  for (int done = 0; done < n; scale++) {
    const int64_t left = t.columns - column;
    const int size = left < kMomentBlock ? int(left) : int(kMomentBlock);
    f(done, size, scale);
    done += size;
    column = column + size == t.columns ? 0 : column + size;
  }
}

// How many elements from `begin` on, the first of a block, make whole blocks and at most kBlock.
int whole_moment_blocks(const AdamwTensor& t, int64_t begin, int64_t end) {
  int64_t n = 0;
  for (int64_t column = begin % t.columns; n < end - begin;) {
    const int64_t left = t.columns - column, size = left < kMomentBlock ? left : int64_t(kMomentBlock);
    if (n + size > kBlock) break;
    n += size;
    column = column + size == t.columns ? 0 : column + size;
  }
  return int(n);
}

void decode_moments(const AdamwTensor& t, int64_t i, int n, Block& block) {
  each_moment_block(t, i, n, [&](int from, int size, int64_t scale) {
    const int8_t* __restrict codes = static_cast<const int8_t*>(t.exp_avg) + i + from;
    const uint8_t* __restrict sq_codes = static_cast<const uint8_t*>(t.exp_avg_sq) + i + from;
    const float m_scale = t.exp_avg_scale[scale], v_scale = t.exp_avg_sq_scale[scale];
    for (int j = 0; j < size; j++) block.exp_avg[from + j] = exp_avg_decode(codes[j], m_scale);
    for (int j = 0; j < size; j++) block.exp_avg_sq[from + j] = exp_avg_sq_decode(sq_codes[j], v_scale);
  });
}

void encode_moments(const AdamwTensor& t, int64_t i, int n, const Random& random, Block& block) {
  uint16_t sq_buffer[kBlock + kPhiloxGroup];
  const uint16_t* bits = random.draw(kStreamExpAvg, n, block.bits);
  const uint16_t* sq_bits = random.draw(kStreamExpAvgSq, n, sq_buffer);
  each_moment_block(t, i, n, [&](int from, int size, int64_t scale) {
    const float* __restrict m = block.exp_avg + from;
    const float* __restrict v = block.exp_avg_sq + from;
    int32_t largest = 0, largest_sq = 0;
    for (int j = 0; j < size; j++) {
      const bool finite = both_finite(m[j], v[j]);
      const int32_t a = finite ? magnitude(m[j]) : 0, b = finite ? magnitude(v[j]) : 0;
      largest = a > largest ? a : largest;
      largest_sq = b > largest_sq ? b : largest_sq;
    }
    t.exp_avg_scale[scale] = bits_float(uint32_t(largest));
    t.exp_avg_sq_scale[scale] = bits_float(uint32_t(largest_sq));
    const float divisor = largest ? bits_float(uint32_t(largest)) : 1.0f;
    const float sq_divisor = largest_sq ? bits_float(uint32_t(largest_sq)) : 1.0f;
    int8_t* __restrict codes = static_cast<int8_t*>(t.exp_avg) + i + from;
    uint8_t* __restrict sq_codes = static_cast<uint8_t*>(t.exp_avg_sq) + i + from;
    for (int j = 0; j < size; j++)
      codes[j] = exp_avg_encode(m[j], both_finite(m[j], v[j]), divisor, bits[from + j]);
    for (int j = 0; j < size; j++)
      sq_codes[j] = exp_avg_sq_encode(v[j], both_finite(m[j], v[j]), sq_divisor, sq_bits[from + j]);
  });
}

template <class T>
T* at(void* base, int64_t i) {
  return base ? static_cast<T*>(base) + i : nullptr;
}

// At most kBlock elements from `i` on.
void update_block(const AdamwTensor& t, int64_t i, int n, float factor, const AdamwHyper& h, const Random& random,
                  Block& block) {
  const bool wide = t.rounding == kFp32;
  float* param = wide ? at<float>(t.param, i) : block.param;
  const float* grad = wide ? static_cast<const float*>(t.grad) + i : block.grad;
  void* residue = at<uint16_t>(t.residue, i);
  if (!wide) {
    load_param(t.rounding, at<uint16_t>(t.param, i), residue, block.param, n);
    widen(static_cast<const uint16_t*>(t.grad) + i, block.grad, n);
  }
  void* const kept[] = {t.exp_avg, t.exp_avg_sq, t.max_exp_avg_sq};
  float* const buffers[] = {block.exp_avg, block.exp_avg_sq, block.max_exp_avg_sq};
  float* moments[3];
  if (t.columns) decode_moments(t, i, n, block);
  for (int k = 0; k < 3; k++) {
    moments[k] = t.narrow_moments || t.columns ? buffers[k] : at<float>(kept[k], i);
    if (t.narrow_moments && kept[k]) widen(at<uint16_t>(kept[k], i), buffers[k], n);
  }
  (t.max_exp_avg_sq ? update<true> : update<false>)(param, grad, moments[0], moments[1], moments[2], n, factor, h);
  if (!wide) store_param(t.rounding, param, at<uint16_t>(t.param, i), residue, n, random, block.bits);
  if (t.columns) encode_moments(t, i, n, random, block);
  for (int k = 0; k < 3 && t.narrow_moments; k++)
    if (kept[k])
      round_stochastic(buffers[k], random.draw(kStreamExpAvg + k, n, block.bits), at<uint16_t>(kept[k], i), n);
}
}  // namespace

extern "C" void FASTFT_KERNEL(adamw)(const AdamwTensor* tensor, int64_t begin, int64_t end, const AdamwHyper* hyper,
                                     float factor, uint64_t seed) {
  const AdamwTensor& t = *tensor;
  factor = ft_mul(hyper->grad_sign, factor);
  if (t.rounding == kFp32 && !t.narrow_moments && !t.columns) {
    (t.max_exp_avg_sq ? update<true> : update<false>)(at<float>(t.param, begin),
                                                      static_cast<const float*>(t.grad) + begin,
                                                      at<float>(t.exp_avg, begin), at<float>(t.exp_avg_sq, begin),
                                                      at<float>(t.max_exp_avg_sq, begin), end - begin, factor, *hyper);
    return;
  }
  Block block;
  while (begin < end) {
    const Random random{seed, uint64_t(t.first + begin), uint32_t(hyper->step)};
    const int64_t room = kBlock - int64_t(random.first % kBlock);
    const int n = t.columns ? whole_moment_blocks(t, begin, end) : int(end - begin < room ? end - begin : room);
    update_block(t, begin, n, factor, *hyper, random, block);
    begin += n;
  }
}
