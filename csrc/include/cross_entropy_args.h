// Reads and checks the arguments of fastft::cross_entropy_rows.
#pragma once
#include "shim.h"

namespace fastft {
// cross_entropy_rows(Tensor logits, Tensor target, Tensor[] weight, Tensor[] upstream, Tensor(a!) losses,
//                    Tensor(b!) lse, Tensor(c!)[] statistics, Tensor(d!)[] grad, int ignore_index,
//                    float label_smoothing, float z_loss, float softcap, float logit_scale)
struct CrossEntropyArgs {
  Tensor logits, target, losses, lse;
  TensorList weight, upstream, statistics, grad;
  int64_t ignore_index, rows, classes;
  double label_smoothing, z_loss, softcap, logit_scale;

  explicit CrossEntropyArgs(StableIValue* stack)
      : logits(stack[0]),
        target(stack[1]),
        losses(stack[4]),
        lse(stack[5]),
        weight(stack[2]),
        upstream(stack[3]),
        statistics(stack[6]),
        grad(stack[7]),
        ignore_index(as_int(stack[8])),
        label_smoothing(as_double(stack[9])),
        z_loss(as_double(stack[10])),
        softcap(as_double(stack[11])),
        logit_scale(as_double(stack[12])) {
    FT_CHECK(logits.dim() == 2, "cross_entropy_rows: logits must be (rows, classes)");
    rows = logits.size(0);
    classes = logits.size(1);
    check_matrix(logits, "logits");
    const int32_t integer = target.dtype(), fp32 = aoti_torch_dtype_float32();
    FT_CHECK(integer == aoti_torch_dtype_int64() || integer == aoti_torch_dtype_int32(),
             "cross_entropy_rows: target must be int64 or int32");
    check_vector(target, "target", integer, rows);
    check_vector(losses, "losses", fp32, rows);
    check_vector(lse, "lse", fp32, rows);
    FT_CHECK(weight.size <= 1 && grad.size <= 1, "cross_entropy_rows: weight and grad hold at most one tensor");
    FT_CHECK(upstream.size <= 1 || upstream.size == 3, "cross_entropy_rows: upstream holds 0, 1 or 3 tensors");
    FT_CHECK(statistics.size == 0 || statistics.size == 2, "cross_entropy_rows: statistics holds 0 or 2 tensors");
  }

  void check_matrix(const Tensor& tensor, const char* name) const {
    FT_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == classes &&
                 tensor.dtype() == logits.dtype() && (classes <= 1 || tensor.stride(1) == 1),
             "cross_entropy_rows: %s must have the shape and dtype of logits, and contiguous rows", name);
  }

  static void check_vector(const Tensor& tensor, const char* name, int32_t dtype, int64_t size) {
    FT_CHECK(tensor.numel() == size && tensor.contiguous() && tensor.dtype() == dtype,
             "cross_entropy_rows: %s must be a contiguous vector of %lld, of the right dtype", name,
             static_cast<long long>(size));
  }

  // The data of element `i` of a list of vectors, checked; null where the list ends before.
  template <class T>
  T* vector(const TensorList& list, size_t i, const char* name, int32_t dtype, int64_t size) const {
    if (i >= list.size) return nullptr;
    const Tensor tensor = list[i];
    check_vector(tensor, name, dtype, size);
    return static_cast<T*>(tensor.mutable_data());
  }
};
}  // namespace fastft
