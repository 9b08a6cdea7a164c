// One row of logits: loss, log sum exp and gradient. Written with the compiler's vector types at the width of the
// instruction set; sums always run in 16 lanes that are added up in one order, so that every instruction set gives the
// same bits.
#include <stdint.h>

#include "cross_entropy.h"
#include "cross_entropy_math.h"
#include "isa.h"

namespace {
#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
constexpr int kLanes = 16, kVectors = kLanes / kWidth;
typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef uint32_t Words __attribute__((vector_size(4 * kWidth)));
typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));

struct Bfloat16 {
  uint16_t bits;
};

template <class To, class From>
inline __attribute__((always_inline)) To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

inline float to_float(float x) { return x; }
inline float to_float(Bfloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

inline __attribute__((always_inline)) Floats load(const float* p) {
  Floats x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
inline __attribute__((always_inline)) Floats load(const Bfloat16* p) {
  Halves x;
  __builtin_memcpy(&x, p, sizeof x);
  return bit_cast<Floats>(__builtin_convertvector(x, Words) << 16);
}
inline __attribute__((always_inline)) void store(float* p, Floats x) { __builtin_memcpy(p, &x, sizeof x); }
inline __attribute__((always_inline)) void store(Bfloat16* p, Floats x) {
  const Words bits = bit_cast<Words>(x);
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest even
  const Words quiet_nan = rounded - rounded + 0x7fc0;
  const Halves halves = __builtin_convertvector(x == x ? rounded : quiet_nan, Halves);
  __builtin_memcpy(p, &halves, sizeof halves);
}

inline void put(float* p, float x) { *p = x; }
inline void put(Bfloat16* p, float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  p->bits = x == x ? static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) : 0x7fc0;
}
inline void put_minus_infinity(float* p) { *p = -__builtin_inff(); }
inline void put_minus_infinity(Bfloat16* p) { p->bits = 0xff80; }

// exp for x <= 0, within 1 ulp: 2^n * e^r with Cephes' minimax polynomial for e^r. Below the smallest normal number it
// is 0; NaN stays NaN.
inline __attribute__((always_inline)) Floats exp_negative(Floats x) {
  constexpr float kSmallest = -87.0f,
                  kRound = 12582912.0f;  // adding 1.5 * 2^23 leaves the nearest integer in the low bits
  const Floats zero = {}, clamped = x < kSmallest ? zero + kSmallest : x;
  const Floats shifted = clamped * 1.44269504f + kRound;
  const Floats n = shifted - kRound;
  const Floats r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Words power = (bit_cast<Words>(shifted) + (127u - 0x4b400000u)) << 23;
  return x < kSmallest ? zero : p * bit_cast<Floats>(power);
}

template <class T>
float row_max(const T* logits, int64_t classes) {
  const Floats lowest = Floats{} - __builtin_inff();
  Floats best[kVectors];
  for (int v = 0; v < kVectors; v++) best[v] = lowest;
  int64_t i = 0;
  for (; i + kLanes <= classes; i += kLanes)
    for (int v = 0; v < kVectors; v++) {
      const Floats x = load(logits + i + v * kWidth);
      best[v] = x > best[v] ? x : best[v];
    }
  float max = -__builtin_inff();
  for (int v = 0; v < kVectors; v++)
    for (int k = 0; k < kWidth; k++) max = best[v][k] > max ? best[v][k] : max;
  for (; i < classes; i++) max = to_float(logits[i]) > max ? to_float(logits[i]) : max;
  return max;
}

template <class T>
inline __attribute__((always_inline)) void add_exp(const T* logits, float max, Floats* sums) {
  for (int v = 0; v < kVectors; v++) sums[v] += exp_negative(load(logits + v * kWidth) - max);
}

// The sum of exp(logit - max) over all classes but the target's.
template <class T>
double sum_of_others(const T* logits, int64_t classes, int64_t target, float max) {
  Floats sums[kVectors] = {};
  const int64_t block_of_target = target - target % kLanes, whole = classes - classes % kLanes;
  for (int64_t i = 0; i < classes; i += kLanes) {
    if (__builtin_expect(i != block_of_target && i != whole, 1)) {
      add_exp(logits + i, max, sums);
      continue;
    }
    T block[kLanes];
    for (int k = 0; k < kLanes; k++)
      if (i + k < classes && i + k != target)
        block[k] = logits[i + k];
      else
        put_minus_infinity(block + k);
    add_exp(block, max, sums);
  }
  double total = 0.0;
  for (int v = 0; v < kVectors; v++)
    for (int k = 0; k < kWidth; k++) total += sums[v][k];
  return total;
}

template <class T>
void write_softmax(const T* logits, T* grad, int64_t classes, float max, float scale) {
  int64_t i = 0;
  for (; i + kLanes <= classes; i += kLanes)
    for (int v = 0; v < kVectors; v++)
      store(grad + i + v * kWidth, exp_negative(load(logits + i + v * kWidth) - max) * scale);
  for (; i < classes; i++) put(grad + i, exp_negative(Floats{} + to_float(logits[i]) - max)[0] * scale);
}

template <class T>
void row(const fastft::CrossEntropyRow& job) {
  const T* logits = static_cast<const T*>(job.logits);
  const float max = row_max(logits, job.classes), target_logit = to_float(logits[job.target]);
  const fastft::RowResult result =
      fastft::finish_row(max, target_logit, sum_of_others(logits, job.classes, job.target, max));
  *job.loss = result.loss;
  *job.lse = result.lse;
  if (!job.grad) return;
  T* grad = static_cast<T*>(job.grad);  // may be the logits themselves
  write_softmax(logits, grad, job.classes, max, result.inverse_sum * job.scale);
  put(grad + job.target, result.target_grad * job.scale);
}
}  // namespace

extern "C" void FASTFT_KERNEL(cross_entropy_row)(const fastft::CrossEntropyRow* job) {
  if (job->bfloat16)
    row<Bfloat16>(*job);
  else
    row<float>(*job);
}
