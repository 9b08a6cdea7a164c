// Elements of a gated unit, as swiglu.cpp hands them to swiglu_kernel.cpp: each pointer is to as
// many floats or bfloat16s, one after another.
#pragma once
#include <stdint.h>

namespace fastft {
struct SwigluElements {
  const void *gate, *up, *grad;  // `grad` of backward alone
  void *out, *grad_up;           // forward: the result; backward: the gate's gradient, and up's
  int64_t begin, end;
  bool bfloat16;
};
}  // namespace fastft
