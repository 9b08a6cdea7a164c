// fastft::adamw_ on the CPU: one parallel region over the elements of all tensors laid end to end.
#include <algorithm>

#include "adamw_args.h"
#include "isa.h"

FASTFT_DECLARE_KERNEL(adamw_fp32, float*, const float*, float*, float*, int64_t, const AdamwHyper*)
FASTFT_DECLARE_KERNEL(adamw_bf16, uint16_t*, int16_t*, const uint16_t*, float*, float*, int64_t, const AdamwHyper*)

namespace {
constexpr int64_t kGrain = 16384;  // elements; fewer are not worth waking a thread

void update(const fastft::AdamwTensor& t, int64_t begin, int64_t n) {
  if (!t.remainder) {
    adamw_fp32_kernel()(static_cast<float*>(t.param) + begin, static_cast<const float*>(t.grad) + begin,
                        t.exp_avg + begin, t.exp_avg_sq + begin, n, t.hyper);
  } else {
    adamw_bf16_kernel()(static_cast<uint16_t*>(t.param) + begin, t.remainder + begin,
                        static_cast<const uint16_t*>(t.grad) + begin, t.exp_avg + begin, t.exp_avg_sq + begin, n,
                        t.hyper);
  }
}

void adamw(StableIValue* stack, uint64_t nargs, uint64_t) {
  FT_CHECK(nargs == 7, "adamw_: 7 arguments expected, got %d", int(nargs));
  const fastft::AdamwArgs args(stack);
  std::vector<int64_t> ends;
  ends.reserve(args.tensors.size());
  int64_t total = 0;
  for (const fastft::AdamwTensor& t : args.tensors) ends.push_back(total += t.numel);
  fastft::parallel_for(total, kGrain, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin();
    for (; begin < end; i++) {
      const int64_t stop = std::min(end, ends[i]), first = ends[i] - args.tensors[i].numel;
      if (stop > begin) update(args.tensors[i], begin - first, stop - begin);
      begin = stop;
    }
  });
}

fastft::Kernel kernel_adamw("adamw_", adamw);
}  // namespace
