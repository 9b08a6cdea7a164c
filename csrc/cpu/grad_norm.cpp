// The norm of gradients on the CPU: sums of squares of fixed chunks, added up in order, so that
// neither the number of threads nor who adds up when changes a bit.
#include <algorithm>
#include <vector>

#include "grad_norm_args.h"
#include "isa.h"

FASTFT_DECLARE_KERNEL(sum_of_squares, const void*, int64_t, bool, double*)

namespace {
using fastft::kNormChunk;

struct Chunk {
  const void* data;
  int64_t n;
  bool bf16;
};

// Writes the sum of the squares of each chunk.
void sum_chunks(const fastft::GradNormArgs& args, double* sums) {
  std::vector<Chunk> chunks;
  chunks.reserve(size_t(args.chunks));
  for (const auto& [data, numel, bf16] : args.gradients)
    for (int64_t begin = 0; begin < numel; begin += kNormChunk)
      chunks.push_back({static_cast<const char*>(data) + begin * (bf16 ? 2 : 4),
                        std::min(kNormChunk, numel - begin), bf16});
  const auto kernel = sum_of_squares_kernel();
  fastft::parallel_for(args.chunks, 1, [&](int64_t begin, int64_t end) {
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
  std::vector<double> sums(size_t(args.chunks));
  sum_chunks(args, sums.data());
  *args.result.writable() = total_of(sums.data(), args.chunks);
}

void grad_square_sums(StableIValue* stack, uint64_t nargs, uint64_t) {
  FT_CHECK(nargs == 2, "grad_square_sums_: 2 arguments expected, got %d", int(nargs));
  const fastft::GradNormArgs args(stack, "grad_square_sums_", "sums");
  args.result.check_size(args.chunks, "grad_square_sums_", "sums");
  sum_chunks(args, args.result.writable());
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
