// One row of logits: loss, log sum exp, entropy and gradient. Written with the compiler's vector
// types at the width of the instruction set; sums always run in 16 lanes that are added up in one
// order, so that every instruction set gives the same bits, but for sign and payload of a NaN:
// which of two an operation keeps depends on the order of its operands.
#include "bf16.h"
#include "cross_entropy.h"
#include "cross_entropy_math.h"
#include "isa.h"
#include "wide.h"

namespace {
#if defined(FASTFT_WIDE)
constexpr int kWidth = kWide;
#else
constexpr int kWidth = 4;
#endif
constexpr int kLanes = 16, kVectors = kLanes / kWidth;
typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef uint32_t Words __attribute__((vector_size(4 * kWidth)));
typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));

template <class To, class From>
FASTFT_HD To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// What compilers make of these three with the widest registers takes several times as long.
#if defined(__AVX512F__)
FASTFT_HD Words widened_words(Halves x) {
  return bit_cast<Words>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(x)));
}
FASTFT_HD Halves narrowed(Words x) {
  return bit_cast<Halves>(_mm512_cvtepi32_epi16(bit_cast<__m512i>(x)));
}
#elif defined(__AVX2__)
FASTFT_HD Words widened_words(Halves x) {
  return bit_cast<Words>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(x)));
}
FASTFT_HD Halves narrowed(Words x) {
  const __m256i words = bit_cast<__m256i>(x), packed = _mm256_packus_epi32(words, words);
  return bit_cast<Halves>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}
#else
FASTFT_HD Words widened_words(Halves x) { return __builtin_convertvector(x, Words); }
FASTFT_HD Halves narrowed(Words x) { return __builtin_convertvector(x, Halves); }
#endif

// The larger of each two; b where one of them is NaN.
FASTFT_HD Floats larger(Floats a, Floats b) {
#if defined(FASTFT_WIDE)
  return FASTFT_OF_WIDE(max_ps)(a, b);
#else
  return a > b ? a : b;
#endif
}

#if !defined(FASTFT_WIDE)
FASTFT_HD float fused_one(float a, float b, float c) {
#if defined(__FP_FAST_FMAF)
  return __builtin_fmaf(a, b, c);
#else
  // In double the product is exact. Where the rounded sum lies in the middle of two floats and the
  // exact one does not, it is moved to the exact one's side.
  const double product = static_cast<double>(a) * b, addend = c, sum = product + addend;
  const double added = sum - product, lost = (product - (sum - added)) + (addend - added);
  int64_t bits = bit_cast<int64_t>(sum);
  if ((bits & 0x1fffffff) == 0x10000000 && lost != 0.0)
    bits += (lost < 0.0) == (sum < 0.0) ? 1 : -1;
  return static_cast<float>(bit_cast<double>(bits));
#endif
}
#endif

// a b + c, rounded once.
FASTFT_HD Floats fused(Floats a, Floats b, Floats c) {
#if defined(FASTFT_WIDE)
  return FASTFT_OF_WIDE(fmadd_ps)(a, b, c);
#else
  Floats sum;
  for (int k = 0; k < kWidth; k++) sum[k] = fused_one(a[k], b[k], c[k]);
  return sum;
#endif
}

// Numbers kept as float32 or as bfloat16, of which a uint16_t has the bits.
FASTFT_HD Floats load(const float* p) {
  Floats x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
FASTFT_HD Floats load(const uint16_t* p) {
  Halves x;
  __builtin_memcpy(&x, p, sizeof x);
  return bit_cast<Floats>(widened_words(x) << 16);
}
FASTFT_HD void store(float* p, Floats x) { __builtin_memcpy(p, &x, sizeof x); }
FASTFT_HD void store(uint16_t* p, Floats x) {
#if defined(__AVX512BF16__)
  constexpr int kSubnormal = 0x20;  // which the unit would take for 0
  if (__builtin_expect(_mm512_fpclass_ps_mask(x, kSubnormal) == 0, 1)) {
    const auto nearest = _mm512_cvtneps_pbh(x);
    __builtin_memcpy(p, &nearest, sizeof nearest);
    return;
  }
#endif
  const Words rounded = bf16_nearest_sum(bit_cast<Words>(x)) >> 16;
  const Words quiet_nan = rounded - rounded + 0x7fc0;
  const Halves halves = narrowed(x == x ? rounded : quiet_nan);
  __builtin_memcpy(p, &halves, sizeof halves);
}

FASTFT_HD void put(float* p, float x) { *p = x; }
FASTFT_HD void put(uint16_t* p, float x) { *p = bf16_nearest(x); }

// exp for x <= 0, within 1 ulp: 2^n * e^r with Cephes' minimax polynomial for e^r. Below the
// smallest normal number it is 0; NaN stays NaN.
FASTFT_HD Floats exp_negative(Floats x) {
  constexpr float kSmallest = -87.0f;
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  const Floats zero = {}, clamped = larger(zero + kSmallest, x);
  const Floats shifted = fused(clamped, zero + 1.44269504f, zero + kRound);
  const Floats n = shifted - kRound;
  const Floats r = fused(n, zero + 2.12194440e-4f, fused(n, zero - 0.693359375f, clamped));
  Floats p = fused(r, zero + 1.9875691500e-4f, zero + 1.3981999507e-3f);
  p = fused(p, r, zero + 8.3334519073e-3f);
  p = fused(p, r, zero + 4.1665795894e-2f);
  p = fused(p, r, zero + 1.6666665459e-1f);
  p = fused(p, r, zero + 5.0000001201e-1f);
  p = fused(p, r * r, r) + 1.0f;
  const Words power = (bit_cast<Words>(shifted) + (127u - 0x4b400000u)) << 23;
  return x < kSmallest ? zero : p * bit_cast<Floats>(power);
}

// The factor of exp_negative(x): 0 where that is 0, because 0 * -Inf is NaN.
FASTFT_HD Floats finite(Floats x) { return x < -87.0f ? Floats{} : x; }

// tanh within 2 ulp: Cephes' polynomial near zero, where 1 - e^(-2x) would cancel.
FASTFT_HD Floats hyperbolic_tangent(Floats x) {
  const Floats size = x < 0.0f ? -x : x, square = x * x;
  const Floats zero = {};
  Floats p = fused(square, zero - 5.70498872745e-3f, zero + 2.06390887954e-2f);
  p = fused(p, square, zero - 5.37397155531e-2f);
  p = fused(p, square, zero + 1.33314422036e-1f);
  p = fused(p, square, zero - 3.33332819422e-1f);
  const Floats small = fused(p * square, x, x), e = exp_negative(size * -2.0f);
  const Floats large = (1.0f - e) / (1.0f + e);
  return size < 0.625f ? small : (x < 0.0f ? -large : large);
}

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

template <class T, bool kCap>
fastft::RowSums sums_of(const Logits<T, kCap>& logits, const fastft::CrossEntropyRow& row) {
  const float target_logit = logits.one(row.target);
  if (row.sums && row.grad)
    return {static_cast<float>(row.sums[0]), target_logit, row.sums[1], 0.0, 0.0};
  const float max = row_max(logits, row.classes);
  fastft::RowSums sums{max, target_logit, 0.0, 0.0, 0.0};
  sums.others = sum_row(logits, row.classes, row.target,
                        [=](Floats z, int64_t) { return exp_negative(z - max); });
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
  if (result.slope != 0.0f || result.spread != 0.0f)
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
