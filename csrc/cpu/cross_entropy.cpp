// cross_entropy_rows on the CPU: checks the arguments and spreads the rows over torch's threads.
#include "cross_entropy.h"

#include "isa.h"
#include "shim.h"

FASTFT_DECLARE_KERNEL(cross_entropy_row, const fastft::CrossEntropyRow*)

namespace {
using fastft::Tensor;
using fastft::TensorList;

struct Target {
  const void* data;
  bool wide;
  explicit Target(const Tensor& target) : data(target.data()), wide(target.dtype() == aoti_torch_dtype_int64()) {}
  int64_t operator[](int64_t row) const {
    return wide ? static_cast<const int64_t*>(data)[row] : static_cast<const int32_t*>(data)[row];
  }
};

void check_rows(const Tensor& logits, const Tensor& target, const Tensor& losses, const Tensor& lse) {
  const int32_t fp32 = aoti_torch_dtype_float32(), integer = target.dtype();
  FT_CHECK(logits.dim() == 2, "cross_entropy_rows: logits must be (rows, classes)");
  FT_CHECK(logits.dtype() == fp32 || logits.dtype() == aoti_torch_dtype_bfloat16(),
           "cross_entropy_rows: logits must be float32 or bfloat16");
  FT_CHECK(logits.size(1) == 1 || logits.stride(1) == 1, "cross_entropy_rows: each row of logits must be contiguous");
  FT_CHECK(integer == aoti_torch_dtype_int64() || integer == aoti_torch_dtype_int32(),
           "cross_entropy_rows: target must be int64 or int32");
  FT_CHECK(losses.dtype() == fp32 && lse.dtype() == fp32, "cross_entropy_rows: losses and lse must be float32");
  for (const Tensor* vector : {&target, &losses, &lse})
    FT_CHECK(vector->numel() == logits.size(0) && vector->contiguous(),
             "cross_entropy_rows: target, losses and lse must be contiguous, one element a row");
}

void check_targets(const Target& target, int64_t rows, int64_t classes, int64_t ignore_index) {
  for (int64_t i = 0; i < rows; i++)
    FT_CHECK(target[i] == ignore_index || (target[i] >= 0 && target[i] < classes),
             "cross_entropy_rows: target[%lld] is %lld, not in [0, %lld)", static_cast<long long>(i),
             static_cast<long long>(target[i]), static_cast<long long>(classes));
}

void compute(const Tensor& logits, const Target& target, float* losses, float* lse, char* grad, int64_t grad_stride,
             const float* row_scale, int64_t ignore_index) {
  const int64_t rows = logits.size(0), classes = logits.size(1), stride = logits.stride(0);
  const bool bfloat16 = logits.dtype() == aoti_torch_dtype_bfloat16();
  const int64_t itemsize = bfloat16 ? 2 : 4;
  const char* data = static_cast<const char*>(logits.data());
  const auto kernel = cross_entropy_row_kernel();
  fastft::parallel_for(rows, 1 + 16384 / classes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      char* grad_row = grad ? grad + i * grad_stride * itemsize : nullptr;
      if (target[i] == ignore_index) {
        losses[i] = lse[i] = 0.0f;
        if (grad_row) std::memset(grad_row, 0, classes * itemsize);
        continue;
      }
      const float scale = row_scale ? row_scale[i] : 1.0f;
      const fastft::CrossEntropyRow job{
          data + i * stride * itemsize, grad_row, losses + i, lse + i, classes, target[i], scale, bfloat16};
      kernel(&job);
    }
  });
}

void cross_entropy_rows(StableIValue* stack, uint64_t nargs, uint64_t) {
  Tensor logits(stack[0]), target(stack[1]), losses(stack[2]), lse(stack[3]);
  TensorList grads(stack[4]), scales(stack[5]);
  FT_CHECK(nargs == 7, "cross_entropy_rows: 7 arguments expected, got %d", static_cast<int>(nargs));
  check_rows(logits, target, losses, lse);
  const int64_t rows = logits.size(0), ignore_index = fastft::as_int(stack[6]);
  const Target targets(target);
  check_targets(targets, rows, logits.size(1), ignore_index);
  char* grad_data = nullptr;
  int64_t grad_stride = 0;
  if (grads.size) {
    const Tensor grad = grads[0];
    FT_CHECK(grad.dim() == 2 && grad.size(0) == rows && grad.size(1) == logits.size(1) &&
                 grad.dtype() == logits.dtype() && (grad.size(1) == 1 || grad.stride(1) == 1),
             "cross_entropy_rows: grad must have the shape and dtype of logits, and contiguous rows");
    grad_data = static_cast<char*>(grad.mutable_data());
    grad_stride = grad.stride(0);
  }
  const float* scale = nullptr;
  if (scales.size) {
    const Tensor row_scale = scales[0];
    FT_CHECK(row_scale.numel() == rows && row_scale.contiguous() && row_scale.dtype() == aoti_torch_dtype_float32(),
             "cross_entropy_rows: row_scale must be contiguous float32, one element a row");
    scale = static_cast<const float*>(row_scale.data());
  }
  if (logits.numel())
    compute(logits, targets, static_cast<float*>(losses.mutable_data()), static_cast<float*>(lse.mutable_data()),
            grad_data, grad_stride, scale, ignore_index);
}

static fastft::Kernel kernel_cross_entropy_rows("cross_entropy_rows", cross_entropy_rows);
}  // namespace
