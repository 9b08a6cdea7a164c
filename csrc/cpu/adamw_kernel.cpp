// AdamW over a run of one tensor's elements; compiled once per instruction set (isa.h). What is kept as fp32 is updated
// where it lies; what is kept in 16 bits is widened block by block into the first-level cache, updated there by the
// same loop, and rounded back: one loop for the arithmetic, however the values are kept.
#include "adamw_math.h"
#include "isa.h"
#include "philox_lanes.h"

namespace {
constexpr int kBlock = 512;  // elements

struct alignas(64) Block {
  float param[kBlock], grad[kBlock], exp_avg[kBlock], exp_avg_sq[kBlock], max_exp_avg_sq[kBlock];
  uint16_t bits[kBlock];
};

struct Random {
  uint64_t seed, first;  // global index of the block's first element
  uint32_t step;

  // The bits of `n` elements; a block never reaches over a multiple of kBlock.
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
  for (int k = 0; k < 3; k++) {
    moments[k] = t.narrow_moments ? buffers[k] : at<float>(kept[k], i);
    if (t.narrow_moments && kept[k]) widen(at<uint16_t>(kept[k], i), buffers[k], n);
  }
  (t.max_exp_avg_sq ? update<true> : update<false>)(param, grad, moments[0], moments[1], moments[2], n, factor, h);
  if (!wide) store_param(t.rounding, param, at<uint16_t>(t.param, i), residue, n, random, block.bits);
  for (int k = 0; k < 3 && t.narrow_moments; k++)
    if (kept[k])
      round_stochastic(buffers[k], random.draw(kStreamExpAvg + k, n, block.bits), at<uint16_t>(kept[k], i), n);
}
}  // namespace

extern "C" void FASTFT_KERNEL(adamw)(const AdamwTensor* tensor, int64_t begin, int64_t end, const AdamwHyper* hyper,
                                     float factor, uint64_t seed) {
  const AdamwTensor& t = *tensor;
  factor = ft_mul(hyper->grad_sign, factor);
  if (t.rounding == kFp32 && !t.narrow_moments) {
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
    const int n = int(end - begin < room ? end - begin : room);
    update_block(t, begin, n, factor, *hyper, random, block);
    begin += n;
  }
}
