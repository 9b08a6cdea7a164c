// fastft::grad_norm_squared_ on the CPU: sums of squares of fixed chunks, added up in order, so
// that the number of threads changes no bit.
#include <algorithm>
#include <vector>

#include "isa.h"
#include "shim.h"

FASTFT_DECLARE_KERNEL(sum_of_squares, const void*, int64_t, bool, double*)

namespace {
constexpr int64_t kChunk = 16384;  // elements

struct Chunk {
  const char* data;
  int64_t n;
  bool narrow;
};

void append(std::vector<Chunk>& chunks, const fastft::Tensor& grad, size_t i) {
  const bool narrow = grad.dtype() == aoti_torch_dtype_bfloat16();
  FT_CHECK((narrow || grad.dtype() == aoti_torch_dtype_float32()) && grad.contiguous(),
           "grad_norm_squared_: gradient %zu is not a contiguous float32 or bfloat16 tensor", i);
  const int64_t numel = grad.numel();
  const char* data = static_cast<const char*>(grad.data());
  for (int64_t begin = 0; begin < numel; begin += kChunk)
    chunks.push_back({data + begin * (narrow ? 2 : 4), std::min(kChunk, numel - begin), narrow});
}

// grad_norm_squared_(Tensor(a!) total, Tensor[] grads)
void grad_norm_squared(StableIValue* stack, uint64_t nargs, uint64_t) {
  FT_CHECK(nargs == 2, "grad_norm_squared_: 2 arguments expected, got %d", int(nargs));
  const fastft::Tensor total(stack[0]);
  const fastft::TensorList grads(stack[1]);
  FT_CHECK(total.dtype() == aoti_torch_dtype_float64() && total.numel() == 1,
           "grad_norm_squared_: total must be one float64");
  std::vector<Chunk> chunks;
  chunks.reserve(grads.size);
  for (size_t i = 0; i < grads.size; i++) append(chunks, grads[i], i);
  std::vector<double> sums(chunks.size());
  const auto kernel = sum_of_squares_kernel();
  fastft::parallel_for(int64_t(chunks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      kernel(chunks[i].data, chunks[i].n, chunks[i].narrow, &sums[i]);
  });
  double result = 0;
  for (const double sum : sums) result += sum;
  *static_cast<double*>(total.mutable_data()) = result;
}

fastft::Kernel kernel_grad_norm("grad_norm_squared_", grad_norm_squared);
}  // namespace
