// Rows of a matrix side by side, as the inner loops of products read them.
#pragma once
#include "bf16.h"
#include "wide.h"

namespace {
#if defined(FASTFT_WIDE)
FASTFT_HD __m128 four(const float* p) { return _mm_loadu_ps(p); }
FASTFT_HD __m128 four(const uint16_t* p) {
  const __m128i words = _mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return _mm_castsi128_ps(_mm_slli_epi32(words, 16));
}
#endif

// to[k, lane] = from[lane, k] for four terms, which lie side by side, of four lanes.
template <int kLanes, class T>
FASTFT_HD void pack_square(const T* from, int64_t stride, float* to) {
#if defined(FASTFT_WIDE)
  __m128 x[4];
  for (int i = 0; i < 4; i++) x[i] = four(from + i * stride);
  _MM_TRANSPOSE4_PS(x[0], x[1], x[2], x[3]);
  for (int k = 0; k < 4; k++) _mm_storeu_ps(to + k * kLanes, x[k]);
#else
  for (int k = 0; k < 4; k++)
    for (int i = 0; i < 4; i++) to[k * kLanes + i] = widened(from[i * stride + k]);
#endif
}

// to[k, lane] = from[lane, k] for `lanes` of kLanes, 0 for the others.
template <int kLanes, class T>
void pack(const T* from, int64_t stride, int64_t step, int64_t lanes, int64_t depth, float* to) {
  if (stride == 1 && lanes == kLanes) {
    for (int64_t k = 0; k < depth; k++)
      for (int lane = 0; lane < kLanes; lane++)
        to[k * kLanes + lane] = widened(from[k * step + lane]);
    return;
  }
  const int64_t squared = step == 1 && lanes >= 4 ? depth - depth % 4 : 0;
  // where lanes are no multiple of four, the last square has some of the one before
  for (int64_t next = 0; next < lanes; next += 4)
    for (int64_t k = 0, lane = next < lanes - 4 ? next : lanes - 4; k < squared; k += 4)
      pack_square<kLanes>(from + lane * stride + k, stride, to + k * kLanes + lane);
  for (int64_t lane = 0; lane < kLanes; lane++)
    for (int64_t k = lane < lanes ? squared : 0; k < depth; k++)
      to[k * kLanes + lane] = lane < lanes ? widened(from[lane * stride + k * step]) : 0.0f;
}
}  // namespace
