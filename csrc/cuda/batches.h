// Launches over any number of tensors: as many at a time as a kernel's parameters hold, each with
// blocks of its own.
#pragma once
#include "launch.h"

namespace {
// The part of a kernel's parameters that says which blocks belong to which tensor.
template <int kTensors>
struct TensorBatch {
  static constexpr int kMost = kTensors;
  uint32_t first_block[kTensors];
  int32_t tensors;

  // The tensor of this block: the last one whose first block is not after it.
  __device__ int tensor_of_block() const {
    int low = 0;
    for (int high = tensors; high - low > 1;) {
      const int middle = (low + high) / 2;
      (first_block[middle] <= blockIdx.x ? low : high) = middle;
    }
    return low;
  }
};

// Fills a Batch, which is a TensorBatch and more, and hands it with its number of blocks to
// `launch` when it is full.
template <class Batch, class Launch>
class Batches {
 public:
  Batches(const char* operation, const Batch& batch, Launch launch)
      : batch(batch), operation_(operation), launch_(launch) {}

  Batch batch;

  // Where in the batch a tensor of so many blocks goes.
  int add(int64_t blocks) {
    FT_CHECK(blocks <= kMostBlocks, "%s: a gradient is too large: it takes %lld blocks", operation_,
             static_cast<long long>(blocks));
    if (batch.tensors == Batch::kMost || blocks_ + blocks > kMostBlocks) flush();
    batch.first_block[batch.tensors] = uint32_t(blocks_);
    blocks_ += blocks;
    return batch.tensors++;
  }

  // Launches what has not been yet.
  void flush() {
    if (blocks_ > 0) launch_(batch, unsigned(blocks_));
    batch.tensors = 0;
    blocks_ = 0;
  }

 private:
  static constexpr int64_t kMostBlocks = (int64_t(1) << 31) - 1;  // of a launch
  const char* operation_;
  Launch launch_;
  int64_t blocks_ = 0;
};
}  // namespace
