// The CUDA kernel of AdamW: each block a chunk of one tensor, the arithmetic that of adamw_math.h, element by element.
// A warp has a block of 8-bit moments to itself, and finds its largest moments by shuffles before it rounds them.
//
// Memory-bound, bytes in adamw_update.py: accesses are of 16 bytes, and of 8 or 4 where narrower values lie beside fp32
// ones, but for the last elements of a tensor, for tensors that do not begin on 16 bytes, and for 8-bit moments in rows
// of another length than a multiple of four. Not yet run on a GPU.
#pragma once
#include <cmath>

#include "adamw_math.h"
#include "launch.h"
#include "moments_8bit.h"
#include "philox.h"

namespace {
constexpr int kThreads = 128, kWarp = 32;
constexpr int kChunk = 4096;                         // elements of a block
constexpr int kCodedBlocks = kChunk / kMomentBlock;  // of 8-bit moments, likewise
constexpr int kOwnRows = 64;                         // of the hyper table, as the kernel's parameters

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

template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth < 16 ? sizeof(T) * kWidth : 16) Vector {
  T at[kWidth];
};

template <int kWidth, class T>
__device__ Vector<T, kWidth> load(const void* data, int64_t i) {
  return *reinterpret_cast<const Vector<T, kWidth>*>(static_cast<const T*>(data) + i);
}

template <class T, int kWidth>
__device__ void store(void* data, int64_t i, const Vector<T, kWidth>& values) {
  *reinterpret_cast<Vector<T, kWidth>*>(static_cast<T*>(data) + i) = values;
}

__device__ float widen(float value) { return value; }
__device__ float widen(uint16_t value) { return bf16_to_float(value); }

struct Random {
  uint64_t seed;
  uint32_t step;

  // The bits of kWidth elements from the one with global index `element` on, which is a multiple of kWidth.
  template <int kWidth>
  __device__ Vector<uint16_t, kWidth> draw(uint32_t stream, uint64_t element) const {
    uint16_t bits[8];
    philox_bits<1>(element / 8, step, stream, seed, bits);
    uint64_t halves[2] = {};  // shifted below, because an index would put the bits into local memory
#pragma unroll
    for (int i = 0; i < 8; i++) halves[i / 4] |= uint64_t(bits[i]) << (i % 4 * 16);
    Vector<uint16_t, kWidth> own;
#pragma unroll
    for (int i = 0; i < kWidth; i++) {
      const uint64_t half = kWidth == 8 ? halves[i / 4] : element & 4 ? halves[1] : halves[0];
      own.at[i] = uint16_t(half >> ((kWidth == 1 ? element % 4 : i % 4) * 16));
    }
    return own;
  }
};

// Where a thread is: element `i` of tensor `t`.
struct Place {
  const AdamwTensor& t;
  int64_t i;
  Random random;
  template <int kWidth>
  __device__ Vector<uint16_t, kWidth> draw(uint32_t stream) const {
    return random.draw<kWidth>(stream, uint64_t(t.first + i));
  }
};

template <int kWidth>
__device__ Vector<uint16_t, kWidth> swapped(const Vector<uint16_t, kWidth>& bits) {
  Vector<uint16_t, kWidth> own;
#pragma unroll
  for (int k = 0; k < kWidth; k++) own.at[k] = swap_bytes(bits.at[k]);
  return own;
}

template <int kWidth>
__device__ void store_moment(const Place& at, void* data, const Vector<uint16_t, kWidth>&,
                             const float (&values)[kWidth], float) {
  Vector<float, kWidth> kept;
#pragma unroll
  for (int k = 0; k < kWidth; k++) kept.at[k] = values[k];
  store(data, at.i, kept);
}

template <int kWidth>
__device__ void store_moment(const Place& at, void* data, const Vector<uint16_t, kWidth>& bits,
                             const float (&values)[kWidth], uint16_t) {
  Vector<uint16_t, kWidth> kept;
#pragma unroll
  for (int k = 0; k < kWidth; k++) kept.at[k] = bf16_stochastic(values[k], bits.at[k]);
  store(data, at.i, kept);
}

