// rms_norm(Tensor(a!) out, Tensor(b!) rstd, Tensor x, Tensor weight, float eps, float offset) -> ()
// rms_norm_backward(Tensor(a!) grad_x, Tensor(b!) grad_weight, Tensor grad, Tensor x,
//     Tensor weight, Tensor rstd, float offset) -> ()
//
// Contiguous tensors of float32 or bfloat16: rows x and grad, of weight's width; rstd is float32,
// one for each row. A grad_weight without elements is not asked for.
#include "rms_norm.h"

#include <algorithm>
#include <vector>

#include "bf16.h"
#include "isa.h"
#include "shim.h"

FASTFT_DECLARE_KERNEL(rms_norm, const fastft::RmsNormRows*)

namespace {
using fastft::Tensor;
constexpr int64_t kRows = 64;        // of one part of weight's gradient
constexpr int64_t kGrain = 1 << 15;  // elements: about 10 microseconds of one core

struct Job {
  fastft::RmsNormRows rows{};
  int64_t count = 0;

  Job(const Tensor& x, const Tensor& weight, const Tensor& rstd, float offset) {
    rows.bfloat16 = x.dtype() == aoti_torch_dtype_bfloat16();
    FT_CHECK(rows.bfloat16 || x.dtype() == aoti_torch_dtype_float32(),
             "rms_norm: x must be float32 or bfloat16");
    rows.width = weight.numel();
    check(x, x, x.numel(), "x"), check(weight, x, rows.width, "weight");
    FT_CHECK(rows.width > 0 && x.numel() % rows.width == 0,
             "rms_norm: x must have rows of weight's size");
    count = x.numel() / rows.width;
    FT_CHECK(rstd.on_cpu() && rstd.contiguous() && rstd.numel() == count &&
                 rstd.dtype() == aoti_torch_dtype_float32(),
             "rms_norm: rstd must be contiguous float32 on the CPU, one for each row");
    rows.x = x.data(), rows.weight = weight.data(), rows.offset = offset;
  }

  static void check(const Tensor& tensor, const Tensor& x, int64_t numel, const char* name) {
    FT_CHECK(tensor.on_cpu() && tensor.contiguous() && tensor.dtype() == x.dtype() &&
                 tensor.numel() == numel,
             "rms_norm: %s must be contiguous, on the CPU, of x's dtype and %lld elements", name,
             static_cast<long long>(numel));
  }
};

void rms_norm(StableIValue* stack, uint64_t nargs, uint64_t) {
  FT_CHECK(nargs == 6, "rms_norm: 6 arguments expected, got %d", static_cast<int>(nargs));
  const Tensor out(stack[0]), rstd(stack[1]), x(stack[2]), weight(stack[3]);
  Job job(x, weight, rstd, float(fastft::as_double(stack[5])));
  Job::check(out, x, x.numel(), "out");
  job.rows.out = out.mutable_data(), job.rows.rstd = static_cast<float*>(rstd.mutable_data());
  job.rows.eps = float(fastft::as_double(stack[4]));
  const auto kernel = rms_norm_kernel();
  const int64_t grain = kGrain / job.rows.width + 1;
  fastft::parallel_for(job.count, grain, [&](int64_t begin, int64_t end) {
    fastft::RmsNormRows part = job.rows;
    part.begin = begin, part.end = end;
    kernel(&part);
  });
}

// Adds up the parts of weight's gradient, in their order.
void add_parts(const float* parts, int64_t count, int64_t width, const Tensor& grad_weight) {
  std::vector<double> sums(static_cast<size_t>(width));  // per-head norms have many parts
  for (int64_t part = 0; part < count; part++)
    for (int64_t i = 0; i < width; i++) sums[size_t(i)] += parts[part * width + i];
  void* out = grad_weight.mutable_data();
  if (grad_weight.dtype() == aoti_torch_dtype_float32())
    for (int64_t i = 0; i < width; i++) static_cast<float*>(out)[i] = float(sums[size_t(i)]);
  else
    for (int64_t i = 0; i < width; i++)
      static_cast<uint16_t*>(out)[i] = bf16_nearest(float(sums[size_t(i)]));
}

void rms_norm_backward(StableIValue* stack, uint64_t nargs, uint64_t) {
  FT_CHECK(nargs == 7, "rms_norm_backward: 7 arguments expected, got %d", static_cast<int>(nargs));
  const Tensor grad_x(stack[0]), grad_weight(stack[1]), grad(stack[2]), x(stack[3]),
      weight(stack[4]), rstd(stack[5]);
  Job job(x, weight, rstd, float(fastft::as_double(stack[6])));
  Job::check(grad_x, x, x.numel(), "grad_x"), Job::check(grad, x, x.numel(), "grad");
  const bool wanted = grad_weight.numel() > 0;
  Job::check(grad_weight, x, wanted ? job.rows.width : 0, "grad_weight");
  job.rows.grad = grad.data(), job.rows.out = grad_x.mutable_data();
  job.rows.rstd = const_cast<float*>(static_cast<const float*>(rstd.data()));
  const int64_t width = job.rows.width, parts = (job.count + kRows - 1) / kRows;
  std::vector<float> sums(static_cast<size_t>(wanted ? parts * width : 0));
  const auto kernel = rms_norm_kernel();
  fastft::parallel_for(parts, kGrain / (kRows * width) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      fastft::RmsNormRows part = job.rows;
      part.begin = i * kRows, part.end = std::min(part.begin + kRows, job.count);
      part.grad_weight = wanted ? sums.data() + i * width : nullptr;
      kernel(&part);
    }
  });
  if (wanted) add_parts(sums.data(), parts, width, grad_weight);
}

fastft::Kernel kernel_rms_norm("rms_norm", rms_norm);
fastft::Kernel kernel_rms_norm_backward("rms_norm_backward", rms_norm_backward);
}  // namespace
