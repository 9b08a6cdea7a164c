// Reads and checks the arguments of fastft::scale_gradients_ for the CUDA launcher.
#pragma once
#include <vector>

#include "shim.h"

namespace fastft {
// scale_gradients_(Tensor(a!)[] gradients, Tensor scale) -> ()
class ScaleGradientsArgs {
  TensorList list_;
  Tensor scale_;

 public:
  struct Gradient {
    void* data;
    int64_t numel;
    int32_t dtype;
  };
  std::vector<Gradient> gradients;
  const float* scale;
  const int32_t device_index;

  explicit ScaleGradientsArgs(StableIValue* stack)
      : list_(stack[0]),
        scale_(stack[1]),
        scale(static_cast<const float*>(scale_.data())),
        device_index(scale_.device_index()) {
    FT_CHECK(scale_.dtype() == aoti_torch_dtype_float32() && scale_.numel() == 1,
             "scale_gradients_: scale must be one float32");
    for (size_t i = 0; i < list_.size; i++) {
      const Tensor& tensor = list_[i];
      const int32_t dtype = tensor.dtype();
      FT_CHECK(tensor.is_beside(scale_),
               "scale_gradients_: gradient %zu must be on the device of scale", i);
      FT_CHECK(
          tensor.contiguous() &&
              (dtype == aoti_torch_dtype_float32() || dtype == aoti_torch_dtype_bfloat16() ||
               dtype == aoti_torch_dtype_float16()),
          "scale_gradients_: gradient %zu must be a contiguous float32, bfloat16 or float16 tensor",
          i);
      gradients.push_back({tensor.mutable_data(), tensor.numel(), dtype});
    }
  }
};
}  // namespace fastft
