// The 4-bit codes of AdamW's first moment, element by element: fastft/optim/moments_4bit.py says
// what they are and why. A code stands for m / sqrt(v) with v as it is kept, in the code of
// moments_8bit.h, which also has the blocks and the division by a block's scale. Every float
// operation is rounded on its own; no table and no branch.
#pragma once
#include "moments_8bit.h"

enum { kNibbleMost = 7, kNibbleNan = -8 };
#define FASTFT_LARGEST_FLOAT 0x1.fffffep127f

// Bytes of a row of so many codes. Two lie in a byte, the one of the even column in its lower half.
FASTFT_HD int64_t nibble_bytes_of_row(int64_t columns) { return columns / 2 + columns % 2; }

FASTFT_HD int32_t nibble_of(uint8_t byte, bool odd) {
  const int32_t nibble = odd ? byte >> 4 : byte & 15;
  return (nibble ^ 8) - 8;
}

FASTFT_HD uint8_t nibble_pair(int32_t even, int32_t odd) {
  return (uint8_t)(((uint32_t)even & 15u) | (uint32_t)odd << 4);
}

// The root of v as its code and scale have it.
FASTFT_HD float kept_root(uint8_t sq_code, float sq_scale) {
  return ft_sqrt(exp_avg_sq_decode(sq_code, sq_scale));
}

FASTFT_HD float nibble_decode(int32_t code, float scale, float root) {
  const float m = ft_mul(ft_mul((float)code, 1.0f / (float)kNibbleMost), ft_mul(scale, root));
  return code == kNibbleNan ? bits_float(0x7fc00000u) : m;
}

// |m| / root, of which a block's largest is its scale; `finite` is of both moments.
FASTFT_HD float nibble_ratio(float m, bool finite, float root) {
  const float ratio = ft_div(bits_float((uint32_t)magnitude(m)), root);
  const float most = ratio < FASTFT_LARGEST_FLOAT ? ratio : FASTFT_LARGEST_FLOAT;
  return finite & (root > 0.0f) ? most : 0.0f;
}

// `divisor` is the block's scale, or 1 where that is 0.
FASTFT_HD int32_t nibble_encode(float m, float ratio, bool finite, float divisor, uint16_t random) {
  const float y = ft_mul(share_of(ratio, divisor), (float)kNibbleMost);
  const int32_t floor = (int32_t)y, low = floor < kNibbleMost - 1 ? floor : kNibbleMost - 1;
  const bool up = (float)(int32_t)random < ft_mul(ft_sub(y, (float)low), 65536.0f);
  const int32_t code = low + (int32_t)up;
  return finite ? (m < 0.0f ? -code : code) : (int32_t)kNibbleNan;
}
