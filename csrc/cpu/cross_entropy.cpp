// cross_entropy_rows on the CPU: checks the arguments and spreads the rows over torch's threads.
#include "cross_entropy.h"

#include <memory>

#include "cross_entropy_args.h"
#include "isa.h"
#include "pages.h"

FASTFT_DECLARE_KERNEL(cross_entropy_row, fastft::CrossEntropyRow*)

namespace {
using Arguments = fastft::CrossEntropyArgs;

int64_t target_of(const Arguments& job, int64_t row) {
  return job.wide_target ? static_cast<const int64_t*>(job.target)[row]
                         : static_cast<const int32_t*>(job.target)[row];
}

void check_targets(const Arguments& job) {
  for (int64_t i = 0; i < job.rows; i++) {
    const int64_t target = target_of(job, i);
    FT_CHECK(target == job.ignore_index || (target >= 0 && target < job.classes),
             "cross_entropy_rows: target[%lld] is %lld, not in [0, %lld)",
             static_cast<long long>(i), static_cast<long long>(target),
             static_cast<long long>(job.classes));
  }
}

struct Rows {
  const Arguments& job;
  bool bfloat16 = job.dtype == aoti_torch_dtype_bfloat16();
  int64_t itemsize = bfloat16 ? 2 : 4;
  double weight_sum = static_cast<double>(job.classes);

  explicit Rows(const Arguments& job) : job(job) {
    if (job.weight) weight_sum = 0.0;
    for (int64_t i = 0; job.weight && i < job.classes; i++) weight_sum += job.weight[i];
  }

  char* grad(int64_t i) const {
    return job.grad ? static_cast<char*>(job.grad) + i * job.grad_stride * itemsize : nullptr;
  }

  void ignore(int64_t i) const {
    job.losses[i] = job.lse[i] = 0.0f;
    if (job.entropy) job.entropy[i] = 0.0f, job.is_top1[i] = false;
    if (job.grad) std::memset(grad(i), 0, job.classes * itemsize);
  }

  // Whether a row's gradient is its exponentials times one number, and neither is known yet.
  bool keeps_exponentials() const {
    const bool more = job.upstream[2] || job.label_smoothing != 0.0f || job.softcap != 0.0f;
    return job.grad && !job.sums && !more;
  }

  const char* logits(int64_t i) const {
    return static_cast<const char*>(job.logits) + i * job.stride * itemsize;
  }

  void compute(int64_t i, void (*kernel)(fastft::CrossEntropyRow*), float* exponentials) const {
    fastft::CrossEntropyRow row{};
    row.exponentials = exponentials;
    row.logits = logits(i);
    row.next = logits(i + 1 < job.rows ? i + 1 : i);
    row.grad = grad(i);
    row.weight = job.weight;
    row.weight_sum = weight_sum;
    row.classes = job.classes;
    row.target = target_of(job, i);
    row.label_smoothing = job.label_smoothing;
    row.z_loss = job.z_loss;
    row.logit_scale = job.logit_scale;
    row.softcap = job.softcap;
    row.upstream_loss = job.upstream[0] ? job.upstream[0][i] : 1.0f;
    row.upstream_lse = job.upstream[1] ? job.upstream[1][i] : 0.0f;
    row.upstream_entropy = job.upstream[2] ? job.upstream[2][i] : 0.0f;
    row.bfloat16 = bfloat16;
    row.statistics = job.entropy != nullptr;
    row.sums = job.sums ? job.sums + 2 * i : nullptr;
    kernel(&row);
    if (job.sums && job.grad) return;
    job.losses[i] = row.loss;
    job.lse[i] = row.lse;
    if (job.entropy) job.entropy[i] = row.entropy, job.is_top1[i] = row.is_top1;
  }
};

void cross_entropy_rows(StableIValue* stack, uint64_t nargs, uint64_t) {
  FT_CHECK(nargs == 13, "cross_entropy_rows: 13 arguments expected, got %d",
           static_cast<int>(nargs));
  const Arguments job(stack, false);
  check_targets(job);
  if (job.classes == 0) return;
  const Rows rows(job);
  const auto kernel = cross_entropy_row_kernel();
  if (job.grad && job.grad != job.logits)
    fastft::expect_use(job.grad, rows.itemsize * ((job.rows - 1) * job.grad_stride + job.classes));
  fastft::parallel_for(job.rows, 1 + 16384 / job.classes, [&](int64_t begin, int64_t end) {
    std::unique_ptr<float[]> exponentials;
    if (rows.keeps_exponentials())
      exponentials.reset(new float[size_t(job.classes + fastft::kExponentials)]);
    for (int64_t i = begin; i < end; i++)
      if (target_of(job, i) == job.ignore_index)
        rows.ignore(i);
      else
        rows.compute(i, kernel, exponentials.get());
  });
}

static fastft::Kernel kernel_cross_entropy_rows("cross_entropy_rows", cross_entropy_rows);
}  // namespace
