// A checksum of bf16 weights, by which it shows that somebody else has written to them:
// fastft/optim/weight_bits.py.
#pragma once
#include <stdint.h>

namespace fastft {
constexpr int64_t kSection = 128;  // elements
constexpr int64_t kEvery = 32;     // of so many sections a step looks at one

struct SectionWeights {
  int16_t at[kSection];
  constexpr SectionWeights() : at{} {
    for (int64_t j = 0; j < kSection; j++) at[j] = int16_t(((j + 1) * 40503 & 0x7fff) | 1);
  }
};
constexpr SectionWeights kSectionWeights;

// The part of section `section`, where `n` elements or more are left.
inline uint64_t section_sum(const int16_t* bits, int64_t section, int64_t n) {
  uint32_t sum = 0;  // wraps
  if (n >= kSection)
    for (int64_t j = 0; j < kSection; j++) sum += uint32_t(bits[j] * kSectionWeights.at[j]);
  else
    for (int64_t j = 0; j < n; j++) sum += uint32_t(bits[j] * kSectionWeights.at[j]);
  return uint64_t(sum) * ((2 * uint64_t(section) + 1) * 0x9E3779B97F4A7C15u);
}
}  // namespace fastft
