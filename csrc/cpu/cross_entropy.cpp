// cross_entropy_rows on the CPU: checks the arguments and spreads the rows over torch's threads.
#include "cross_entropy.h"

#include "isa.h"
#include "shim.h"

FASTFT_DECLARE_KERNEL(cross_entropy_row, fastft::CrossEntropyRow*)

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

// The arguments of cross_entropy_rows; a list that may be empty is a pointer that may be null.
struct Arguments {
  Tensor logits, target, losses, lse;
  TensorList weight, upstream, statistics, grad;
  int64_t ignore_index, rows, classes;
  float label_smoothing, z_loss, softcap, logit_scale;
  bool bfloat16;

  explicit Arguments(StableIValue* stack)
      : logits(stack[0]),
        target(stack[1]),
        losses(stack[4]),
        lse(stack[5]),
        weight(stack[2]),
        upstream(stack[3]),
        statistics(stack[6]),
        grad(stack[7]),
        ignore_index(fastft::as_int(stack[8])),
        label_smoothing(static_cast<float>(fastft::as_double(stack[9]))),
        z_loss(static_cast<float>(fastft::as_double(stack[10]))),
        softcap(static_cast<float>(fastft::as_double(stack[11]))),
        logit_scale(static_cast<float>(fastft::as_double(stack[12]))) {
    FT_CHECK(logits.dim() == 2, "cross_entropy_rows: logits must be (rows, classes)");
    rows = logits.size(0);
    classes = logits.size(1);
    bfloat16 = logits.dtype() == aoti_torch_dtype_bfloat16();
    FT_CHECK(bfloat16 || logits.dtype() == aoti_torch_dtype_float32(),
             "cross_entropy_rows: logits must be float32 or bfloat16");
    check_matrix(logits, "logits");
    const int32_t integer = target.dtype();
    FT_CHECK(integer == aoti_torch_dtype_int64() || integer == aoti_torch_dtype_int32(),
             "cross_entropy_rows: target must be int64 or int32");
    check_vector(target, "target", integer, rows);
    check_vector(losses, "losses", aoti_torch_dtype_float32(), rows);
    check_vector(lse, "lse", aoti_torch_dtype_float32(), rows);
    FT_CHECK(weight.size <= 1 && grad.size <= 1, "cross_entropy_rows: weight and grad hold at most one tensor");
    FT_CHECK(upstream.size <= 1 || upstream.size == 3, "cross_entropy_rows: upstream holds 0, 1 or 3 tensors");
    FT_CHECK(statistics.size == 0 || statistics.size == 2, "cross_entropy_rows: statistics holds 0 or 2 tensors");
  }

  void check_matrix(const Tensor& tensor, const char* name) const {
    FT_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == classes &&
                 tensor.dtype() == logits.dtype() && (classes == 1 || tensor.stride(1) == 1),
             "cross_entropy_rows: %s must have the shape and dtype of logits, and contiguous rows", name);
  }
  static void check_vector(const Tensor& tensor, const char* name, int32_t dtype, int64_t size) {
    FT_CHECK(tensor.numel() == size && tensor.contiguous() && tensor.dtype() == dtype,
             "cross_entropy_rows: %s must be a contiguous vector of %lld, of the right dtype", name,
             static_cast<long long>(size));
  }
  // The data of element `i` of a list, checked; null where the list is empty.
  template <class T>
  T* vector(const TensorList& list, size_t i, const char* name, int32_t dtype, int64_t size) const {
    if (i >= list.size) return nullptr;
    const Tensor tensor = list[i];
    check_vector(tensor, name, dtype, size);
    return static_cast<T*>(tensor.mutable_data());
  }
};

void check_targets(const Target& target, const Arguments& job) {
  for (int64_t i = 0; i < job.rows; i++)
    FT_CHECK(target[i] == job.ignore_index || (target[i] >= 0 && target[i] < job.classes),
             "cross_entropy_rows: target[%lld] is %lld, not in [0, %lld)", static_cast<long long>(i),
             static_cast<long long>(target[i]), static_cast<long long>(job.classes));
}

