// Sum of squares of a run of gradients; compiled once per instruction set (isa.h). In double, whose
// range squares of float32 cannot leave: the sum is finite if and only if every gradient is. The
// lanes are fixed, so that every instruction set adds in the same order, and has the same bits but
// for the payload of a NaN.
#include "bf16.h"
#include "isa.h"

namespace {
constexpr int kLanes = 16;

// Add the squares of whole sixteens, one to each lane; return how many gradients these are.
int64_t add_sixteens(const float* __restrict grad, int64_t n, double* __restrict lanes) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int lane = 0; lane < kLanes; lane++) {
      const double value = grad[i + lane];
      lanes[lane] += value * value;
    }
  return i;
}

// Of pairs in 32 bits, whose halves need no widening: with vectors of 16 bits compilers take twice
// as long.
int64_t add_sixteens(const uint16_t* __restrict grad, int64_t n, double* __restrict lanes) {
  constexpr int kPairs = kLanes / 2;
  using Pairs = uint32_t __attribute__((vector_size(4 * kPairs)));
  using Floats = float __attribute__((vector_size(4 * kPairs)));
  using Doubles = double __attribute__((vector_size(8 * kPairs)));
  Doubles even{}, odd{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Pairs pairs;
    memcpy(&pairs, grad + i, sizeof pairs);
    const Doubles lower = __builtin_convertvector((Floats)(pairs << 16), Doubles);
    const Doubles upper = __builtin_convertvector((Floats)(pairs & 0xffff0000u), Doubles);
    even += lower * lower, odd += upper * upper;
  }
  for (int pair = 0; pair < kPairs; pair++)
    lanes[2 * pair] = even[pair], lanes[2 * pair + 1] = odd[pair];
  return i;
}

template <class T>
double sum(const T* grad, int64_t n) {
  double lanes[kLanes] = {};
  int64_t i = add_sixteens(grad, n, lanes);
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
