// Reads and checks the arguments of fastft::cross_entropy_rows for the CPU and the CUDA launcher.
#pragma once
#include "shim.h"

namespace fastft {
// cross_entropy_rows(Tensor logits, Tensor target, Tensor[] weight, Tensor[] upstream,
//                    Tensor(a!) losses, Tensor(b!) lse, Tensor(c!)[] statistics, Tensor(d!)[] grad,
//                    int ignore_index, float label_smoothing, float z_loss, float softcap,
//                    float logit_scale)
class CrossEntropyArgs {
  Tensor logits_, target_, losses_, lse_;
  TensorList weight_, upstream_, statistics_, grad_;

 public:
  const int64_t rows, classes;
  const void* logits;
  const void* target;
  const bool wide_target;  // int64, not int32
  const int32_t dtype, device_index;
  float *losses, *lse;
  const float *weight = nullptr, *upstream[3] = {};  // null where not given, as is all below
  float* entropy = nullptr;
  bool* is_top1 = nullptr;
  double* sums = nullptr;  // two for each row
  void* grad = nullptr;
  int64_t stride, grad_stride = 0;
  const int64_t ignore_index;
  const float label_smoothing, z_loss, softcap, logit_scale;

  CrossEntropyArgs(StableIValue* stack, bool takes_half)
      : logits_(stack[0]),
        target_(stack[1]),
        losses_(stack[4]),
        lse_(stack[5]),
        weight_(stack[2]),
        upstream_(stack[3]),
        statistics_(stack[6]),
        grad_(stack[7]),
        rows(logits_.dim() == 2 ? logits_.size(0) : -1),
        classes(logits_.dim() == 2 ? logits_.size(1) : -1),
        logits(logits_.data()),
        target(target_.data()),
        wide_target(target_.dtype() == aoti_torch_dtype_int64()),
        dtype(logits_.dtype()),
        device_index(logits_.device_index()),
        losses(static_cast<float*>(losses_.mutable_data())),
        lse(static_cast<float*>(lse_.mutable_data())),
        ignore_index(as_int(stack[8])),
        label_smoothing(static_cast<float>(as_double(stack[9]))),
        z_loss(static_cast<float>(as_double(stack[10]))),
        softcap(static_cast<float>(as_double(stack[11]))),
        logit_scale(static_cast<float>(as_double(stack[12]))) {
    const int32_t fp32 = aoti_torch_dtype_float32();
    FT_CHECK(dtype == fp32 || dtype == aoti_torch_dtype_bfloat16() ||
                 (takes_half && dtype == aoti_torch_dtype_float16()),
             "cross_entropy_rows: logits must be %sfloat32 or bfloat16",
             takes_half ? "float16, " : "");
    stride = check_matrix(logits_, "logits");
    FT_CHECK(wide_target || target_.dtype() == aoti_torch_dtype_int32(),
             "cross_entropy_rows: target must be int64 or int32");
    check_vector(target_, "target", target_.dtype(), rows);
    check_vector(losses_, "losses", fp32, rows);
    check_vector(lse_, "lse", fp32, rows);
    FT_CHECK(weight_.size <= 1 && grad_.size <= 1,
             "cross_entropy_rows: weight and grad hold at most one tensor");
    FT_CHECK(upstream_.size <= 1 || upstream_.size == 3,
             "cross_entropy_rows: upstream holds 0, 1 or 3 tensors");
    FT_CHECK(statistics_.size <= 2, "cross_entropy_rows: statistics holds 0, 1 or 2 tensors");
    FT_CHECK(statistics_.size != 1 || (!takes_half && upstream_.size <= 1),
             "cross_entropy_rows: sums are kept on a CPU, and have no entropy");
    weight = vector<const float>(weight_, 0, "weight", fp32, classes);
    for (size_t i = 0; i < 3; i++)
      upstream[i] = vector<const float>(upstream_, i, "upstream", fp32, rows);
    if (statistics_.size == 1)
      sums = vector<double>(statistics_, 0, "sums", aoti_torch_dtype_float64(), 2 * rows);
    else
      entropy = vector<float>(statistics_, 0, "entropy", fp32, rows);
    is_top1 = vector<bool>(statistics_, 1, "is_top1", aoti_torch_dtype_bool(), rows);
    if (grad_.size == 0) return;
    const Tensor& tensor = grad_[0];
    grad_stride = check_matrix(tensor, "grad");
    grad = tensor.mutable_data();
  }

 private:
  // Returns the distance of its rows.
  int64_t check_matrix(const Tensor& tensor, const char* name) const {
    check_device(tensor, name);
    FT_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == classes &&
                 tensor.dtype() == dtype && (classes <= 1 || rows == 0 || tensor.stride(1) == 1),
             "cross_entropy_rows: %s must have the shape and dtype of logits, and contiguous rows",
             name);
    return tensor.stride(0);
  }

  // Labels of the host would be an illegal address on a GPU, and the process would lose its
  // context.
  void check_device(const Tensor& tensor, const char* name) const {
    FT_CHECK(tensor.is_beside(logits_), "cross_entropy_rows: %s must be on the device of logits",
             name);
  }

  void check_vector(const Tensor& tensor, const char* name, int32_t dtype, int64_t size) const {
    check_device(tensor, name);
    FT_CHECK(tensor.numel() == size && tensor.contiguous() && tensor.dtype() == dtype,
             "cross_entropy_rows: %s must be a contiguous vector of %lld, of the right dtype", name,
             static_cast<long long>(size));
  }

  // The data of element `i` of a list of vectors, checked; null where the list ends before.
  template <class T>
  T* vector(const TensorList& list, size_t i, const char* name, int32_t dtype, int64_t size) const {
    if (i >= list.size) return nullptr;
    const Tensor& tensor = list[i];
    check_vector(tensor, name, dtype, size);
    return static_cast<T*>(tensor.mutable_data());
  }
};
}  // namespace fastft