// What a row needs and gives, with the pointers of all rows.
struct Rows {
  const Arguments& job;
  Target target;
  const int32_t fp32 = aoti_torch_dtype_float32();
  const float* weight = job.vector<const float>(job.weight, 0, "weight", fp32, job.classes);
  const float* upstream[3];
  float* losses = static_cast<float*>(job.losses.mutable_data());
  float* lse = static_cast<float*>(job.lse.mutable_data());
  float* entropy = job.vector<float>(job.statistics, 0, "entropy", fp32, job.rows);
  bool* is_top1 = job.vector<bool>(job.statistics, 1, "is_top1", aoti_torch_dtype_bool(), job.rows);
  const char* logits = static_cast<const char*>(job.logits.data());
  char* grad = nullptr;
  int64_t itemsize = job.bfloat16 ? 2 : 4, stride = job.logits.stride(0), grad_stride = 0;
  double weight_sum = static_cast<double>(job.classes);

  explicit Rows(const Arguments& job) : job(job), target(job.target) {
    for (size_t i = 0; i < 3; i++) upstream[i] = job.vector<const float>(job.upstream, i, "upstream", fp32, job.rows);
    if (job.grad.size) {
      const Tensor tensor = job.grad[0];
      job.check_matrix(tensor, "grad");
      grad = static_cast<char*>(tensor.mutable_data());
      grad_stride = tensor.stride(0);
    }
    if (weight) weight_sum = 0.0;
    for (int64_t i = 0; weight && i < job.classes; i++) weight_sum += weight[i];
  }

  void ignore(int64_t i) const {
    losses[i] = lse[i] = 0.0f;
    if (entropy) entropy[i] = 0.0f, is_top1[i] = false;
    if (grad) std::memset(grad + i * grad_stride * itemsize, 0, job.classes * itemsize);
  }

  void compute(int64_t i, void (*kernel)(fastft::CrossEntropyRow*)) const {
    fastft::CrossEntropyRow row{};
    row.logits = logits + i * stride * itemsize;
    row.grad = grad ? grad + i * grad_stride * itemsize : nullptr;
    row.weight = weight;
    row.weight_sum = weight_sum;
    row.classes = job.classes;
    row.target = target[i];
    row.label_smoothing = job.label_smoothing;
    row.z_loss = job.z_loss;
    row.logit_scale = job.logit_scale;
    row.softcap = job.softcap;
    row.upstream_loss = upstream[0] ? upstream[0][i] : 1.0f;
    row.upstream_lse = upstream[1] ? upstream[1][i] : 0.0f;
    row.upstream_entropy = upstream[2] ? upstream[2][i] : 0.0f;
    row.bfloat16 = job.bfloat16;
    row.statistics = entropy != nullptr;
    kernel(&row);
    losses[i] = row.loss;
    lse[i] = row.lse;
    if (entropy) entropy[i] = row.entropy, is_top1[i] = row.is_top1;
  }
};

void cross_entropy_rows(StableIValue* stack, uint64_t nargs, uint64_t) {
  FT_CHECK(nargs == 13, "cross_entropy_rows: 13 arguments expected, got %d", static_cast<int>(nargs));
  const Arguments job(stack);
  const Rows rows(job);
  check_targets(rows.target, job);
  if (job.classes == 0) return;
  const auto kernel = cross_entropy_row_kernel();
  fastft::parallel_for(job.rows, 1 + 16384 / job.classes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      if (rows.target[i] == job.ignore_index)
        rows.ignore(i);
      else
        rows.compute(i, kernel);
  });
}

static fastft::Kernel kernel_cross_entropy_rows("cross_entropy_rows", cross_entropy_rows);
}  // namespace
