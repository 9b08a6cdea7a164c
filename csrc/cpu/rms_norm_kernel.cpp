// Rows divided by their root mean square, and the gradients, by the compiler's vector types at the
// width of the instruction set. Sums run in 64 lanes that are added up in one order, so that every
// one gives the same bits, but for sign and payload of a NaN.
#include "floats.h"
#include "isa.h"
#include "rms_norm.h"

namespace {
constexpr int kLanes = 64, kVectors = kLanes / kWidth;

// The elements of a row from `from` on: a register of them, or what is left and then zeros.
template <class T>
FASTFT_HD Floats some(const T* from, int64_t left) {
  return left >= kWidth ? load(from) : Rest<T>(left).read(from);
}
template <class T>
FASTFT_HD void put_some(T* to, int64_t left, Floats x) {
  if (left >= kWidth)
    store(to, x);
  else
    Rest<T>(left).write(to, x);
}

// The sum of `term(i, left)` over registers of a row, of which `left` elements from i on are there.
template <class Term>
FASTFT_HD float sum_row(int64_t width, Term term) {
  Floats sums[kVectors] = {};
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes)
    for (int v = 0; v < kVectors; v++) sums[v] += term(i + v * kWidth, int64_t(kWidth));
  for (int v = 0; i < width; i += kWidth, v++) sums[v] += term(i, width - i);
  float lanes[kLanes];
  for (int v = 0; v < kVectors; v++) store(lanes + v * kWidth, sums[v]);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; lane++) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

template <class Each>
FASTFT_HD void for_row(int64_t width, Each each) {
  int64_t i = 0;
  for (; i + kWidth <= width; i += kWidth) each(i, int64_t(kWidth));
  if (i < width) each(i, width - i);
}

template <class T>
void normalise(const fastft::RmsNormRows& job) {
  const T* weight = static_cast<const T*>(job.weight);
  for (int64_t row = job.begin; row < job.end; row++) {
    const T* x = static_cast<const T*>(job.x) + row * job.width;
    T* out = static_cast<T*>(job.out) + row * job.width;
    const float squares = sum_row(job.width, [&](int64_t i, int64_t left) {
      const Floats value = some(x + i, left);
      return value * value;
    });
    const float rstd = 1.0f / __builtin_sqrtf(squares / float(job.width) + job.eps);
    job.rstd[row] = rstd;
    for_row(job.width, [&](int64_t i, int64_t left) {
      put_some(out + i, left, (some(weight + i, left) + job.offset) * (some(x + i, left) * rstd));
    });
  }
}

template <class T>
void differentiate(const fastft::RmsNormRows& job) {
  const T* weight = static_cast<const T*>(job.weight);
  float* sums = job.grad_weight;
  for (int64_t i = 0; sums && i < job.width; i++) sums[i] = 0.0f;
  for (int64_t row = job.begin; row < job.end; row++) {
    const T* x = static_cast<const T*>(job.x) + row * job.width;
    const T* grad = static_cast<const T*>(job.grad) + row * job.width;
    T* out = static_cast<T*>(job.out) + row * job.width;
    const float rstd = job.rstd[row];
    const auto weighted = [&](int64_t i, int64_t left) __attribute__((always_inline)) {
      return some(grad + i, left) * (some(weight + i, left) + job.offset);
    };
    const float dot = sum_row(job.width, [&](int64_t i, int64_t left) {
      return weighted(i, left) * (some(x + i, left) * rstd);
    });
    const float mean = dot / float(job.width);
    for_row(job.width, [&](int64_t i, int64_t left) {
      const Floats normal = some(x + i, left) * rstd;
      if (sums) put_some(sums + i, left, some(sums + i, left) + some(grad + i, left) * normal);
      put_some(out + i, left, (weighted(i, left) - normal * mean) * rstd);
    });
  }
}
}  // namespace

extern "C" void FASTFT_KERNEL(rms_norm)(const fastft::RmsNormRows* job) {
  if (job->grad)
    job->bfloat16 ? differentiate<uint16_t>(*job) : differentiate<float>(*job);
  else
    job->bfloat16 ? normalise<uint16_t>(*job) : normalise<float>(*job);
}
