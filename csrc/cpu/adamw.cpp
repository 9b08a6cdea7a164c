// fastft::adamw_ on the CPU: one parallel region over the elements of all tensors laid end to end.
//
// adamw_bind checks the tensors once and keeps them; adamw_bound_ is then a step over them that reads only the list of
// gradients. Walking all lists through libtorch's C shim at each step costs more than the arithmetic of a small tensor.
#include <algorithm>
#include <memory>

#include "adamw_args.h"
#include "isa.h"
#include "live_table.h"

FASTFT_DECLARE_KERNEL(adamw, const AdamwTensor*, int64_t, int64_t, const AdamwHyper*, float, uint64_t)

namespace {
constexpr int64_t kGrain = 16384;  // elements; fewer are not worth waking a thread

// The last place at or before element i where a processor's part of a tensor may begin: any, or a block's first.
int64_t part_begin(const AdamwTensor& t, int64_t i) {
  return t.columns && i < t.numel ? i - i % t.columns % kMomentBlock : i;
}

// The processor foresees where a tensor goes on, but not where the next small one lies.
void prefetch(const AdamwTensor& t) {
  const int64_t bytes = std::min<int64_t>(t.numel * (t.rounding == kFp32 ? 4 : 2), 1024);
  for (const void* from : {static_cast<const void*>(t.param), t.grad, static_cast<const void*>(t.exp_avg),
                           static_cast<const void*>(t.exp_avg_sq)})
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(static_cast<const char*>(from) + byte);
}

void update(const fastft::AdamwTensors& tensors, const fastft::AdamwStep& step) {
  const float factor = *static_cast<const float*>(step.grad_factor.data());
  const AdamwHyper* hyper = step.rows();
  const std::vector<int64_t>& ends = tensors.ends;
  const auto kernel = adamw_kernel();
  fastft::parallel_for(ends.empty() ? 0 : ends.back(), kGrain, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin();
    for (; begin < end; i++) {
      const AdamwTensor& t = tensors.rows[i];
      const int64_t stop = std::min(end, ends[i]), first = ends[i] - t.numel;
      if (stop < end) prefetch(tensors.rows[i + 1]);
      const int64_t from = part_begin(t, begin - first), to = part_begin(t, stop - first);
      if (to > from && hyper[t.row].step != 0.0f) kernel(&t, from, to, hyper + t.row, factor, uint64_t(step.seed));
      begin = stop;
    }
  });
}

void adamw(StableIValue* stack, uint64_t nargs, uint64_t) {
  const fastft::AdamwCall call(stack, nargs);
  update(call.tensors, call.step);
}

fastft::LiveTable<fastft::AdamwTensors>& bindings() {
  static auto& table = *new fastft::LiveTable<fastft::AdamwTensors>(1);  // outlives whatever is released at exit
  return table;
}

// adamw_bind(Tensor(a!)[] params, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs,
//            Tensor(e!)[] residues, Tensor table) -> int
void bind(StableIValue* stack, uint64_t nargs, uint64_t) {
  FT_CHECK(nargs == 6, "adamw_bind: 6 arguments expected, got %d", int(nargs));
  const fastft::TensorList params(stack[0]), exp_avgs(stack[1]), exp_avg_sqs(stack[2]), max_exp_avg_sqs(stack[3]),
      residues(stack[4]);
  const fastft::Tensor table(stack[5]);
  auto bound = std::make_unique<fastft::AdamwTensors>(params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, residues, table);
  stack[0] = StableIValue(bindings().add(std::move(bound)));
}

// adamw_bound_(Tensor[] grads, Tensor hyper, Tensor grad_factor, int seed, int bound) -> int: 0, or with nothing done 1
// where a bound tensor has changed since and 2 where a gradient does not fit its parameter. `bound` is what adamw_bind
// returned.
void step_bound(StableIValue* stack, uint64_t nargs, uint64_t) {
  FT_CHECK(nargs == 5, "adamw_bound_: 5 arguments expected, got %d", int(nargs));
  const fastft::TensorList grads(stack[0]);
  const fastft::AdamwStep step(stack + 1);
  const auto bound = bindings().get(fastft::as_int(stack[4]), "adamw_bound_");
  fastft::AdamwTensors& tensors = *bound;
  step.check(tensors);
  const int code = !tensors.unchanged() ? 1 : tensors.take(grads) >= 0 ? 2 : 0;
  if (code == 0) update(tensors, step);
  stack[0] = StableIValue(code);
}

fastft::Kernel kernel_adamw("adamw_", adamw), kernel_bind("adamw_bind", bind), kernel_bound("adamw_bound_", step_bound);
}  // namespace

// Lets go of what adamw_bind returned.
FASTFT_EXPORT void fastft_adamw_release(int64_t bound) { bindings().remove(bound); }
