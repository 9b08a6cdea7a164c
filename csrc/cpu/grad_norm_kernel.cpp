// Sum of squares of a run of gradients; compiled once per instruction set (isa.h). In double, whose
// range squares of float32 cannot leave: the sum is finite if and only if every gradient is. The
// lanes are fixed, so that every instruction set adds in the same order, and has the same bits but
// for the payload of a NaN.
#include "bf16.h"
#include "isa.h"

namespace {
constexpr int kLanes = 16;

template <class T>
double sum(const T* __restrict grad, int64_t n) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int lane = 0; lane < kLanes; lane++) {
      const double value = widened(grad[i + lane]);
      lanes[lane] += value * value;
    }
  for (int lane = 0; i < n; i++, lane++) {
    const double value = widened(grad[i]);
    lanes[lane] += value * value;
  }
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; lane++) lanes[lane] += lanes[lane + width];
  return lanes[0];
}
}  // namespace

extern "C" void FASTFT_KERNEL(sum_of_squares)(const void* grad, int64_t n, bool bf16,
                                              double* result) {
  *result =
      bf16 ? sum(static_cast<const uint16_t*>(grad), n) : sum(static_cast<const float*>(grad), n);
}
