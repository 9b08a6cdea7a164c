// The norm of gradients on the CPU: sums of squares of fixed chunks, added up in order, so that
// neither the number of threads nor who adds up when changes a bit.
#include "grad_norm.h"

#include <algorithm>
#include <vector>

#include "isa.h"

FASTFT_DECLARE_KERNEL(sum_of_squares, const void*, int64_t, bool, double*)

namespace {
using fastft::kNormChunk;

struct Chunk {
  const void* data;
  int64_t n;
  bool bf16;
};

// Writes the sum of the squares of each of so many chunks.
void sum_chunks(const std::vector<fastft::Gradient>& gradients, int64_t count, double* sums) {
  std::vector<Chunk> chunks;
  chunks.reserve(size_t(count));
  for (const auto& [data, numel, bf16] : gradients)
    for (int64_t begin = 0; begin < numel; begin += kNormChunk)
      chunks.push_back({static_cast<const char*>(data) + begin * (bf16 ? 2 : 4),
                        std::min(kNormChunk, numel - begin), bf16});
  const auto kernel = sum_of_squares_kernel();
  fastft::parallel_for(count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      kernel(chunks[i].data, chunks[i].n, chunks[i].bf16, &sums[i]);
  });
}

double total_of(const double* sums, int64_t count) {
  double total = 0;
  for (int64_t i = 0; i < count; i++) total += sums[i];
  return total;
}

void grad_norm_squared(StableIValue* stack, uint64_t nargs, uint64_t) {
  FT_CHECK(nargs == 2, "grad_norm_squared_: 2 arguments expected, got %d", int(nargs));
  const fastft::GradNormArgs args(stack, "grad_norm_squared_", "total");
  args.result.check_size(1, "grad_norm_squared_", "total");
  *args.result.writable() = fastft::squares_of(args.gradients, args.chunks);
}

void grad_square_sums(StableIValue* stack, uint64_t nargs, uint64_t) {
  FT_CHECK(nargs == 2, "grad_square_sums_: 2 arguments expected, got %d", int(nargs));
  const fastft::GradNormArgs args(stack, "grad_square_sums_", "sums");
  args.result.check_size(args.chunks, "grad_square_sums_", "sums");
  sum_chunks(args.gradients, args.chunks, args.result.writable());
}

void grad_norm_total(StableIValue* stack, uint64_t nargs, uint64_t) {
  FT_CHECK(nargs == 2, "grad_norm_total_: 2 arguments expected, got %d", int(nargs));
  fastft::Tensor tensors[] = {fastft::Tensor(stack[0]), fastft::Tensor(stack[1])};
  const fastft::Doubles total(std::move(tensors[0]), "grad_norm_total_", "total");
  const fastft::Doubles sums(std::move(tensors[1]), "grad_norm_total_", "sums");
  total.check_size(1, "grad_norm_total_", "total");
  *total.writable() = total_of(sums.data(), sums.size);
}

fastft::Kernel kernel_grad_norm("grad_norm_squared_", grad_norm_squared);
fastft::Kernel kernel_square_sums("grad_square_sums_", grad_square_sums);
fastft::Kernel kernel_norm_total("grad_norm_total_", grad_norm_total);
}  // namespace

double fastft::squares_of(const std::vector<Gradient>& gradients, int64_t chunks) {
  std::vector<double> sums(static_cast<size_t>(chunks));
  sum_chunks(gradients, chunks, sums.data());
  return total_of(sums.data(), chunks);
}