template <int kWidth>
__device__ void load_param(const Place& at, float (&values)[kWidth], float) {
  const auto kept = load<kWidth, float>(at.t.param, at.i);
#pragma unroll
  for (int k = 0; k < kWidth; k++) values[k] = kept.at[k];
}

template <int kWidth>
__device__ void load_param(const Place& at, float (&values)[kWidth], uint16_t) {
  const auto kept = load<kWidth, uint16_t>(at.t.param, at.i);
  Vector<uint16_t, kWidth> residue{};
  if (at.t.residue) residue = load<kWidth, uint16_t>(at.t.residue, at.i);
#pragma unroll
  for (int k = 0; k < kWidth; k++) {
    if (at.t.rounding == kExact)
      values[k] = master_join(kept.at[k], int16_t(residue.at[k]));
    else
      values[k] = at.t.rounding == kKahan ? kahan_join(kept.at[k], residue.at[k]) : bf16_to_float(kept.at[k]);
  }
}

template <int kWidth>
__device__ void store_param(const Place& at, const float (&values)[kWidth], float) {
  store_moment(at, at.t.param, Vector<uint16_t, kWidth>{}, values, 0.0f);
}

template <int kWidth>
__device__ void store_param(const Place& at, const float (&values)[kWidth], uint16_t) {
  Vector<uint16_t, kWidth> kept, residue, bits{};
  if (at.t.rounding == kStochastic) bits = at.draw<kWidth>(kStreamParam);
#pragma unroll
  for (int k = 0; k < kWidth; k++) {
    int16_t remainder;
    if (at.t.rounding == kExact) {
      master_split(values[k], &kept.at[k], &remainder);
      residue.at[k] = uint16_t(remainder);
    } else if (at.t.rounding == kKahan) {
      kahan_split(values[k], &kept.at[k], &residue.at[k]);
    } else {
      kept.at[k] = at.t.rounding == kStochastic ? bf16_stochastic(values[k], bits.at[k]) : bf16_nearest(values[k]);
    }
  }
  store(at.t.param, at.i, kept);
  if (at.t.residue) store(at.t.residue, at.i, residue);
}

// Elements [begin, end) of a chunk, kWidth at a time, of a tensor that is kept as P with moments that are kept as M.
template <class P, class M, int kWidth>
__device__ void update(const AdamwTensor& t, const void* grads, int64_t chunk, int begin, int end, float factor,
                       const AdamwHyper& h, const Random& random) {
  for (int k0 = begin + threadIdx.x * kWidth; k0 < end; k0 += kThreads * kWidth) {
    const Place at{t, chunk + k0, random};
    float p[kWidth], m[kWidth], v[kWidth], w[kWidth];
    const auto g = load<kWidth, P>(grads, at.i);
    const auto old_m = load<kWidth, M>(t.exp_avg, at.i), old_v = load<kWidth, M>(t.exp_avg_sq, at.i);
    Vector<M, kWidth> old_w{};
    if (t.max_exp_avg_sq) old_w = load<kWidth, M>(t.max_exp_avg_sq, at.i);
    load_param(at, p, P());
#pragma unroll
    for (int k = 0; k < kWidth; k++) {
      m[k] = widen(old_m.at[k]), v[k] = widen(old_v.at[k]);
      w[k] = t.max_exp_avg_sq ? widen(old_w.at[k]) : -INFINITY;  // below every second moment: as without amsgrad
      p[k] = adamw_element(p[k], widen(g.at[k]), factor, &m[k], &v[k], &w[k], h);
    }
    store_param(at, p, P());
    Vector<uint16_t, kWidth> bits{}, max_bits{};
    if (sizeof(M) == 2) {
      bits = at.draw<kWidth>(kStreamMoments);
      if (t.max_exp_avg_sq) max_bits = at.draw<kWidth>(kStreamMaxExpAvgSq);
    }
    store_moment(at, t.exp_avg, bits, m, M());
    store_moment(at, t.exp_avg_sq, swapped(bits), v, M());
    if (t.max_exp_avg_sq) store_moment(at, t.max_exp_avg_sq, max_bits, w, M());
  }
}

