// One counted row, as cross_entropy.cpp hands it to cross_entropy_kernel.cpp.
#pragma once
#include <stdint.h>

namespace fastft {
constexpr int64_t kExponentials = 16;
struct CrossEntropyRow {
  const void* logits;   // `classes` floats or bfloat16s, one after another
  const void* next;     // those of the row that comes next, or some others
  void* grad;           // as many of the same type, or null; may be `logits`
  const float* weight;  // of the classes, or null: all 1
  double weight_sum;
  int64_t classes, target;
  float label_smoothing, z_loss, logit_scale;
  float softcap;  // 0: none
  float upstream_loss, upstream_lse, upstream_entropy;
  bool bfloat16, statistics;
  float* exponentials;  // null, or room for those of a row, rounded up to kExponentials
  double* sums;         // null, or maximum and `others`: with `grad` known, else a result
  float loss, lse,
      entropy;  // results, but where sums are known; entropy and is_top1 only with `statistics`
  bool is_top1;
};
}  // namespace fastft
