// Launches over any number of tensors: as many at a time as a kernel's parameters hold, each with
// blocks of its own.
#pragma once
#include "first_block.h"
#include "launch.h"

namespace {
// The part of a kernel's parameters that says which blocks belong to which tensor.
template <int kTensors>
struct TensorBatch {
  static constexpr int kMost = kTensors;
  uint32_t first_block[kTensors];
  int32_t tensors;

  __device__ int tensor_of_block() const {
    return last_not_after(first_block, tensors, blockIdx.x);
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

  // Returns the place in the batch of a tensor of so many blocks.
  int add(int64_t blocks) {
    FT_CHECK(blocks <= kMostBlocks, "%s: a gradient is too large: it takes %lld blocks", operation_,
             static_cast<long long>(blocks));
    if (batch.tensors == Batch::kMost || blocks_ + blocks > kMostBlocks) flush();
    batch.first_block[batch.tensors] = uint32_t(blocks_);
    blocks_ += blocks;
    return batch.tensors++;
  }

  // Launches what has not been launched yet.
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
