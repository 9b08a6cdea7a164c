// Reads and checks the arguments of grad_norm.py's operators for the CPU and the CUDA launcher.
#pragma once
#include <vector>

#include "shim.h"

namespace fastft {
constexpr int64_t kNormChunk = 16384;  // elements whose squares are one sum, on every device

inline int64_t norm_chunks(int64_t numel) { return (numel + kNormChunk - 1) / kNormChunk; }

struct Gradient {
  const void* data;
  int64_t numel;
  bool bf16;  // else float32
};

// float64 numbers that lie one after the other.
class Doubles {
  Tensor tensor_;

 public:
  const int64_t size;
  const int32_t device_index;

  Doubles(Tensor&& tensor, const char* operation, const char* name)
      : tensor_(std::move(tensor)), size(tensor_.numel()), device_index(tensor_.device_index()) {
    FT_CHECK(tensor_.dtype() == aoti_torch_dtype_float64() && tensor_.contiguous(),
             "%s: %s must be contiguous float64", operation, name);
  }
  double* writable() const { return static_cast<double*>(tensor_.mutable_data()); }
  const double* data() const { return static_cast<const double*>(tensor_.data()); }
  void check_size(int64_t needed, const char* operation, const char* name) const {
    FT_CHECK(size == needed, "%s: %s must have %lld elements, has %lld", operation, name,
             static_cast<long long>(needed), static_cast<long long>(size));
  }
};

// grad_norm_squared_(Tensor(a!) total, Tensor[] grads) -> ()
// grad_square_sums_(Tensor(a!) sums, Tensor[] grads) -> ()
class GradNormArgs {
  TensorList list_;

 public:
  std::vector<Gradient> gradients;
  const Doubles result;
  int64_t chunks = 0;  // of all gradients

  GradNormArgs(StableIValue* stack, const char* operation, const char* name)
      : list_(stack[1]), result(Tensor(stack[0]), operation, name) {
    gradients.reserve(list_.size);
    for (size_t i = 0; i < list_.size; i++) {
      const Tensor& grad = list_[i];
      const bool bf16 = grad.dtype() == aoti_torch_dtype_bfloat16();
      FT_CHECK((bf16 || grad.dtype() == aoti_torch_dtype_float32()) && grad.contiguous() &&
                   grad.device_index() == result.device_index,
               "%s: gradient %zu is not a contiguous float32 or bfloat16 tensor on the %s' device",
               operation, i, name);
      FT_CHECK(grad.data() || grad.numel() == 0, "%s: the memory of gradient %zu has been freed",
               operation, i);
      gradients.push_back({grad.data(), grad.numel(), bf16});
      chunks += norm_chunks(grad.numel());
    }
  }
};
}  // namespace fastft
