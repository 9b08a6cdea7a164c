// fastft::adamw_ on the CPU: one parallel region over the elements of all tensors laid end to end.
//
// adamw_bind checks the tensors once and keeps them; adamw_bound_ is then a step over them that
// reads only the list of gradients. Walking all lists through libtorch's C shim at each step costs
// more than the arithmetic of a small tensor.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <vector>

#include "adamw_args.h"
#include "checksum.h"
#include "first_block.h"
#include "grad_norm.h"
#include "isa.h"
#include "live_table.h"

FASTFT_DECLARE_KERNEL(adamw, const AdamwTensor*, int64_t, int64_t, const AdamwHyper*, float,
                      uint64_t)

namespace {
constexpr int64_t kGrain = 16384;  // elements; fewer are not worth waking a thread

// The last place at or before element i where a processor's part of a tensor may begin: any, a
// block's first, or a section's of the checksum.
int64_t part_begin(const AdamwTensor& t, int64_t i) {
  if (i >= t.numel) return i;
  return t.columns ? i - i % t.columns % kMomentBlock : t.residue ? i - i % fastft::kSection : i;
}

// The processor foresees where a tensor goes on, but not where the next small one lies.
void prefetch(const AdamwTensor& t) {
  const int64_t bytes = std::min<int64_t>(t.numel * (t.rounding == kFp32 ? 4 : 2), 1024);
  for (const void* from :
       {static_cast<const void*>(t.param), t.grad, static_cast<const void*>(t.exp_avg),
        static_cast<const void*>(t.exp_avg_sq)})
    for (int64_t byte = 0; byte < bytes; byte += 64)
      __builtin_prefetch(static_cast<const char*>(from) + byte);
}

// The checksum of what the last step has written into each bf16 weight that has a residue; 0 where
// nobody knows. Nothing is allocated while weights are written: it could fail with half of them.
struct Written {
  std::vector<uint64_t> sums;

  void begin() { std::fill(sums.begin(), sums.end(), 0); }

