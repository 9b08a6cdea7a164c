// The end of one row of logits, once its sums are known; the same on CPU and CUDA. The formulas
// stand at the top of fastft/loss/cross_entropy_rows.py; z are the logits after scale and softcap.
#pragma once
#include <math.h>

#if defined(__CUDACC__)
#define FASTFT_MATH __host__ __device__ inline
#else
#define FASTFT_MATH static inline
#endif

namespace fastft {
struct RowSums {
  float max, target_logit;
  double others;  // sum of exp(z - max) over all classes but the target
  double below;   // sum of weight * (max - z) over all classes; 0 without label smoothing
  double moment;  // sum of exp(z - max) * (z - max) over all classes; 0 without an entropy
};

struct RowTerms {
  double hit;     // the target's share of the loss: (1 - label_smoothing) * its weight
  double spread;  // each class' share, over its weight: label_smoothing / classes
  double weight_sum, target_weight;
  double z_loss;
  double upstream_loss, upstream_lse, upstream_entropy;
};

struct RowResult {
  float loss, lse, entropy;
  // d/dz of the row: exp(z - max) * (base + slope * (z - max)) - spread * weight, except for the
  // target
  float base, slope, spread, target_grad;
};

// Keeping the target out of the sum is what leaves a confident row, whose others are far below one
// rounding of the whole sum, its loss and its gradient.
FASTFT_MATH RowResult finish_row(const RowSums& sums, const RowTerms& terms) {
  const double distance = static_cast<double>(sums.max) - sums.target_logit;
  // exp would need GLIBC_2.29
  const double target = expm1(-distance) + 1.0, sum = sums.others + target;
  // log of the sum is log1p of the sum without the class that holds the maximum, whose exponential
  // is exactly 1
  const double log_sum = log1p(distance == 0.0 ? sums.others : (sums.others - 1.0) + target);
  const double lse = sums.max + log_sum, entropy = log_sum - sums.moment / sum;
  RowResult result;
  double loss = terms.hit * (distance + log_sum) + terms.z_loss * lse * lse;
  if (terms.spread != 0.0) loss += terms.spread * (sums.below + terms.weight_sum * log_sum);
  result.loss = static_cast<float>(loss);
  result.lse = static_cast<float>(lse);
  result.entropy = static_cast<float>(entropy);
  const double hit = terms.upstream_loss * terms.hit, spread = terms.upstream_loss * terms.spread;
  const double extra = spread * terms.weight_sum + 2.0 * terms.z_loss * terms.upstream_loss * lse +
                       terms.upstream_lse;
  const double slope = -terms.upstream_entropy, shift = entropy - log_sum;
  result.base = static_cast<float>((hit + extra + slope * shift) / sum);
  result.slope = static_cast<float>(slope / sum);
  result.spread = static_cast<float>(spread);
  // a target whose probability is 0 may lie infinitely far below
  const double target_extra = target > 0.0 ? target * (extra + slope * (shift - distance)) : 0.0;
  result.target_grad =
      static_cast<float>((target_extra - sums.others * hit) / sum - spread * terms.target_weight);
  return result;
}
}  // namespace fastft
