// fastft::grad_norm_squared_ on the CPU: sums of squares of fixed chunks, added up in order, so
// that the number of threads changes no bit.
#include <algorithm>
#include <vector>

#include "grad_norm_args.h"
#include "isa.h"

FASTFT_DECLARE_KERNEL(sum_of_squares, const void*, int64_t, bool, double*)

namespace {
constexpr int64_t kChunk = 16384;  // elements

struct Chunk {
  const void* data;
  int64_t n;
  bool bf16;
};

void grad_norm_squared(StableIValue* stack, uint64_t nargs, uint64_t) {
  FT_CHECK(nargs == 2, "grad_norm_squared_: 2 arguments expected, got %d", int(nargs));
  const fastft::GradNormArgs args(stack);
  std::vector<Chunk> chunks;
  chunks.reserve(args.gradients.size());
  for (const auto& [data, numel, bf16] : args.gradients)
    for (int64_t begin = 0; begin < numel; begin += kChunk)
      chunks.push_back({static_cast<const char*>(data) + begin * (bf16 ? 2 : 4),
                        std::min(kChunk, numel - begin), bf16});
  std::vector<double> sums(chunks.size());
  const auto kernel = sum_of_squares_kernel();
  fastft::parallel_for(int64_t(chunks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      kernel(chunks[i].data, chunks[i].n, chunks[i].bf16, &sums[i]);
  });
  double result = 0;
  for (const double sum : sums) result += sum;
  *args.total = result;
}

fastft::Kernel kernel_grad_norm("grad_norm_squared_", grad_norm_squared);
}  // namespace