template <class P, class M, int kWidth>
__device__ void update_chunk(const AdamwTensor& t, const void* grads, int64_t chunk, int n, float factor,
                             const AdamwHyper& h, const Random& random) {
  const uintptr_t together = uintptr_t(t.param) | uintptr_t(grads) | uintptr_t(t.exp_avg) | uintptr_t(t.exp_avg_sq) |
                             uintptr_t(t.max_exp_avg_sq) | uintptr_t(t.residue);
  const bool aligned = (together & 15) == 0 && t.first % 8 == 0;
  const int vectors = aligned ? n / kWidth * kWidth : 0;
  update<P, M, kWidth>(t, grads, chunk, 0, vectors, factor, h, random);
  update<P, M, 1>(t, grads, chunk, vectors, n, factor, h, random);
}

// The largest of a warp's values, for each of its lanes.
__device__ int32_t largest_of_warp(int32_t value) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const int32_t other = __shfl_xor_sync(0xffffffffu, value, lanes);
    value = other > value ? other : value;
  }
  return value;
}

__host__ __device__ int64_t moment_blocks(const AdamwTensor& t) {
  return t.numel / t.columns * ((t.columns + kMomentBlock - 1) / kMomentBlock);
}

// A warp updates a block of 8-bit moments, from element `begin` on: kWidth neighbours a lane, kVectors times.
template <class P, int kWidth>
__device__ void update_coded_block(const AdamwTensor& t, const void* grads, int64_t begin, int size, int64_t block,
                                   float factor, const AdamwHyper& h, const Random& random) {
  constexpr int kVectors = kMomentBlock / kWarp / kWidth;
  const float m_scale = t.exp_avg_scale[block], v_scale = t.exp_avg_sq_scale[block];
  float m[kVectors][kWidth], v[kVectors][kWidth];
  int32_t largest = 0, largest_sq = 0;
#pragma unroll
  for (int j = 0; j < kVectors; j++) {
    const int from = (int(threadIdx.x) % kWarp + j * kWarp) * kWidth;
    if (from >= size) continue;
    const Place at{t, begin + from, random};
    float p[kWidth];
    const auto g = load<kWidth, P>(grads, at.i);
    const auto m_codes = load<kWidth, int8_t>(t.exp_avg, at.i);
    const auto v_codes = load<kWidth, uint8_t>(t.exp_avg_sq, at.i);
    load_param(at, p, P());
#pragma unroll
    for (int k = 0; k < kWidth; k++) {
      m[j][k] = exp_avg_decode(m_codes.at[k], m_scale), v[j][k] = exp_avg_sq_decode(v_codes.at[k], v_scale);
      p[k] = adamw_element(p[k], widen(g.at[k]), factor, &m[j][k], &v[j][k], nullptr, h);
      const bool finite = both_finite(m[j][k], v[j][k]);
      const int32_t a = finite ? magnitude(m[j][k]) : 0, b = finite ? magnitude(v[j][k]) : 0;
      largest = a > largest ? a : largest;
      largest_sq = b > largest_sq ? b : largest_sq;
    }
    store_param(at, p, P());
  }
  largest = largest_of_warp(largest), largest_sq = largest_of_warp(largest_sq);
  if (threadIdx.x % kWarp == 0) {
    t.exp_avg_scale[block] = bits_float(uint32_t(largest));
    t.exp_avg_sq_scale[block] = bits_float(uint32_t(largest_sq));
  }
  const float divisor = largest ? bits_float(uint32_t(largest)) : 1.0f;
  const float sq_divisor = largest_sq ? bits_float(uint32_t(largest_sq)) : 1.0f;
#pragma unroll
  for (int j = 0; j < kVectors; j++) {
    const int from = (int(threadIdx.x) % kWarp + j * kWarp) * kWidth;
    if (from >= size) continue;
    const Place at{t, begin + from, random};
    const auto bits = at.draw<kWidth>(kStreamMoments), sq_bits = swapped(bits);
    Vector<int8_t, kWidth> m_codes;
    Vector<uint8_t, kWidth> v_codes;
#pragma unroll
    for (int k = 0; k < kWidth; k++) {
      const bool finite = both_finite(m[j][k], v[j][k]);
      m_codes.at[k] = exp_avg_encode(m[j][k], finite, divisor, bits.at[k]);
      v_codes.at[k] = exp_avg_sq_encode(v[j][k], finite, sq_divisor, sq_bits.at[k]);
    }
    store(t.exp_avg, at.i, m_codes);
    store(t.exp_avg_sq, at.i, v_codes);
  }
}

