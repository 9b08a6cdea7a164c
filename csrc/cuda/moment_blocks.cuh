// Blocks of moments that are codes with a scale: which threads have which block, and how they find
// its scale, by shuffles.
#pragma once
#include "adamw_elements.cuh"
#include "moments_8bit.h"

namespace {
// Blocks of moments that a CUDA block has.
constexpr int kMomentBlocks = kChunk / kMomentBlock;

__host__ __device__ int64_t moment_blocks(const AdamwTensor& t) {
  return t.numel / t.columns * moment_blocks_of_row(t.columns);
}

// A block of moments: `size` elements, none where there is no such block, from `begin` on.
struct MomentBlock {
  int64_t begin, number, row;  // of its first element, and among the tensor's blocks; its row
  int size;
};

// Calls update(block) for blocks from `number` on, as many as make a chunk where none of them is
// short: kLanes lanes of a warp have a block, and the others another one meanwhile.
template <int kLanes, class Update>
__device__ void each_moment_block(const AdamwTensor& t, int64_t number, Update update) {
  const int64_t of_row = moment_blocks_of_row(t.columns), all = moment_blocks(t);
  constexpr int kTogether = kThreads / kLanes;
  for (int j = 0; j < kMomentBlocks; j += kTogether) {
    MomentBlock block{0, number + j + int(threadIdx.x) / kLanes, 0, 0};
    if (block.number < all) {
      block.row = block.number / of_row;
      const int64_t column = (block.number - block.row * of_row) * kMomentBlock;
      const int64_t left = t.columns - column;
      block.begin = block.row * t.columns + column;
      block.size = left < kMomentBlock ? int(left) : int(kMomentBlock);
    }
    update(block);
  }
}

// Says whether eight neighbours of a row can be read, drawn for and written at once.
__device__ bool in_eights(const AdamwTensor& t, const void* grads) {
  const uintptr_t together = uintptr_t(t.param) | uintptr_t(grads) | uintptr_t(t.exp_avg) |
                             uintptr_t(t.exp_avg_sq) | uintptr_t(t.residue);
  return (together & 15) == 0 && t.first % 8 == 0 && t.columns % 8 == 0;
}

// A block's scale, as the bits of its largest magnitude. As integers they order numbers; Inf and
// NaN lie above all.
struct Largest {
  uint32_t bits = 0;

  __device__ void take(uint32_t magnitude) { bits = magnitude > bits ? magnitude : bits; }
  __device__ void take(float value) { take(uint32_t(magnitude(value))); }

  // Of kLanes neighbours, for each of them.
  template <int kLanes>
  __device__ void reduce() {
#pragma unroll
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2)
      take(__shfl_xor_sync(0xffffffffu, bits, lanes));
  }
  __device__ float scale() const { return bits_float(bits); }
  __device__ float divisor() const { return bits ? scale() : 1.0f; }
  // Says whether the scale is a number and its reciprocal is, too.
  __device__ bool plain() const {
    return divisor() >= FASTFT_SMALL_SCALE && divisor() <= bits_float(0x7f7fffffu);
  }
};

// Says whether it is so in all blocks of a warp: one answer, where shuffles are behind it.
template <int kLanes>
__device__ bool in_whole_warp(bool so) {
  for (int other = kLanes; other < kWarp; other *= 2)
    so &= __shfl_xor_sync(0xffffffffu, uint32_t(so), other) != 0;
  return so;
}
}  // namespace
