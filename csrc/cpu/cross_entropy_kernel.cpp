// One row of logits: loss, log sum exp, entropy and gradient. Written with the compiler's vector
// types at the width of the instruction set; sums always run in 16 lanes that are added up in one
// order, so that every instruction set gives the same bits, but for sign and payload of a NaN:
// which of two an operation keeps depends on the order of its operands.
#include "cross_entropy.h"
#include "cross_entropy_math.h"
#include "floats.h"
#include "isa.h"

namespace {
constexpr int kLanes = fastft::kExponentials, kVectors = kLanes / kWidth;

// The factor of exp_negative(x): 0 where that is 0, because 0 * -Inf is NaN.
FASTFT_HD Floats finite(Floats x) { return x < -87.0f ? Floats{} : x; }

// The logits of a row after scale and softcap; `kCap` says whether there is a softcap.
template <class T, bool kCap>
struct Logits {
  const T* data;
  float scale, cap;  // with a softcap the scale is divided by it

  explicit Logits(const fastft::CrossEntropyRow& row)
      : data(static_cast<const T*>(row.logits)),
        scale(kCap ? row.logit_scale / row.softcap : row.logit_scale),
        cap(row.softcap) {}
  Floats through(Floats x) const { return kCap ? hyperbolic_tangent(x * scale) * cap : x * scale; }
  Floats at(int64_t i) const { return through(load(data + i)); }
  float one(int64_t i) const { return through(Floats{} + widened(data[i]))[0]; }
  // Returns d z / d logit where z is known, without the factor of the scale.
  Floats slope(Floats z) const {
    const Floats t = z / cap;
    return 1.0f - t * t;
  }
};

template <class T, bool kCap>
float row_max(const Logits<T, kCap>& logits, int64_t classes) {
  constexpr int kBest = 4;  // a comparison takes longer than the next one's load
  Floats best[kBest];
  for (int v = 0; v < kBest; v++) best[v] = Floats{} - __builtin_inff();
  int64_t i = 0;
  for (; i + kBest * kWidth <= classes; i += kBest * kWidth)
    for (int v = 0; v < kBest; v++) best[v] = larger(load(logits.data + i + v * kWidth), best[v]);
  const Floats all = larger(larger(best[0], best[1]), larger(best[2], best[3]));
  float max = -__builtin_inff();
  for (int k = 0; k < kWidth; k++) max = all[k] > max ? all[k] : max;
  for (; i < classes; i++) max = widened(logits.data[i]) > max ? widened(logits.data[i]) : max;
  return logits.through(Floats{} + max)[0];  // scale and softcap keep the order
}

// Adds up `term(z, i)` over the row in fp32 lanes which are emptied into fp64 before they lose
// digits. Where `skipped` is a class it counts as -Inf, as do the lanes behind the last class.
template <class T, bool kCap, class Term>
FASTFT_HD double sum_row(const Logits<T, kCap>& logits, int64_t classes, int64_t skipped,
                         Term term) {
  constexpr int64_t kSpan = 256 * kLanes;
  const int64_t block_of_skipped = skipped - skipped % kLanes, whole = classes - classes % kLanes;
  double total = 0.0;
  for (int64_t begin = 0; begin < classes; begin += kSpan) {
    Floats sums[kVectors] = {};
    const int64_t end = begin + kSpan < classes ? begin + kSpan : classes;
    for (int64_t i = begin; i < end; i += kLanes) {
      if (__builtin_expect((skipped < 0 || i != block_of_skipped) && i != whole, 1)) {
        for (int v = 0; v < kVectors; v++)
          sums[v] += term(logits.at(i + v * kWidth), i + v * kWidth);
        continue;
      }
      float block[kLanes];
      for (int k = 0; k < kLanes; k++)
        block[k] = i + k < classes && i + k != skipped ? logits.one(i + k) : -__builtin_inff();
      for (int v = 0; v < kVectors; v++) sums[v] += term(load(block + v * kWidth), i + v * kWidth);
    }
    for (int v = 0; v < kVectors; v++)
      for (int k = 0; k < kWidth; k++) total += sums[v][k];
  }
  return total;
}

// Returns the sum of weight * (max - z) over the whole row.
template <class T, bool kCap>
double sum_below(const Logits<T, kCap>& logits, const fastft::CrossEntropyRow& row, float max) {
  const int64_t whole = row.classes - row.classes % kLanes;
  double total = 0.0;
  if (row.weight)
    total = sum_row(logits, whole, -1,
                    [&](Floats z, int64_t i) { return (max - z) * load(row.weight + i); });
  else
    total = sum_row(logits, whole, -1, [&](Floats z, int64_t) { return max - z; });
  for (int64_t i = whole; i < row.classes; i++)
    total += (max - logits.one(i)) * (row.weight ? row.weight[i] : 1.0f);
  return total;
}

template <class T, bool kCap>
bool is_first_maximum(const Logits<T, kCap>& logits, int64_t target, float max) {
  if (logits.one(target) != max) return false;
  int64_t i = 0;
  for (; i + kWidth <= target; i += kWidth) {
    const auto equal = logits.at(i) == max;
    for (int k = 0; k < kWidth; k++)
      if (equal[k]) return false;
  }
  for (; i < target; i++)
    if (logits.one(i) == max) return false;
  return true;
}

// `kTerms`: whether the gradient has more terms than the softmax, which entropy and label smoothing
// bring.
template <class T, bool kCap, bool kTerms>
void write_gradient(const Logits<T, kCap>& logits, const fastft::CrossEntropyRow& row, float max,
                    const fastft::RowResult& result) {
  T* grad = static_cast<T*>(row.grad);  // may be the logits themselves
  const float scale = row.logit_scale, base = result.base * scale;
  auto value = [&](Floats z, Floats weight) {
    const Floats distance = z - max;
    Floats g = exp_negative(distance) * base;
    if (kTerms) {
      g = (exp_negative(distance) * (result.base + result.slope * finite(distance)) -
           result.spread * weight) *
          scale;
    }
    return kCap ? g * logits.slope(z) : g;
  };
  const float target_logit = logits.one(row.target);  // before it is written over
  const Floats one = Floats{} + 1.0f;
  int64_t i = 0;
  for (; i + kLanes <= row.classes; i += kLanes)
    for (int v = 0; v < kVectors; v++) {
      const int64_t at = i + v * kWidth;
      store(grad + at, value(logits.at(at), kTerms && row.weight ? load(row.weight + at) : one));
    }
  for (; i < row.classes; i++)
    put(grad + i,
        value(Floats{} + logits.one(i), kTerms && row.weight ? Floats{} + row.weight[i] : one)[0]);
  const Floats target_grad = Floats{} + result.target_grad * scale;
  put(grad + row.target,
      (kCap ? target_grad * logits.slope(Floats{} + target_logit) : target_grad)[0]);
}

// The gradient where the exponentials are there: the softmax's alone, without a softcap.
template <class T>
void scale_exponentials(const fastft::CrossEntropyRow& row, const fastft::RowResult& result) {
  T* grad = static_cast<T*>(row.grad);
  const float scale = row.logit_scale, base = result.base * scale;
  int64_t i = 0;
  for (; i + kLanes <= row.classes; i += kLanes)
    for (int v = 0; v < kVectors; v++) {
      const int64_t at = i + v * kWidth;
      store(grad + at, load(row.exponentials + at) * base);
    }
  for (; i < row.classes; i++) put(grad + i, row.exponentials[i] * base);
  put(grad + row.target, result.target_grad * scale);
}

template <class T, bool kCap>
fastft::RowSums sums_of(const Logits<T, kCap>& logits, const fastft::CrossEntropyRow& row) {
  const float target_logit = logits.one(row.target);
  if (row.sums && row.grad)
    return {static_cast<float>(row.sums[0]), target_logit, row.sums[1], 0.0, 0.0};
  const float max = row_max(logits, row.classes);
  fastft::RowSums sums{max, target_logit, 0.0, 0.0, 0.0};
  // A maximum waits for memory, and exponentials do not: the next row comes meanwhile.
  const T* next = static_cast<const T*>(row.next);
  if (row.exponentials)
    sums.others = sum_row(logits, row.classes, row.target, [=, &row](Floats z, int64_t i) {
      __builtin_prefetch(next + i, 0, 2);
      const Floats e = exp_negative(z - max);
      store(row.exponentials + i, e);
      return e;
    });
  else
    sums.others = sum_row(logits, row.classes, row.target, [=](Floats z, int64_t i) {
      __builtin_prefetch(next + i, 0, 2);
      return exp_negative(z - max);
    });
  if (row.label_smoothing != 0.0f) sums.below = sum_below(logits, row, max);
  if (row.statistics || row.upstream_entropy != 0.0f)
    sums.moment = sum_row(logits, row.classes, -1, [=](Floats z, int64_t) {
      return exp_negative(z - max) * finite(z - max);
    });
  if (row.sums) row.sums[0] = max, row.sums[1] = sums.others;
  return sums;
}

template <class T, bool kCap>
void compute_row(fastft::CrossEntropyRow& row) {
  const Logits<T, kCap> logits(row);
  const fastft::RowSums sums = sums_of(logits, row);
  const float max = sums.max, target_weight = row.weight ? row.weight[row.target] : 1.0f;
  const double smoothing = row.label_smoothing;
  const fastft::RowResult result = fastft::finish_row(
      sums, {(1.0 - smoothing) * target_weight, smoothing / row.classes, row.weight_sum,
             target_weight, row.z_loss, row.upstream_loss, row.upstream_lse, row.upstream_entropy});
  row.loss = result.loss;
  row.lse = result.lse;
  row.entropy = result.entropy;
  row.is_top1 = row.statistics && is_first_maximum(logits, row.target, max);
  if (!row.grad) return;
  if (row.exponentials)
    scale_exponentials<T>(row, result);
  else if (result.slope != 0.0f || result.spread != 0.0f)
    write_gradient<T, kCap, true>(logits, row, max, result);
  else
    write_gradient<T, kCap, false>(logits, row, max, result);
}
}  // namespace

extern "C" void FASTFT_KERNEL(cross_entropy_row)(fastft::CrossEntropyRow* row) {
  if (row->bfloat16)
    row->softcap != 0.0f ? compute_row<uint16_t, true>(*row) : compute_row<uint16_t, false>(*row);
  else
    row->softcap != 0.0f ? compute_row<float, true>(*row) : compute_row<float, false>(*row);
}
