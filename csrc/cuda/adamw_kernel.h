// The CUDA kernel of AdamW: each block a chunk of one tensor, the arithmetic that of adamw_math.h, element by element.
// A warp has a block of 8-bit moments to itself, and finds its largest moments by shuffles before it rounds them.
//
// Memory-bound, bytes in adamw_update.py: accesses are of 16 bytes, and of 8 or 4 where narrower values lie beside fp32
// ones, but for the last elements of a tensor, for tensors that do not begin on 16 bytes, and for 8-bit moments in rows
// of another length than a multiple of four. Not yet run on a GPU.
#pragma once
#include <cuda_bf16.h>

#include <cmath>

#include "adamw_math.h"
#include "coded_moments.h"
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

// The random bits of kWidth elements, two a word.
template <int kWidth>
struct Drawn {
  uint32_t words[kWidth < 2 ? 1 : kWidth / 2];
  __device__ uint16_t at(int k) const { return uint16_t(k % 2 ? words[k / 2] >> 16 : words[k / 2]); }
};

struct Random {
  uint64_t seed;
  uint32_t step;

  // Of the elements from the one with global index `element` on, which is a multiple of kWidth.
  template <int kWidth>
  __device__ Drawn<kWidth> draw(uint32_t stream, uint64_t element) const {
    uint32_t all[4];
    philox_words(element / 8, step, stream, seed, all);
    Drawn<kWidth> own;
    if constexpr (kWidth == 8) {
#pragma unroll
      for (int i = 0; i < 4; i++) own.words[i] = all[i];
    } else {  // no index, which would put the words into local memory
      const uint32_t low = element & 4 ? all[2] : all[0], high = element & 4 ? all[3] : all[1];
      if constexpr (kWidth == 4)
        own.words[0] = low, own.words[1] = high;
      else
        own.words[0] = (element & 2 ? high : low) >> (element % 2 * 16);
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
  __device__ Drawn<kWidth> draw(uint32_t stream) const {
    return random.draw<kWidth>(stream, uint64_t(t.first + i));
  }
};

// Stores the upper or lower halves of words.
template <bool kUpper, int kWidth>
__device__ void store_halves(void* data, int64_t i, const uint32_t (&words)[kWidth]) {
  if constexpr (kWidth == 1) {
    static_cast<uint16_t*>(data)[i] = uint16_t(kUpper ? words[0] >> 16 : words[0]);
  } else {
    Vector<uint32_t, kWidth / 2> kept;
#pragma unroll
    for (int k = 0; k < kWidth / 2; k++)
      kept.at[k] = permuted(words[2 * k], words[2 * k + 1], kUpper ? 0x7632 : 0x5410);
    store(static_cast<uint16_t*>(data) + i, 0, kept);
  }
}

// Stores numbers, none of them NaN (which the chip gives other bits than we do), as the nearest bfloat16.
template <int kWidth>
__device__ void store_nearest(void* data, int64_t i, const float (&numbers)[kWidth]) {
  if constexpr (kWidth == 1) {
    static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(numbers[0]);
  } else {
    Vector<uint32_t, kWidth / 2> kept;
#pragma unroll
    for (int k = 0; k < kWidth / 2; k++) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(numbers[2 * k], numbers[2 * k + 1]);
      kept.at[k] = reinterpret_cast<const uint32_t&>(pair);
    }
    store(static_cast<uint16_t*>(data) + i, 0, kept);
  }
}

// Stores values of a Place, of a kind that the last argument names: floats as they are, bfloat16 rounded
// stochastically, with the bytes of the random numbers swapped where kSwapped.
template <bool kSwapped, int kWidth>
__device__ void store_rounded(const Place& at, void* data, const Drawn<kWidth>&, const float (&values)[kWidth], float) {
  Vector<float, kWidth> kept;
#pragma unroll
  for (int k = 0; k < kWidth; k++) kept.at[k] = values[k];
  store(data, at.i, kept);
}

template <bool kSwapped, int kWidth>
__device__ void store_rounded(const Place& at, void* data, const Drawn<kWidth>& bits, const float (&values)[kWidth],
                              uint16_t) {
  uint32_t sums[kWidth];
#pragma unroll
  for (int k = 0; k < kWidth; k++) {
    const uint32_t word = bits.words[k / 2];
    const uint32_t number = kSwapped ? permuted(word, 0, k % 2 ? 0x4423 : 0x4401) : k % 2 ? word >> 16 : word & 0xffffu;
    sums[k] = bf16_sum(values[k], number);
  }
  store_halves<true>(data, at.i, sums);
}

// kWidth neighbours as they were read: floats, or bfloat16 values that become floats one by one.
template <class T, int kWidth>
struct Neighbours {
  Vector<float, kWidth> read{};
  __device__ float at(int k) const { return read.at[k]; }
};

template <int kWidth>
struct Neighbours<uint16_t, kWidth> {
  Vector<uint32_t, kWidth / 2> read{};
  __device__ float at(int k) const { return bits_float(k % 2 ? read.at[k / 2] & 0xffff0000u : read.at[k / 2] << 16); }
  __device__ int32_t signed_at(int k) const { return int32_t(k % 2 ? read.at[k / 2] : read.at[k / 2] << 16) >> 16; }
};

template <>
struct Neighbours<uint16_t, 1> {
  Vector<uint16_t, 1> read{};
  __device__ float at(int) const { return bf16_to_float(read.at[0]); }
  __device__ int32_t signed_at(int) const { return int16_t(read.at[0]); }
};

template <class T, int kWidth>
__device__ Neighbours<T, kWidth> neighbours(const void* data, int64_t i) {
  if constexpr (sizeof(T) == 4)
    return {load<kWidth, float>(data, i)};
  else if constexpr (kWidth == 1)
    return {load<1, uint16_t>(data, i)};
  else
    return {load<kWidth / 2, uint32_t>(static_cast<const uint16_t*>(data) + i, 0)};
}

template <int kWidth>
__device__ void load_param(const Place& at, float (&values)[kWidth], float) {
  const auto kept = neighbours<float, kWidth>(at.t.param, at.i);
#pragma unroll
  for (int k = 0; k < kWidth; k++) values[k] = kept.at(k);
}

template <int kWidth>
__device__ void load_param(const Place& at, float (&values)[kWidth], uint16_t) {
  const auto kept = neighbours<uint16_t, kWidth>(at.t.param, at.i);
#pragma unroll
  for (int k = 0; k < kWidth; k++) values[k] = kept.at(k);
  if (at.t.rounding != kExact && at.t.rounding != kKahan) return;
  const auto residue = neighbours<uint16_t, kWidth>(at.t.residue, at.i);
#pragma unroll
  for (int k = 0; k < kWidth; k++) {
    if (at.t.rounding == kExact) {
      const float master = bits_float(float_bits(values[k]) + uint32_t(residue.signed_at(k)));
      values[k] = master == master ? master : values[k];  // as master_join
    } else {
      values[k] = ft_add(values[k], residue.at(k));
    }
  }
}

template <int kWidth>
__device__ void store_param(const Place& at, const float (&values)[kWidth], float) {
  store_rounded<false>(at, at.t.param, Drawn<kWidth>{}, values, 0.0f);
}

template <int kWidth>
__device__ void store_param(const Place& at, const float (&values)[kWidth], uint16_t) {
  if (at.t.rounding == kStochastic) {
    store_rounded<false>(at, at.t.param, at.draw<kWidth>(kStreamParam), values, uint16_t());
    return;
  }
  uint32_t words[kWidth];
#pragma unroll
  for (int k = 0; k < kWidth; k++) words[k] = master_bits(values[k]);
  if (at.t.rounding == kExact) {
    store_halves<false>(at.t.residue, at.i, words);
#pragma unroll
    for (int k = 0; k < kWidth; k++) words[k] += 0x8000u;
  } else {
#pragma unroll
    for (int k = 0; k < kWidth; k++) words[k] = bf16_nearest_sum(bits_float(words[k]));
  }
  store_halves<true>(at.t.param, at.i, words);
  if (at.t.rounding != kKahan) return;
  float compensations[kWidth];
#pragma unroll
  for (int k = 0; k < kWidth; k++)
    compensations[k] = finite_or_zero(ft_sub(values[k], bits_float(words[k] & 0xffff0000u)));
  store_nearest(at.t.residue, at.i, compensations);
}

// Elements [begin, end) of a chunk, kWidth at a time, of a tensor that is kept as P with moments that are kept as M.
template <class P, class M, int kWidth>
__device__ void update(const AdamwTensor& t, const void* grads, int64_t chunk, int begin, int end, float factor,
                       const AdamwHyper& h, const Random& random) {
  for (int k0 = begin + threadIdx.x * kWidth; k0 < end; k0 += kThreads * kWidth) {
    const Place at{t, chunk + k0, random};
    float p[kWidth], m[kWidth], v[kWidth], w[kWidth];
    const auto g = neighbours<P, kWidth>(grads, at.i);
    const auto old_m = neighbours<M, kWidth>(t.exp_avg, at.i), old_v = neighbours<M, kWidth>(t.exp_avg_sq, at.i);
    Neighbours<M, kWidth> old_w{};
    if (t.max_exp_avg_sq) old_w = neighbours<M, kWidth>(t.max_exp_avg_sq, at.i);
    load_param(at, p, P());
#pragma unroll
    for (int k = 0; k < kWidth; k++) {
      m[k] = old_m.at(k), v[k] = old_v.at(k);
      w[k] = t.max_exp_avg_sq ? old_w.at(k) : -INFINITY;  // below every second moment: as without amsgrad
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
__device__ void update_chunk(const AdamwTensor& t, const void* grads, int64_t chunk, int n, float factor,
                             const AdamwHyper& h, const Random& random) {
  const uintptr_t together = uintptr_t(t.param) | uintptr_t(grads) | uintptr_t(t.exp_avg) | uintptr_t(t.exp_avg_sq) |
                             uintptr_t(t.max_exp_avg_sq) | uintptr_t(t.residue);
  const bool aligned = (together & 15) == 0 && t.first % 8 == 0;
  const int vectors = aligned ? n / kWidth * kWidth : 0;
  update<P, M, kWidth>(t, grads, chunk, 0, vectors, factor, h, random);
  update<P, M, 1>(t, grads, chunk, vectors, n, factor, h, random);
}

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
  return t.numel / t.columns * ((t.columns + kMomentBlock - 1) / kMomentBlock);
}

// A block of 8-bit moments: `size` elements, none where there is no such block, from `begin` on.
struct CodedBlock {
  int64_t begin, number;  // of its first element, and among the tensor's blocks
  int size;
};

// What the scales of a block are, and what its moments are divided by.
struct Scales {
  uint32_t largest = 0, largest_sq = 0;  // the bits of |m| and v: of numbers that are none above those of any that is

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
    t.exp_avg_scale[block] = bits_float(largest), t.exp_avg_sq_scale[block] = bits_float(largest_sq);
  }
  __device__ float divisor() const { return largest ? bits_float(largest) : 1.0f; }
  __device__ float sq_divisor() const { return largest_sq ? bits_float(largest_sq) : 1.0f; }
  // Whether all values are numbers and the reciprocals of the scales are, too.
  __device__ bool plain() const {
    const float most = bits_float(0x7f7fffffu), m = divisor(), v = sq_divisor();
    return m >= FASTFT_SMALL_SCALE && m <= most && v >= FASTFT_SMALL_SCALE && v <= most;
  }
};

// Eight elements from `at` on, which have been updated: their moments become codes.
__device__ void store_codes(const Place& at, const float (&m)[8], const float (&v)[8], const Drawn<8>& random,
                            const Scales& scales, bool plain) {
  Vector<uint32_t, 2> m_codes, v_codes;
  bool sure = false;
  if (plain)
    sure = encode_eight(m, v, ft_div(1.0f, scales.divisor()), ft_div(1.0f, scales.sq_divisor()), random.words,
                        m_codes.at, v_codes.at);
  if (!sure) {
    m_codes = v_codes = {};
#pragma unroll
    for (int k = 0; k < 8; k++) {
      const bool finite = both_finite(m[k], v[k]);
      const uint16_t bits = random.at(k);
      const uint8_t code = uint8_t(exp_avg_encode(m[k], finite, scales.divisor(), bits));
      const uint8_t sq_code = exp_avg_sq_encode(v[k], finite, scales.sq_divisor(), swap_bytes(bits));
      m_codes.at[k / 4] |= uint32_t(code) << k % 4 * 8, v_codes.at[k / 4] |= uint32_t(sq_code) << k % 4 * 8;
    }
  }
  store(static_cast<int8_t*>(at.t.exp_avg) + at.i, 0, m_codes);
  store(static_cast<uint8_t*>(at.t.exp_avg_sq) + at.i, 0, v_codes);
}

__device__ void store_codes(const Place& at, const float (&m)[1], const float (&v)[1], const Drawn<1>& random,
                            const Scales& scales, bool) {
  const bool finite = both_finite(m[0], v[0]);
  const uint16_t bits = random.at(0);
  static_cast<int8_t*>(at.t.exp_avg)[at.i] = exp_avg_encode(m[0], finite, scales.divisor(), bits);
  static_cast<uint8_t*>(at.t.exp_avg_sq)[at.i] = exp_avg_sq_encode(v[0], finite, scales.sq_divisor(), swap_bytes(bits));
}

__device__ void load_codes(const Place& at, float m_scale, float v_scale, float (&m)[8], float (&v)[8]) {
  const auto m_codes = load<2, uint32_t>(static_cast<const int8_t*>(at.t.exp_avg) + at.i, 0);
  const auto v_codes = load<2, uint32_t>(static_cast<const uint8_t*>(at.t.exp_avg_sq) + at.i, 0);
  decode_eight(m_codes.at, v_codes.at, m_scale, v_scale, m, v);
}

__device__ void load_codes(const Place& at, float m_scale, float v_scale, float (&m)[1], float (&v)[1]) {
  m[0] = exp_avg_decode(static_cast<const int8_t*>(at.t.exp_avg)[at.i], m_scale);
  v[0] = exp_avg_sq_decode(static_cast<const uint8_t*>(at.t.exp_avg_sq)[at.i], v_scale);
}

// kLanes lanes of a warp update a block, kWidth neighbours each at a time; the others do so with another block.
template <class P, int kWidth, int kLanes>
__device__ void update_coded_block(const AdamwTensor& t, const void* grads, const CodedBlock& block, float factor,
                                   const AdamwHyper& h, const Random& random) {
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
        if (first + j * kLanes * kWidth < block.size && both_finite(m[j][k], v[j][k])) scales.take(m[j][k], v[j][k]);
    scales.reduce<kLanes>();
  }
  if (there && first == 0) scales.store(t, block.number);
#pragma unroll
  for (int j = 0; j < kVectors; j++) {
    const int from = first + j * kLanes * kWidth;
    if (from < block.size) store_codes({t, block.begin + from, random}, m[j], v[j], drawn[j], scales, plain);
  }
}

// Blocks of 8-bit moments from `number` on, as many as make a chunk where none of them is short.
template <class P, int kWidth, int kLanes>
__device__ void update_coded_blocks(const AdamwTensor& t, const void* grads, int64_t number, float factor,
                                    const AdamwHyper& h, const Random& random) {
  const int64_t of_row = (t.columns + kMomentBlock - 1) / kMomentBlock, all = moment_blocks(t);
  constexpr int kTogether = kThreads / kLanes;
  for (int j = 0; j < kCodedBlocks; j += kTogether) {
    CodedBlock block{0, number + j + int(threadIdx.x) / kLanes, 0};
    if (block.number < all) {
      const int64_t row = block.number / of_row, column = (block.number - row * of_row) * kMomentBlock;
      const int64_t left = t.columns - column;
      block.begin = row * t.columns + column;
      block.size = left < kMomentBlock ? int(left) : int(kMomentBlock);
    }
    update_coded_block<P, kWidth, kLanes>(t, grads, block, factor, h, random);
  }
}

template <class P>
__device__ void update_coded(const AdamwTensor& t, const void* grads, int64_t chunk, float factor, const AdamwHyper& h,
                             const Random& random) {
  const uintptr_t together =
      uintptr_t(t.param) | uintptr_t(grads) | uintptr_t(t.exp_avg) | uintptr_t(t.exp_avg_sq) | uintptr_t(t.residue);
  if ((together & 15) == 0 && t.first % 8 == 0 && t.columns % 8 == 0)
    update_coded_blocks<P, 8, 16>(t, grads, chunk * kCodedBlocks, factor, h, random);
  else
    update_coded_blocks<P, 1, kWarp>(t, grads, chunk * kCodedBlocks, factor, h, random);
}

// A pointer out of a table: the compiler cannot know by itself that it is not one of shared or local memory.
template <class T>
__device__ T* global(T* data) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(data));
#endif
  return data;
}

