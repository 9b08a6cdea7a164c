// The CUDA kernel of AdamW: each block a chunk of one tensor, the arithmetic that of adamw_math.h,
// element by element.
//
// Memory-bound, bytes in adamw_update.py: accesses are of 16 bytes, and of 8 or 4 where narrower
// values lie beside fp32 ones, but for the last elements of a tensor, for tensors that do not begin
// on 16 bytes, and for codes in rows of another length than a multiple of eight. Not yet run on a
// GPU.
#pragma once
#include "adamw_4bit.cuh"
#include "adamw_8bit.cuh"
#include "adamw_elements.cuh"
#include "adamw_math.h"
#include "first_block.h"
#include "launch.h"

namespace {
constexpr int kOwnRows = 64;  // of the hyper table, as the kernel's parameters

struct Step {
  const AdamwTensor* tensors;  // in device memory, as all that follow; without their gradients
  const void* const* grads;
  const uint32_t* first_block;
  const AdamwHyper* hyper;  // nullptr: own
  const float* grad_factor;
  uint64_t seed;
  int32_t count;
  AdamwHyper own[kOwnRows];
};

static_assert(sizeof(Step) <= 4096, "kernel parameters hold 4 KiB on every architecture");

// Elements [begin, end) of a chunk, kWidth at a time, of a tensor that is kept as P with moments
// that are kept as M.
template <class P, class M, int kWidth>
__device__ void update(const AdamwTensor& t, const void* grads, int64_t chunk, int begin, int end,
                       float factor, const AdamwHyper& h, const Random& random) {
  for (int k0 = begin + threadIdx.x * kWidth; k0 < end; k0 += kThreads * kWidth) {
    const Place at{t, chunk + k0, random};
    float p[kWidth], m[kWidth], v[kWidth], w[kWidth];
    const auto g = neighbours<P, kWidth>(grads, at.i);
    const auto old_m = neighbours<M, kWidth>(t.exp_avg, at.i);
    const auto old_v = neighbours<M, kWidth>(t.exp_avg_sq, at.i);
    Neighbours<M, kWidth> old_w{};
    if (t.max_exp_avg_sq) old_w = neighbours<M, kWidth>(t.max_exp_avg_sq, at.i);
    load_param(at, p, P());
#pragma unroll
    for (int k = 0; k < kWidth; k++) {
      m[k] = old_m.at(k), v[k] = old_v.at(k);
      // below every second moment: as without amsgrad
      w[k] = t.max_exp_avg_sq ? old_w.at(k) : -INFINITY;
      p[k] = adamw_element(p[k], g.at(k), factor, &m[k], &v[k], &w[k], h);
    }
    store_param(at, p, P());
    Drawn<kWidth> bits{}, max_bits{};
    if (sizeof(M) == 2) {
      bits = at.draw<kWidth>(kStreamMoments);
      if (t.max_exp_avg_sq) max_bits = at.draw<kWidth>(kStreamMaxExpAvgSq);
    }
    store_rounded<false>(at, t.exp_avg, bits, m, M());
    store_rounded<true>(at, t.exp_avg_sq, bits, v, M());
    if (t.max_exp_avg_sq) store_rounded<false>(at, t.max_exp_avg_sq, max_bits, w, M());
  }
}

template <class P, class M, int kWidth>
__device__ void update_chunk(const AdamwTensor& t, const void* grads, int64_t chunk, int n,
                             float factor, const AdamwHyper& h, const Random& random) {
  const uintptr_t together = uintptr_t(t.param) | uintptr_t(grads) | uintptr_t(t.exp_avg) |
                             uintptr_t(t.exp_avg_sq) | uintptr_t(t.max_exp_avg_sq) |
                             uintptr_t(t.residue);
  const bool aligned = (together & 15) == 0 && t.first % 8 == 0;
  const int vectors = aligned ? n / kWidth * kWidth : 0;
  update<P, M, kWidth>(t, grads, chunk, 0, vectors, factor, h, random);
  update<P, M, 1>(t, grads, chunk, vectors, n, factor, h, random);
}

// A pointer out of a table: the compiler cannot know by itself that it is not one of shared or
// local memory.
template <class T>
__device__ T* global(T* data) {
  __builtin_assume(__isGlobal(data));
  return data;
}

// How the tensors of a launch are kept: all of them rounded as this AdamwRounding says, with
// float32 moments, which the compiler then knows; or in any way without codes; or in any way
// without 4-bit codes; or in any way. The more ways, the more registers.
constexpr int kNoCodes = kNearest + 1, kNoFourBit = kNoCodes + 1, kAnyhow = kNoFourBit + 1;
constexpr int blocks_of_processor(int kept) {
  return kept > kNoCodes ? 4 : kept == kNoCodes ? 5 : 6;
}

// Moment blocks of a chunk of a tensor that is kept as P.
template <class P>
__device__ void update_8bit(const AdamwTensor& t, const void* grads, int64_t number, float factor,
                            const AdamwHyper& h, const Random& random) {
  if (in_eights(t, grads))
    each_moment_block<16>(t, number * kMomentBlocks, [&](const MomentBlock& block) {
      update_8bit_block<P, 8, 16>(t, grads, block, factor, h, random);
    });
  else
    each_moment_block<kWarp>(t, number * kMomentBlocks, [&](const MomentBlock& block) {
      update_8bit_block<P, 1, kWarp>(t, grads, block, factor, h, random);
    });
}

template <class P>
__device__ void update_4bit(const AdamwTensor& t, const void* grads, int64_t number, float factor,
                            const AdamwHyper& h, const Random& random) {
  if (in_eights(t, grads))
    each_moment_block<16>(t, number * kMomentBlocks, [&](const MomentBlock& block) {
      update_4bit_block<P, 8, 16>(t, grads, block, factor, h, random);
    });
  else
    each_moment_block<kWarp>(t, number * kMomentBlocks, [&](const MomentBlock& block) {
      update_4bit_block<P, 1, kWarp>(t, grads, block, factor, h, random);
    });
}

template <int kKept>
__global__ void __launch_bounds__(kThreads, blocks_of_processor(kKept))
    adamw_kernel(const __grid_constant__ Step step) {
  const int tensor = last_not_after_of_warp(step.first_block, step.count, blockIdx.x);
  const AdamwTensor& row = step.tensors[tensor];
  const AdamwTensor t{global(row.param),
                      nullptr,
                      global(row.exp_avg),
                      global(row.exp_avg_sq),
                      global(row.exp_avg_scale),
                      global(row.exp_avg_sq_scale),
                      row.columns,
                      global(row.max_exp_avg_sq),
                      global(row.residue),
                      row.numel,
                      row.first,
                      row.row,
                      kKept < kNoCodes ? AdamwRounding(kKept) : row.rounding,
                      kKept < kNoCodes ? false : row.bf16_moments,
                      kKept == kAnyhow && row.four_bit};
  const AdamwHyper h = step.hyper ? step.hyper[t.row] : step.own[t.row];
  if (h.step == 0.0f) return;  // the step is skipped
  const void* grads = global(step.grads[tensor]);
  const int64_t number = blockIdx.x - step.first_block[tensor], chunk = number * kChunk;
  const int n = int(t.numel - chunk < kChunk ? t.numel - chunk : kChunk);
  const float factor = ft_mul(h.grad_sign, *step.grad_factor);
  const Random random{step.seed, uint32_t(h.step)};
  if (t.four_bit) {
    if (t.rounding == kFp32)
      update_4bit<float>(t, grads, number, factor, h, random);
    else
      update_4bit<uint16_t>(t, grads, number, factor, h, random);
  } else if (kKept > kNoCodes && t.columns) {
    if (t.rounding == kFp32)
      update_8bit<float>(t, grads, number, factor, h, random);
    else
      update_8bit<uint16_t>(t, grads, number, factor, h, random);
  } else if (t.rounding == kFp32) {
    if (t.bf16_moments)
      update_chunk<float, uint16_t, 4>(t, grads, chunk, n, factor, h, random);
    else
      update_chunk<float, float, 4>(t, grads, chunk, n, factor, h, random);
  } else if (t.bf16_moments) {
    update_chunk<uint16_t, uint16_t, 8>(t, grads, chunk, n, factor, h, random);
  } else {
    update_chunk<uint16_t, float, 4>(t, grads, chunk, n, factor, h, random);
  }
}
}  // namespace
