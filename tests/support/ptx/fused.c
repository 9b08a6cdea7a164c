// a * b + c, rounded once and as asked, over arrays: numpy has no such operation.
#include <fenv.h>
#include <math.h>

static const int kModes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};

__attribute__((target_clones("fma", "default"))) void fused_f32(const float* a, const float* b, const float* c,
                                                               float* out, long n, int mode) {
  fesetround(kModes[mode]);
  for (long i = 0; i < n; i++) out[i] = __builtin_fmaf(a[i], b[i], c[i]);
  fesetround(FE_TONEAREST);
}

__attribute__((target_clones("fma", "default"))) void fused_f64(const double* a, const double* b, const double* c,
                                                               double* out, long n, int mode) {
  fesetround(kModes[mode]);
  for (long i = 0; i < n; i++) out[i] = __builtin_fma(a[i], b[i], c[i]);
  fesetround(FE_TONEAREST);
}
