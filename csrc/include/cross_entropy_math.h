// What becomes of one row of logits once its maximum and its exponentials are known; the same on CPU and CUDA.
#pragma once
#include <math.h>

#if defined(__CUDACC__)
#define FASTFT_MATH __host__ __device__ inline
#else
#define FASTFT_MATH static inline
#endif

namespace fastft {
struct RowResult {
  float loss;         // lse - target logit
  float lse;          // log sum exp of the row
  float inverse_sum;  // softmax = exp(logit - max) * inverse_sum
  float target_grad;  // softmax of the target - 1
};

// `others` is the sum of exp(logit - max) over all classes but the target's. Keeping the target out of the sum is what
// leaves a confident row, whose others are far below one rounding of the whole sum, its loss and its gradient.
FASTFT_MATH RowResult finish_row(float max, float target_logit, double others) {
  const double below = static_cast<double>(max) - target_logit;
  const double target = expm1(-below) + 1.0, sum = others + target;  // exp would need GLIBC_2.29
  // log of the sum is log1p of the sum without the class that holds the maximum, whose exponential is exactly 1
  const double log_sum = log1p(below == 0.0 ? others : (others - 1.0) + target);
  return {static_cast<float>(below + log_sum), static_cast<float>(max + log_sum), static_cast<float>(1.0 / sum),
          static_cast<float>(-others / sum)};
}
}  // namespace fastft