// Blocks of 8-bit moments, as many as make a chunk where none of them is short.
template <class P>
__device__ void update_coded(const AdamwTensor& t, const void* grads, int64_t chunk, float factor, const AdamwHyper& h,
                             const Random& random) {
  const uintptr_t together =
      uintptr_t(t.param) | uintptr_t(grads) | uintptr_t(t.exp_avg) | uintptr_t(t.exp_avg_sq) | uintptr_t(t.residue);
  const bool aligned = (together & 15) == 0 && t.first % 4 == 0 && t.columns % 4 == 0;
  const int64_t of_row = (t.columns + kMomentBlock - 1) / kMomentBlock, all = moment_blocks(t);
  for (int j = threadIdx.x / kWarp; j < kCodedBlocks && chunk * kCodedBlocks + j < all; j += kThreads / kWarp) {
    const int64_t block = chunk * kCodedBlocks + j, row = block / of_row,
                  column = (block - row * of_row) * kMomentBlock;
    const int64_t left = t.columns - column, begin = row * t.columns + column;
    const int size = left < kMomentBlock ? int(left) : int(kMomentBlock);
    if (aligned)
      update_coded_block<P, 4>(t, grads, begin, size, block, factor, h, random);
    else
      update_coded_block<P, 1>(t, grads, begin, size, block, factor, h, random);
  }
}

// A pointer out of a table: the compiler cannot know by itself that it is not one of shared or local memory.
template <class T>
__device__ T* global(T* data) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(data));
#endif
  return data;
}

// Tensors with 8-bit moments, which are there with kCoded alone, need more registers.
template <bool kCoded>
__global__ void __launch_bounds__(kThreads, kCoded ? 4 : 5) adamw_kernel(const __grid_constant__ Step step) {
  int low = 0;  // the last tensor whose first block is not after this one
  for (int high = step.count; high - low > 1;) {
    const int middle = (low + high) / 2;
    (step.first_block[middle] <= blockIdx.x ? low : high) = middle;
  }
  const AdamwTensor& row = step.tensors[low];
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
                      row.rounding,
                      row.narrow_moments};
  const AdamwHyper h = step.hyper ? step.hyper[t.row] : step.own[t.row];
  if (h.step == 0.0f) return;  // the step is skipped
  const void* grads = global(step.grads[low]);
  const int64_t number = blockIdx.x - step.first_block[low], chunk = number * kChunk;
  const int n = int(t.numel - chunk < kChunk ? t.numel - chunk : kChunk);
  const float factor = ft_mul(h.grad_sign, *step.grad_factor);
  const Random random{step.seed, uint32_t(h.step)};
  if (kCoded && t.columns) {
    if (t.rounding == kFp32)
      update_coded<float>(t, grads, number, factor, h, random);
    else
      update_coded<uint16_t>(t, grads, number, factor, h, random);
  } else if (t.rounding == kFp32) {
    if (t.narrow_moments)
      update_chunk<float, uint16_t, 4>(t, grads, chunk, n, factor, h, random);
    else
      update_chunk<float, float, 4>(t, grads, chunk, n, factor, h, random);
  } else if (t.narrow_moments) {
    update_chunk<uint16_t, uint16_t, 8>(t, grads, chunk, n, factor, h, random);
  } else {
    update_chunk<uint16_t, float, 4>(t, grads, chunk, n, factor, h, random);
  }
}
}  // namespace
