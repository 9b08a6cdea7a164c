// Sum of squares of a run of gradients; compiled once per instruction set (isa.h). In double, whose
// range squares of float32 cannot leave: the sum is finite if and only if every gradient is. The
// lanes are fixed, so that every instruction set adds in the same order, and has the same bits but
// for the sign and the payload of a NaN.
#include "bf16.h"
#include "isa.h"
#include "wide.h"

namespace {
constexpr int kLanes = 16;

// Add the squares of the first gradients to the lanes; return how many these are, whole sixteens.
template <class T>
int64_t add_first(const T* __restrict grad, int64_t n, double* __restrict lanes) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int lane = 0; lane < kLanes; lane++) {
      const double value = widened(grad[i + lane]);
      lanes[lane] += value * value;
    }
  return i;
}

#if defined(FASTFT_WIDE)
#if defined(__AVX512F__)
using WideDouble = __m512d;
FASTFT_HD WideDouble first_half(Wide a) { return _mm512_cvtps_pd(_mm512_castps512_ps256(a)); }
FASTFT_HD WideDouble last_half(Wide a) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1)); }
#else
using WideDouble = __m256d;
FASTFT_HD WideDouble first_half(Wide a) { return _mm256_cvtps_pd(_mm256_castps256_ps128(a)); }
FASTFT_HD WideDouble last_half(Wide a) { return _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1)); }
#endif

// By hand, of pairs in 32 bits: their halves are floats with one operation, where compilers widen
// 16 bits first.
int64_t add_first(const uint16_t* __restrict grad, int64_t n, double* __restrict lanes) {
  // AVX-512 has two sixteens in a register, one after the other to the same lanes; AVX2 one
  constexpr int kLast = kWide == kLanes ? 0 : 1;
  WideDouble even[kLast + 1] = {}, odd[kLast + 1] = {};
  int64_t i = 0;
  for (; i + 2 * kWide <= n; i += 2 * kWide) {
    WideInt pairs;
    memcpy(&pairs, grad + i, sizeof pairs);
    const Wide lower = (Wide)FASTFT_OF_WIDE(slli_epi32)(pairs, 16);
    const Wide upper = (Wide)(pairs & FASTFT_OF_WIDE(set1_epi32)(-0x10000));
    even[0] += first_half(lower) * first_half(lower);
    even[kLast] += last_half(lower) * last_half(lower);
    odd[0] += first_half(upper) * first_half(upper);
    odd[kLast] += last_half(upper) * last_half(upper);
  }
  for (int pair = 0; pair < kLanes / 2; pair++) {
    lanes[2 * pair] = even[2 * pair / kWide][pair % (kWide / 2)];
    lanes[2 * pair + 1] = odd[2 * pair / kWide][pair % (kWide / 2)];
  }
  return i;
}
#endif

template <class T>
double sum(const T* grad, int64_t n) {
  double lanes[kLanes] = {};
  int64_t i = add_first(grad, n, lanes);
  for (int lane = 0; i < n; i++, lane++) {
    const double value = widened(grad[i]);
    lanes[lane % kLanes] += value * value;
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
