// bfloat16 as what it is, the upper 16 bits of a float32: widening and rounding for CPU and CUDA. A
// uint16_t stands for its bits.
#pragma once
#include <stdint.h>
#include <string.h>

#include "host_device.h"

FASTFT_HD uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

FASTFT_HD float bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

FASTFT_HD float widened(float value) { return value; }
FASTFT_HD float widened(uint16_t bf16) { return bits_float((uint32_t)bf16 << 16); }

// Each of the two bfloat16 values in a word; the lower one comes first in memory.
FASTFT_HD float bf16_lower(uint32_t word) { return bits_float(word << 16); }
FASTFT_HD float bf16_upper(uint32_t word) { return bits_float(word & 0xffff0000u); }

// The bits of a number, or of a register of them, such that the upper half is the nearest bfloat16,
// ties to even.
template <class Words>
FASTFT_HD Words bf16_nearest_sum(Words bits) {
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

FASTFT_HD uint16_t bf16_nearest(float value) {
  return value == value ? (uint16_t)(bf16_nearest_sum(float_bits(value)) >> 16) : (uint16_t)0x7fc0;
}

// The bits whose upper half is bf16_stochastic's result.
FASTFT_HD uint32_t bf16_stochastic_sum(float value, uint32_t random) {
  return value != value ? 0x7fc00000u : float_bits(value) + random;
}

// One of the two neighbouring bfloat16 values, the nearer the likelier, so that the mean over all
// `random` is `value`.
FASTFT_HD uint16_t bf16_stochastic(float value, uint16_t random) {
  return (uint16_t)(bf16_stochastic_sum(value, random) >> 16);
}
