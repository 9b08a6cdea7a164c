// Rows of a normalisation, as rms_norm.cpp hands them to rms_norm_kernel.cpp: `x`, `grad` and `out`
// are rows of `width` floats or bfloat16s, one after another.
#pragma once
#include <stdint.h>

namespace fastft {
struct RmsNormRows {
  const void *x, *weight, *grad;  // `grad` of backward alone
  void* out;                      // forward: the result; backward: the gradient of x
  float* rstd;                    // of each row: forward writes it, backward reads it
  float* grad_weight;             // written: the rows' part of the gradient; nullptr: not asked for
  int64_t begin, end, width;
  float eps, offset;
  bool bfloat16;
};
}  // namespace fastft
