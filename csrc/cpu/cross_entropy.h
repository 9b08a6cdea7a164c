// What cross_entropy.cpp hands to cross_entropy_kernel.cpp: one counted row.
#pragma once
#include <stdint.h>

namespace fastft {
struct CrossEntropyRow {
  const void* logits;  // `classes` floats or bfloat16s, one after another
  void* grad;          // as many of the same type, or null; may be `logits`
  float* loss;
  float* lse;
  int64_t classes, target;
  float scale;  // of the gradient
  bool bfloat16;
};
}  // namespace fastft
