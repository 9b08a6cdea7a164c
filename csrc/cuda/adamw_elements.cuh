// Elements of an AdamW tensor as a thread reads, draws for and writes them: kWidth neighbours at
// once, float32 inside.
#pragma once
#include "adamw_math.h"
#include "launch.h"
#include "moments_8bit.cuh"
#include "philox.h"
#include "vectors.cuh"

namespace {
constexpr int kThreads = 128, kWarp = 32;  // of a block
constexpr int kChunk = 4096;               // elements of a block

// The random bits of kWidth elements, two a word.
template <int kWidth>
struct Drawn {
  uint32_t words[kWidth < 2 ? 1 : kWidth / 2];
  __device__ uint16_t at(int k) const {
    return uint16_t(k % 2 ? words[k / 2] >> 16 : words[k / 2]);
  }
};

struct Random {
  uint64_t seed;
  uint32_t step;

  // Draws for the elements from global index `element` on, which is a multiple of kWidth.
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

// The place of a thread: element `i` of tensor `t`.
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

// Stores numbers, none of them NaN (which the chip gives other bits than we do), as the nearest
// bfloat16.
template <int kWidth>
__device__ void store_nearest(void* data, int64_t i, const float (&numbers)[kWidth]) {
  if constexpr (kWidth == 1) {
    put(static_cast<__nv_bfloat16*>(data) + i, numbers[0]);
  } else {
    Vector<uint32_t, kWidth / 2> kept;
#pragma unroll
    for (int k = 0; k < kWidth / 2; k++)
      kept.at[k] = pack<__nv_bfloat16>(numbers[2 * k], numbers[2 * k + 1]);
    store(static_cast<uint16_t*>(data) + i, 0, kept);
  }
}

// Stores values of a Place, of a kind that the last argument names: floats as they are, bfloat16
// rounded stochastically, with the bytes of the random numbers swapped where kSwapped.
template <bool kSwapped, int kWidth>
__device__ void store_rounded(const Place& at, void* data, const Drawn<kWidth>&,
                              const float (&values)[kWidth], float) {
  Vector<float, kWidth> kept;
#pragma unroll
  for (int k = 0; k < kWidth; k++) kept.at[k] = values[k];
  store(data, at.i, kept);
}

template <bool kSwapped, int kWidth>
__device__ void store_rounded(const Place& at, void* data, const Drawn<kWidth>& bits,
                              const float (&values)[kWidth], uint16_t) {
  uint32_t sums[kWidth];
#pragma unroll
  for (int k = 0; k < kWidth; k++) {
    const uint32_t word = bits.words[k / 2];
    const uint32_t plain = k % 2 ? word >> 16 : word & 0xffffu;
    const uint32_t swapped = permuted(word, 0, k % 2 ? 0x4423 : 0x4401);
    sums[k] = bf16_stochastic_sum(values[k], kSwapped ? swapped : plain);
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
  __device__ float at(int k) const {
    return k % 2 ? bf16_upper(read.at[k / 2]) : bf16_lower(read.at[k / 2]);
  }
  __device__ int32_t signed_at(int k) const {
    return int32_t(k % 2 ? read.at[k / 2] : read.at[k / 2] << 16) >> 16;
  }
};

template <>
struct Neighbours<uint16_t, 1> {
  Vector<uint16_t, 1> read{};
  __device__ float at(int) const { return widened(read.at[0]); }
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
    if (at.t.rounding == kExact)
      values[k] = master_join(values[k], residue.signed_at(k));
    else
      values[k] = ft_add(values[k], residue.at(k));
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
    for (int k = 0; k < kWidth; k++) words[k] = bf16_nearest_sum(words[k]);
  }
  store_halves<true>(at.t.param, at.i, words);
  if (at.t.rounding != kKahan) return;
  float compensations[kWidth];
#pragma unroll
  for (int k = 0; k < kWidth; k++)
    compensations[k] = finite_or_zero(ft_sub(values[k], bf16_upper(words[k])));
  store_nearest(at.t.residue, at.i, compensations);
}
}  // namespace
