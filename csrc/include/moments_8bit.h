// The 8-bit codes of AdamW's moments, element by element: fastft/optim/moments_8bit.py says what
// they are and why. Every float operation is rounded on its own, as there; no table and no branch,
// so that loops become vectors.
#pragma once
#include "adamw_math.h"

enum { kMomentBlock = 128, kExpAvgNan = -128, kSqOctave = 12 };
#define FASTFT_EXP_AVG_UNITS 260144641.0f   // 127^4
#define FASTFT_EXP_AVG_SQ_UNITS 2621440.0f  // code 255 in units of code 0: 1.25 * 2^21
#define FASTFT_SMALL_SCALE 0x1p-100f

// The blocks of a row of so many elements: its last one may be short.
FASTFT_HD int64_t moment_blocks_of_row(int64_t columns) {
  return (columns + kMomentBlock - 1) / kMomentBlock;
}

FASTFT_HD float exp_avg_decode(int8_t code, float scale) {
  const float root = ft_mul((float)code, 1.0f / 127.0f);
  const float m =
      ft_mul(ft_mul(ft_mul(root, root < 0.0f ? -root : root), ft_mul(root, root)), scale);
  return code == kExpAvgNan ? bits_float(0x7fc00000u) : m;
}

FASTFT_HD float exp_avg_sq_decode(uint8_t code, float scale) {
  const uint32_t octave = (code * 171u) >> 11, place = code - octave * kSqOctave;  // code / 12
  const float units =
      ft_mul((float)(int32_t)(place + kSqOctave), bits_float((octave + 127u) << 23));
  return ft_mul(ft_mul(units, 1.0f / (kSqOctave * FASTFT_EXP_AVG_SQ_UNITS)), scale);
}

// The bits of |value|, by which finite values compare as by themselves.
FASTFT_HD int32_t magnitude(float value) { return (int32_t)(float_bits(value) & 0x7fffffffu); }

FASTFT_HD bool both_finite(float m, float v) {
  return (magnitude(m) < 0x7f800000) & (magnitude(v) < 0x7f800000);
}

// value / divisor by way of the reciprocal, of which a block needs only one; scaled where that
// would overflow.
FASTFT_HD float share_of(float value, float divisor) {
  const float up = divisor < FASTFT_SMALL_SCALE ? 0x1p64f : 1.0f;
  return ft_mul(ft_mul(value, up), ft_div(1.0f, ft_mul(divisor, up)));
}

// `divisor` is the block's scale, or 1 where that is 0; `finite` is of both moments.
FASTFT_HD int8_t exp_avg_encode(float m, bool finite, float divisor, uint16_t random) {
  const float share = share_of(bits_float((uint32_t)magnitude(m)), divisor);
  const float x = finite ? ft_mul(share, FASTFT_EXP_AVG_UNITS) : 0.0f;
  const int32_t floor = (int32_t)ft_sqrt(ft_sqrt(x)), low = floor < 126 ? floor : 126;
  const float root = (float)(low * low), next = (float)((low + 1) * (low + 1));
  const float below = ft_mul(root, root), above = ft_mul(next, next);
  const bool up =
      ft_mul((float)(int32_t)random, ft_add(above, -below)) < ft_mul(ft_add(x, -below), 65536.0f);
  const int32_t code = low + (int32_t)up;
  return (int8_t)(finite ? (m < 0.0f ? -code : code) : (int32_t)kExpAvgNan);
}

FASTFT_HD uint8_t exp_avg_sq_encode(float v, bool finite, float divisor, uint16_t random) {
  const float units = finite ? ft_mul(share_of(v, divisor), FASTFT_EXP_AVG_SQ_UNITS) : 1.0f;
  const float most = units < FASTFT_EXP_AVG_SQ_UNITS ? units : FASTFT_EXP_AVG_SQ_UNITS;
  // an octave, 23 bits of the next
  const uint32_t place = float_bits(most > 1.0f ? most : 1.0f) - 0x3f800000u;
  return (uint8_t)((place * kSqOctave + ((uint32_t)random << 7)) >> 23);
}