// The tensor of this block: the last one whose first block is not after it. Each warp asks 32 places at a time, so that
// two loads, one after the other, find one of a thousand tensors.
__device__ int tensor_of_block(const Step& step) {
  const int lane = int(threadIdx.x) % kWarp;
  int low = 0;
  for (int end = step.count; end - low > 1;) {
    const int part = (end - low + kWarp - 1) / kWarp, place = low + lane * part;
    const bool not_after = place < end && step.first_block[place] <= blockIdx.x;
    low += (__popc(__ballot_sync(0xffffffffu, not_after)) - 1) * part;
    end = end - low < part ? end : low + part;
  }
  return low;
}

// How the tensors of a launch are kept: all of them rounded as this AdamwRounding says, with float32 moments, which the
// compiler then knows; or in any way without 8-bit moments; or in any way. The more ways, the more registers.
constexpr int kUncoded = kNearest + 1, kAnyhow = kUncoded + 1;
constexpr int blocks_of_processor(int kept) { return kept == kAnyhow ? 4 : kept == kUncoded ? 5 : 6; }

template <int kKept>
__global__ void __launch_bounds__(kThreads, blocks_of_processor(kKept))
    adamw_kernel(const __grid_constant__ Step step) {
  const int tensor = tensor_of_block(step);
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
                      kKept < kUncoded ? AdamwRounding(kKept) : row.rounding,
                      kKept < kUncoded ? false : row.narrow_moments};
  const AdamwHyper h = step.hyper ? step.hyper[t.row] : step.own[t.row];
  if (h.step == 0.0f) return;  // the step is skipped
  const void* grads = global(step.grads[tensor]);
  const int64_t number = blockIdx.x - step.first_block[tensor], chunk = number * kChunk;
  const int n = int(t.numel - chunk < kChunk ? t.numel - chunk : kChunk);
  const float factor = ft_mul(h.grad_sign, *step.grad_factor);
  const Random random{step.seed, uint32_t(h.step)};
  if (kKept == kAnyhow && t.columns) {
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
