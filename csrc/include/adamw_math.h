// AdamW for one element, shared by the CPU and the CUDA sources: fp32 inside, every operation rounded on its own except
// the two fused multiply-adds, which are where torch's fused CPU kernel has them, so that fp32 results equal it bit for
// bit. Everything is static: a CPU kernel file is compiled once per instruction set and must share no inline function.
#pragma once
#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define FASTFT_HD static __host__ __device__ __forceinline__
#else
#define FASTFT_HD static inline __attribute__((always_inline, unused))
#endif

// One row of the op's `hyper` table, in this order.
struct AdamwHyper {
  float decay;        // 1 - lr * weight_decay
  float lerp_weight;  // 1 - beta1
  float beta2;
  float one_minus_beta2;
  float negative_step;     // -lr / (1 - beta1^t)
  float correction2_sqrt;  // sqrt(1 - beta2^t)
  float eps;
  float grad_sign;  // -1 to maximize
};

#if defined(__CUDA_ARCH__)  // the intrinsics keep nvcc from contracting what the CPU rounds twice
FASTFT_HD float ft_mul(float a, float b) { return __fmul_rn(a, b); }
FASTFT_HD float ft_add(float a, float b) { return __fadd_rn(a, b); }
FASTFT_HD float ft_fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
FASTFT_HD float ft_sqrt(float a) { return __fsqrt_rn(a); }
FASTFT_HD float ft_div(float a, float b) { return __fdiv_rn(a, b); }
#else
FASTFT_HD float ft_mul(float a, float b) { return a * b; }
FASTFT_HD float ft_add(float a, float b) { return a + b; }
FASTFT_HD float ft_fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
FASTFT_HD float ft_sqrt(float a) { return __builtin_sqrtf(a); }
FASTFT_HD float ft_div(float a, float b) { return a / b; }
#endif

// Updates both moments in place and returns the new parameter.
FASTFT_HD float adamw_element(float param, float grad, float* exp_avg, float* exp_avg_sq, const AdamwHyper& h) {
  grad = ft_mul(grad, h.grad_sign);
  const bool near = h.lerp_weight < 0.5f;  // torch's lerp starts from the nearer end
  const float weight = near ? h.lerp_weight : ft_add(h.lerp_weight, -1.0f);
  const float m = ft_fma(weight, ft_add(grad, -*exp_avg), near ? *exp_avg : grad);
  const float v = ft_fma(ft_mul(h.one_minus_beta2, grad), grad, ft_mul(*exp_avg_sq, h.beta2));
  const float denominator = ft_add(ft_div(ft_sqrt(v), h.correction2_sqrt), h.eps);
  *exp_avg = m;
  *exp_avg_sq = v;
  return ft_add(ft_mul(param, h.decay), ft_div(ft_mul(h.negative_step, m), denominator));
}

// A bf16 parameter and the int16 remainder together are the fp32 master: its bits are (param << 16) + remainder,
// signed. The parameter is the master rounded to nearest, ties away from zero: with ties to even, both neighbours of an
// even parameter at exactly half a step would need the same 16 bits, and one of the two masters would be lost.
FASTFT_HD float master_join(uint16_t param, int16_t remainder) {
  // No split makes these pairs: somebody has overwritten the parameter, and the old remainder would turn it into NaN.
  const bool zero = (param & 0x7fff) == 0, infinite = (param & 0x7fff) == 0x7f80;
  const bool stale = (zero && remainder < 0) || (infinite && remainder > 0);
  const uint32_t bits = ((uint32_t)param << 16) + (stale ? 0u : (uint32_t)(int32_t)remainder);
  float master;
  memcpy(&master, &bits, sizeof bits);
  return master;
}

FASTFT_HD void master_split(float master, uint16_t* param, int16_t* remainder) {
  uint32_t bits;
  memcpy(&bits, &master, sizeof bits);
  bits = master != master ? 0x7fc00000u : bits;  // rounding would turn some NaNs into Inf or zero
  *param = (uint16_t)((bits + 0x8000u) >> 16);
  *remainder = (int16_t)(uint16_t)bits;
}

FASTFT_HD float bf16_to_float(uint16_t value) { return master_join(value, 0); }
