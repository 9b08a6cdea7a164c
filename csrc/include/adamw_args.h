// Reads and checks the arguments of fastft::adamw_ for the CPU and the CUDA launcher.
#pragma once
#include <vector>

#include "adamw_math.h"
#include "shim.h"

namespace fastft {
struct AdamwTensor {
  void* param;
  const void* grad;
  float* exp_avg;
  float* exp_avg_sq;
  int16_t* remainder;  // nullptr for an fp32 parameter
  int64_t numel;
  const AdamwHyper* hyper;
};

// Whether elements at the same memory offset belong together: all contiguous, or all with the same dense strides.
inline bool same_layout(const Tensor& a, const Tensor& b) {
  if (a.contiguous() && b.contiguous()) return true;
  const int64_t dim = a.dim();
  int64_t span = 1;
  for (int64_t d = 0; d < dim; d++) {
    const int64_t size = a.size(d);
    if (size != b.size(d) || (size > 1 && a.stride(d) != b.stride(d))) return false;
    span += (size - 1) * a.stride(d);
  }
  return span == a.numel();
}

// adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] remainders,
//        Tensor hyper, int[] counts)
struct AdamwArgs {
  TensorList params, grads, exp_avgs, exp_avg_sqs, remainders;
  Tensor hyper;
  TensorList counts;
  std::vector<AdamwTensor> tensors;
  int32_t device_index = -1;

  explicit AdamwArgs(StableIValue* stack)
      : params(stack[0]),
        grads(stack[1]),
        exp_avgs(stack[2]),
        exp_avg_sqs(stack[3]),
        remainders(stack[4]),
        hyper(stack[5]),
        counts(stack[6]) {
    const size_t n = params.size;
    FT_CHECK(grads.size == n && exp_avgs.size == n && exp_avg_sqs.size == n,
             "adamw_: lists of %zu, %zu, %zu and %zu tensors", n, grads.size, exp_avgs.size, exp_avg_sqs.size);
    FT_CHECK(hyper.dtype() == aoti_torch_dtype_float32() && hyper.contiguous() && hyper.dim() == 2 &&
                 hyper.size(1) * sizeof(float) == sizeof(AdamwHyper) && size_t(hyper.size(0)) == counts.size,
             "adamw_: hyper must be a contiguous float32 table with one row of 8 for each count");
    tensors.reserve(n);
    size_t next_remainder = 0;
    const AdamwHyper* row = static_cast<const AdamwHyper*>(hyper.data());
    for (size_t segment = 0; segment < counts.size; segment++, row++) {
      StableIValue count;
      FT_CALL(torch_list_get_item(counts.handle, segment, &count));
      FT_CHECK(as_int(count) >= 0 && size_t(as_int(count)) <= n - tensors.size(),
               "adamw_: the counts exceed %zu tensors", n);
      for (int64_t k = 0; k < as_int(count); k++) read(tensors.size(), row, next_remainder);
    }
    FT_CHECK(tensors.size() == n && next_remainder == remainders.size,
             "adamw_: %zu tensors and %zu remainders are left over", n - tensors.size(),
             remainders.size - next_remainder);
  }

 private:
  void read(size_t i, const AdamwHyper* row, size_t& next_remainder) {
    const Tensor param = params[i], grad = grads[i], exp_avg = exp_avgs[i], exp_avg_sq = exp_avg_sqs[i];
    const int64_t numel = param.numel();
    const bool wide = param.dtype() == aoti_torch_dtype_float32();
    FT_CHECK((wide || param.dtype() == aoti_torch_dtype_bfloat16()) && grad.dtype() == param.dtype(),
             "adamw_: tensor %zu: parameter and gradient must both be float32 or both be bfloat16", i);
    check(i, param, exp_avg, aoti_torch_dtype_float32(), "exp_avg");
    check(i, param, exp_avg_sq, aoti_torch_dtype_float32(), "exp_avg_sq");
    check(i, param, grad, param.dtype(), "gradient");
    int16_t* remainder_data = nullptr;
    if (!wide) {
      FT_CHECK(next_remainder < remainders.size, "adamw_: bfloat16 tensor %zu has no remainder", i);
      const Tensor remainder = remainders[next_remainder++];
      check(i, param, remainder, aoti_torch_dtype_int16(), "remainder");
      remainder_data = static_cast<int16_t*>(remainder.mutable_data());
    }
    if (i == 0) device_index = param.device_index();
    tensors.push_back({param.mutable_data(), grad.data(), static_cast<float*>(exp_avg.mutable_data()),
                       static_cast<float*>(exp_avg_sq.mutable_data()), remainder_data, numel, row});
  }

  static void check(size_t i, const Tensor& param, const Tensor& other, int32_t dtype, const char* what) {
    FT_CHECK(other.dtype() == dtype && other.numel() == param.numel() && other.device_index() == param.device_index() &&
                 other.dim() == param.dim() && same_layout(param, other),
             "adamw_: tensor %zu: the %s does not have the parameter's shape, strides and device or has a wrong dtype",
             i, what);
  }
};
}  // namespace fastft
