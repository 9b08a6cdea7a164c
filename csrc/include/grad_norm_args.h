// Reads and checks the arguments of fastft::grad_norm_squared_ for the CPU and the CUDA launcher.
#pragma once
#include <vector>

#include "shim.h"

namespace fastft {
// grad_norm_squared_(Tensor(a!) total, Tensor[] grads) -> ()
class GradNormArgs {
  Tensor total_;
  TensorList list_;

 public:
  struct Gradient {
    const void* data;
    int64_t numel;
    bool bf16;  // else float32
  };
  std::vector<Gradient> gradients;
  double* total;
  const int32_t device_index;

  explicit GradNormArgs(StableIValue* stack)
      : total_(stack[0]),
        list_(stack[1]),
        total(static_cast<double*>(total_.mutable_data())),
        device_index(total_.device_index()) {
    FT_CHECK(total_.dtype() == aoti_torch_dtype_float64() && total_.numel() == 1,
             "grad_norm_squared_: total must be one float64");
    gradients.reserve(list_.size);
    for (size_t i = 0; i < list_.size; i++) {
      const Tensor grad = list_[i];
      const bool bf16 = grad.dtype() == aoti_torch_dtype_bfloat16();
      FT_CHECK((bf16 || grad.dtype() == aoti_torch_dtype_float32()) && grad.contiguous() &&
                   grad.device_index() == device_index,
               "grad_norm_squared_: gradient %zu is not a contiguous float32 or bfloat16 tensor on "
               "the total's device",
               i);
      gradients.push_back({grad.data(), grad.numel(), bf16});
    }
  }
};
}  // namespace fastft
