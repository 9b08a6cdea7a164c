// AdamW for one element, shared by the CPU and the CUDA sources: fp32 inside, every operation
// rounded on its own except the two fused multiply-adds, which are where torch's fused CPU kernel
// has them, so that fp32 results equal it bit for bit.
#pragma once
#include "bf16.h"

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
  float step;       // t, for the random bits; 0: nothing is updated
};

// How a parameter is kept; the op's `table` has these numbers.
enum AdamwRounding : int64_t { kFp32 = 0, kExact = 1, kKahan = 2, kStochastic = 3, kNearest = 4 };

// One tensor of the op, or one processor's part of it.
struct AdamwTensor {
  void* param;  // float32 where rounding is kFp32, else bfloat16
  const void* grad;
  void *exp_avg, *exp_avg_sq;  // float32, bfloat16 where bf16_moments, or codes where columns > 0
  float *exp_avg_scale, *exp_avg_sq_scale;  // the scales of the blocks of codes, or nullptr
  int64_t columns;       // elements of a row, in which such blocks lie; 0 without codes
  void* max_exp_avg_sq;  // nullptr without amsgrad
  void* residue;         // what rounding keeps: int16 remainder, bfloat16 compensation, or nullptr
  int64_t numel;
  int64_t first;  // index of the first element among all of the optimizer's, for the random bits
  int64_t row;    // of the hyper table
  AdamwRounding rounding;
  bool bf16_moments;
  bool four_bit;  // the codes of exp_avg are two a byte, each row's from a byte of its own on
};

#if defined(__CUDA_ARCH__)  // the intrinsics keep nvcc from contracting what the CPU rounds twice
FASTFT_HD float ft_mul(float a, float b) { return __fmul_rn(a, b); }
FASTFT_HD float ft_add(float a, float b) { return __fadd_rn(a, b); }
FASTFT_HD float ft_sub(float a, float b) { return __fsub_rn(a, b); }
FASTFT_HD float ft_fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
FASTFT_HD float ft_sqrt(float a) { return __fsqrt_rn(a); }
FASTFT_HD float ft_div(float a, float b) { return __fdiv_rn(a, b); }
FASTFT_HD float ft_smaller(float a, float b) { return fminf(a, b); }  // b where a is NaN
#else
FASTFT_HD float ft_mul(float a, float b) { return a * b; }
FASTFT_HD float ft_add(float a, float b) { return a + b; }
FASTFT_HD float ft_sub(float a, float b) { return a - b; }
FASTFT_HD float ft_fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
FASTFT_HD float ft_sqrt(float a) { return __builtin_sqrtf(a); }
FASTFT_HD float ft_div(float a, float b) { return a / b; }
#endif

// The larger one; NaN wins, as in torch.maximum.
FASTFT_HD float ft_larger(float a, float b) { return a > b || a != a ? a : b; }

template <class Number>
struct Just {  // where a template argument is not to be deduced, so that nullptr will do
  using Type = Number;
};

// value / divisor, rounded to nearest, for values of 0, from 2^-75 to 2^64, Inf and NaN (a root)
// and divisors from 2^-30 to 1: the product with the rounded reciprocal is off by 1.5 last places
// at most, and one correction by its exact error hits the right one. (The error leaves no doubt
// unless the quotient is within 16 * 2^-48 of the middle between two floats, relatively, and all
// 93,036,199 pairs of mantissas with such quotients have been tried.) The smaller one keeps Inf -
// Inf away, and is the quotient itself where that is finite.
template <class Number>
FASTFT_HD Number ft_div_by(Number value, float divisor) {
#if defined(__CUDA_ARCH__)  // CPUs divide faster
  const Number reciprocal(ft_div(1.0f, divisor)), quotient = ft_mul(value, reciprocal);
  const Number error = ft_fma(ft_smaller(quotient, Number(1e36f)), Number(-divisor), value);
  return ft_fma(error, reciprocal, quotient);
#else
  return ft_div(value, Number(divisor));
#endif
}

// Updates the moments in place and returns the second one's root. `factor` is grad_sign times what
// clipping and loss scaling ask for; `max_exp_avg_sq` is nullptr without amsgrad. A Number is a
// float, or what csrc/cpu/lanes.h makes one.
template <class Number>
FASTFT_HD Number adamw_root(Number grad, float factor, Number* exp_avg, Number* exp_avg_sq,
                            typename Just<Number>::Type* max_exp_avg_sq, const AdamwHyper& h) {
  grad = ft_mul(grad, Number(factor));
  const bool near = h.lerp_weight < 0.5f;  // torch's lerp starts from the nearer end
  const Number change = ft_sub(grad, *exp_avg);
  const Number m = near ? ft_fma(Number(h.lerp_weight), change, *exp_avg)
                        : ft_fma(Number(ft_add(h.lerp_weight, -1.0f)), change, grad);
  const Number v =
      ft_fma(ft_mul(Number(h.one_minus_beta2), grad), grad, ft_mul(*exp_avg_sq, Number(h.beta2)));
  const Number largest = max_exp_avg_sq ? ft_larger(*max_exp_avg_sq, v) : v;
  if (max_exp_avg_sq) *max_exp_avg_sq = largest;
  *exp_avg = m;
  *exp_avg_sq = v;
  return ft_sqrt(largest);
}

// What is added to the decayed parameter.
template <class Number>
FASTFT_HD Number adamw_change(Number exp_avg, Number root, const AdamwHyper& h) {
  const Number denominator = ft_add(ft_div_by(root, h.correction2_sqrt), Number(h.eps));
  return ft_div(ft_mul(Number(h.negative_step), exp_avg), denominator);
}

template <class Number>
FASTFT_HD Number adamw_changed(Number param, Number change, const AdamwHyper& h) {
  return ft_add(ft_mul(param, Number(h.decay)), change);
}

// All of it: returns the new parameter.
template <class Number>
FASTFT_HD Number adamw_element(Number param, Number grad, float factor, Number* exp_avg,
                               Number* exp_avg_sq, typename Just<Number>::Type* max_exp_avg_sq,
                               const AdamwHyper& h) {
  const Number root = adamw_root(grad, factor, exp_avg, exp_avg_sq, max_exp_avg_sq, h);
  return adamw_changed(param, adamw_change(*exp_avg, root, h), h);
}

// A bf16 parameter and the int16 remainder together are the fp32 master, whose bits are (param <<
// 16) + remainder, signed. The parameter is the master rounded to nearest, ties away from zero:
// with ties to even, both neighbours of an even parameter at exactly half a step would need the
// same 16 bits, and one of the two masters would be lost.
FASTFT_HD float master_join(float param, int32_t remainder) {
  const float master = bits_float(float_bits(param) + (uint32_t)remainder);
  // No split makes NaN from another parameter: somebody has overwritten it, and the old remainder
  // does not fit.
  return master == master ? master : param;
}

// The bits of a master, the same for every NaN: rounding would make Inf or 0 of some.
FASTFT_HD uint32_t master_bits(float master) {
  return master != master ? 0x7fc00000u : float_bits(master);
}

FASTFT_HD void master_split(float master, uint16_t* param, int16_t* remainder) {
  const uint32_t bits = master_bits(master);
  *param = (uint16_t)((bits + 0x8000u) >> 16);
  *remainder = (int16_t)(uint16_t)bits;
}

// Kahan's compensation of a weight that has lost `value`: there is none beside Inf and NaN.
FASTFT_HD float finite_or_zero(float value) { return ft_add(value, -value) == 0.0f ? value : 0.0f; }
