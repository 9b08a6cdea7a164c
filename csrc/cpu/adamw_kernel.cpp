// AdamW over a run of one tensor's elements; compiled once per instruction set (isa.h).
#include "adamw_math.h"
#include "isa.h"

extern "C" void FASTFT_KERNEL(adamw_fp32)(float* __restrict param, const float* __restrict grad,
                                          float* __restrict exp_avg, float* __restrict exp_avg_sq, int64_t n,
                                          const AdamwHyper* hyper) {
  const AdamwHyper h = *hyper;
  for (int64_t i = 0; i < n; i++) param[i] = adamw_element(param[i], grad[i], &exp_avg[i], &exp_avg_sq[i], h);
}

extern "C" void FASTFT_KERNEL(adamw_bf16)(uint16_t* __restrict param, int16_t* __restrict remainder,
                                          const uint16_t* __restrict grad, float* __restrict exp_avg,
                                          float* __restrict exp_avg_sq, int64_t n, const AdamwHyper* hyper) {
  const AdamwHyper h = *hyper;
  for (int64_t i = 0; i < n; i++) {
    const float master = master_join(param[i], remainder[i]);
    master_split(adamw_element(master, bf16_to_float(grad[i]), &exp_avg[i], &exp_avg_sq[i], h), &param[i],
                 &remainder[i]);
  }
}