  // Each processor adds the sum of its part, which may be the whole tensor.
  void add(size_t i, uint64_t sum, bool whole) {
    if (whole)
      sums[i] = sum;
    else
      __atomic_fetch_add(&sums[i], sum, __ATOMIC_RELAXED);
  }
};

struct Bound {
  fastft::AdamwTensors tensors;
  Written written;
  explicit Bound(fastft::AdamwTensors&& checked)
      : tensors(std::move(checked)), written{std::vector<uint64_t>(tensors.rows.size())} {}
};

// Says whether sections of the checksum are parts of a processor's part. Rows of codes may cut them
// otherwise: these are summed when all is written.
bool summed(const AdamwTensor& t) {
  return t.residue && (t.columns == t.numel || t.columns % fastft::kSection == 0);
}

// The checksum of every so many sections.
uint64_t sum_of_sections(const int16_t* bits, int64_t numel, int64_t every) {
  const int64_t sections = (numel + fastft::kSection - 1) / fastft::kSection;
  every = std::min(every, std::max<int64_t>(sections, 1));
  std::atomic<uint64_t> total{0};
  fastft::parallel_for((sections + every - 1) / every, kGrain / fastft::kSection,
                       [&](int64_t begin, int64_t end) {
                         uint64_t part = 0;
                         for (int64_t section = begin * every;
                              section < end * every && section < sections; section += every)
                           part += fastft::section_sum(bits + section * fastft::kSection, section,
                                                       numel - section * fastft::kSection);
                         total += part;
                       });
  return total;
}

// Calls `kernel(begin, end)` for parts of elements [from, to); after each the section with which it
// begins, which is in the cache, goes into the sum that is returned.
template <class Kernel>
uint64_t update_and_sum(const AdamwTensor& t, int64_t from, int64_t to, Kernel kernel) {
  constexpr int64_t kPart = fastft::kSection * fastft::kEvery;
  uint64_t sum = 0;
  for (int64_t place = from - from % kPart; place < to; place += kPart) {
    const int64_t begin = std::max(from, place);
    kernel(begin, std::min(to, place + kPart));
    if (begin == place)
      sum += fastft::section_sum(static_cast<const int16_t*>(t.param) + place,
                                 place / fastft::kSection,
                                 std::min(fastft::kSection, t.numel - place));
  }
  return sum;
}

void update(const fastft::AdamwTensors& tensors, const AdamwHyper* hyper, float factor,
            int64_t seed, Written* written = nullptr) {
  const std::vector<int64_t>& starts = tensors.starts;
  const auto update_kernel = adamw_kernel();
  if (written) written->begin();
  fastft::parallel_for(starts.back(), kGrain, [&](int64_t begin, int64_t end) {
    for (size_t i = last_not_after(starts.data(), tensors.rows.size(), begin); begin < end; i++) {
      const AdamwTensor& t = tensors.rows[i];
      const int64_t first = starts[i], stop = std::min(end, starts[i + 1]);
      if (stop < end) prefetch(tensors.rows[i + 1]);
      const int64_t from = part_begin(t, begin - first), to = part_begin(t, stop - first);
      begin = stop;
      if (to <= from || hyper[t.row].step == 0.0f) continue;
      const auto kernel = [&](int64_t from, int64_t to) {
        update_kernel(&t, from, to, hyper + t.row, factor, uint64_t(seed));
      };
      if (written && summed(t))
        written->add(i, update_and_sum(t, from, to, kernel), to - from == t.numel);
      else
        kernel(from, to);
    }
  });
  if (!written) return;
  for (size_t i = 0; i < tensors.rows.size(); i++) {
    const AdamwTensor& t = tensors.rows[i];
    if (t.residue && !summed(t))
      written->sums[i] =
          sum_of_sections(static_cast<const int16_t*>(t.param), t.numel, fastft::kEvery);
  }
}

void adamw(StableIValue* stack, uint64_t nargs, uint64_t) {
  const fastft::AdamwCall call(stack, nargs);
  update(call.tensors, call.step.rows(), call.step.factor(), call.step.seed);
}

fastft::LiveTable<Bound>& bindings() {
  static auto& table = *new fastft::LiveTable<Bound>(1);  // outlives whatever is released at exit
  return table;
}

// adamw_bind(Tensor(a!)[] params, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,
//            Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] residues, Tensor table) -> int
void bind(StableIValue* stack, uint64_t nargs, uint64_t) {
  FT_CHECK(nargs == 6, "adamw_bind: 6 arguments expected, got %d", int(nargs));
  fastft::TensorList params(stack[0]), exp_avgs(stack[1]), exp_avg_sqs(stack[2]),
      max_exp_avg_sqs(stack[3]), residues(stack[4]);
  const fastft::Tensor table(stack[5]);
  fastft::AdamwTensors tensors(params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, residues, table);
  stack[0] = StableIValue(bindings().add(std::make_unique<Bound>(std::move(tensors))));
}

// adamw_bound_(Tensor[] grads, Tensor hyper, Tensor grad_factor, int seed, int bound) -> int: 0, or
// with nothing done 1 where a bound tensor has changed since and 2 where a gradient does not fit
// its parameter. `bound` is what adamw_bind returned.
void step_bound(StableIValue* stack, uint64_t nargs, uint64_t) {
  FT_CHECK(nargs == 5, "adamw_bound_: 5 arguments expected, got %d", int(nargs));
  fastft::TensorList grads(stack[0]);
  const fastft::AdamwStep step(stack + 1);
  const auto bound = bindings().get(fastft::as_int(stack[4]), "adamw_bound_");
  fastft::AdamwTensors& tensors = bound->tensors;
  step.check(tensors);
  const int64_t code = tensors.look_and_take(grads);
  if (code == 0) update(tensors, step.rows(), step.factor(), step.seed, &bound->written);
  stack[0] = StableIValue(code);
}

// The norm of the gradients that were taken, of memory in the order of their elements.
float norm_of(const fastft::AdamwTensors& tensors) {
  std::vector<fastft::Gradient> gradients;
  gradients.reserve(tensors.rows.size());
  int64_t chunks = 0;
  for (const AdamwTensor& t : tensors.rows) {
    gradients.push_back({t.grad, t.numel, t.rounding != kFp32});
    chunks += fastft::norm_chunks(t.numel);
  }
  return float(std::sqrt(fastft::squares_of(gradients, chunks)));
}

// adamw_clipped_(Tensor[] grads, Tensor hyper, Tensor(a!) norm, float max_norm, int seed, int
// bound) -> int: adamw_bound_ that takes the norm of the gradients first, writes it, and clips to
// `max_norm`. One look at 1000 small gradients in the place of two.
void step_clipped(StableIValue* stack, uint64_t nargs, uint64_t) {
  FT_CHECK(nargs == 6, "adamw_clipped_: 6 arguments expected, got %d", int(nargs));
  fastft::TensorList grads(stack[0]);
  const fastft::AdamwStep step(stack[1], stack[2], stack[4]);
  const float max_norm = float(fastft::as_double(stack[3]));
  const auto bound = bindings().get(fastft::as_int(stack[5]), "adamw_clipped_");
  fastft::AdamwTensors& tensors = bound->tensors;
  step.check(tensors);
  int64_t code = tensors.look_and_take(grads);
  if (code == 0 && !tensors.contiguous) code = 2;
  if (code == 0) {
    const float norm = norm_of(tensors);
    *static_cast<float*>(step.grad_factor.mutable_data()) = norm;
    // in the roundings of clip_factor's operations (grad_norm.py)
    const float factor = 1.0f / (norm + 1e-6f) * max_norm;
    update(tensors, step.rows(), factor > 1.0f ? 1.0f : factor, step.seed, &bound->written);
  }
  stack[0] = StableIValue(code);
}

// adamw_written(Tensor(a!) sums, int bound) -> (): the checksums of what the last bound step wrote;
// int64.
void written(StableIValue* stack, uint64_t nargs, uint64_t) {
  FT_CHECK(nargs == 2, "adamw_written: 2 arguments expected, got %d", int(nargs));
  const fastft::Tensor sums(stack[0]);
  const auto bound = bindings().get(fastft::as_int(stack[1]), "adamw_written");
  const std::vector<uint64_t>& values = bound->written.sums;
  FT_CHECK(sums.dtype() == aoti_torch_dtype_int64() && sums.contiguous() &&
               sums.numel() == int64_t(values.size()),
           "adamw_written: sums must be contiguous int64, one for each of %zu tensors",
           values.size());
  std::copy(values.begin(), values.end(), static_cast<uint64_t*>(sums.mutable_data()));
}

// weight_checksum_(Tensor(a!) sum, Tensor weight, int every) -> (): of every so many sections of a
// bf16 weight; int64.
void checksum(StableIValue* stack, uint64_t nargs, uint64_t) {
  FT_CHECK(nargs == 3, "weight_checksum_: 3 arguments expected, got %d", int(nargs));
  const fastft::Tensor sum(stack[0]), weight(stack[1]);
  const int64_t every = fastft::as_int(stack[2]), numel = weight.numel();
  FT_CHECK(sum.dtype() == aoti_torch_dtype_int64() && sum.numel() == 1,
           "weight_checksum_: sum must be one int64");
  FT_CHECK(weight.dtype() == aoti_torch_dtype_bfloat16() && weight.contiguous() && every > 0,
           "weight_checksum_: weight must be contiguous bfloat16, every above 0");
  *static_cast<uint64_t*>(sum.mutable_data()) =
      sum_of_sections(static_cast<const int16_t*>(weight.data()), numel, every);
}

fastft::Kernel kernel_adamw("adamw_", adamw), kernel_bind("adamw_bind", bind),
    kernel_bound("adamw_bound_", step_bound), kernel_clipped("adamw_clipped_", step_clipped),
    kernel_written("adamw_written", written), kernel_checksum("weight_checksum_", checksum);
}  // namespace

// Lets go of what adamw_bind returned.
FASTFT_EXPORT void fastft_adamw_release(int64_t bound) { bindings().remove(bound); }
