// The codes of neighbouring blocks' 8-bit moments, with AVX2 and AVX-512: one loop goes through all
// of them, and begins what takes long before it is needed, in whichever block that is.
#pragma once
#include "moments_8bit_lanes.h"

namespace {
constexpr int kMomentsTogether = 4 * kMomentBlock;  // elements, in whole blocks

#if defined(FASTFT_WIDE)
// Neighbouring blocks to be encoded. Where a scale is not plain, they are not.
struct EncodedBlocks {
  int count = 0;
  int end[kMomentsTogether];  // the element behind each of them, which may have one alone
  float reciprocal[kMomentsTogether], sq_reciprocal[kMomentsTogether];  // of the scales

  void add(int size, float scale, float sq_scale) {
    end[count] = (count ? end[count - 1] : 0) + size;
    reciprocal[count] = reciprocal_of(scale), sq_reciprocal[count] = reciprocal_of(sq_scale);
    count++;
  }
};

// Goes kCodesTogether elements a time through blocks, and meets the last of them again and again.
struct Walk {
  const EncodedBlocks& blocks;
  int at = 0, block = 0;

  explicit Walk(const EncodedBlocks& blocks) : blocks(blocks) {}
  inline __attribute__((always_inline)) int left() const {
    const int left = blocks.end[block] - at;
    return left < kCodesTogether ? left : kCodesTogether;
  }
  inline __attribute__((always_inline)) void go_on() {
    const int next = at + left();
    if (next == blocks.end[blocks.count - 1]) return;
    block += next == blocks.end[block];
    at = next;
  }
  inline __attribute__((always_inline)) Wide reciprocal() const {
    return wide(blocks.reciprocal[block]);
  }
  inline __attribute__((always_inline)) Wide sq_reciprocal() const {
    return wide(blocks.sq_reciprocal[block]);
  }
};

// The moments, and the codes that they get.
struct Encoding {
  const float *m, *v;
  const uint16_t* bits;
  int8_t* codes;
  uint8_t* sq_codes;
};

// The shares that some m have of their scale, in units, and the fourth roots of these.
struct Root {
  Wide share, root;
};

FASTFT_HD Root root_drawn(const float* m, Wide reciprocal) {
  const Wide size = wide_size(FASTFT_OF_WIDE(loadu_ps)(m));
  const Wide share = wide_mul(wide_mul(size, reciprocal), wide(FASTFT_EXP_AVG_UNITS));
  return {share, FASTFT_OF_WIDE(sqrt_ps)(share)};
}

FASTFT_HD void draw_again(Root& of) { of.root = FASTFT_OF_WIDE(sqrt_ps)(of.root); }

// The codes of kWide elements from `i` on.
FASTFT_HD void encode_register(const Encoding& a, int i, Wide sq_reciprocal, Root of, WideInt& code,
                               WideInt& sq_code) {
  const WideInt random = wide_random(a.bits + i);
  code = exp_avg_encode(FASTFT_OF_WIDE(loadu_ps)(a.m + i), of.share, of.root, random);
  sq_code = exp_avg_sq_encode(FASTFT_OF_WIDE(loadu_ps)(a.v + i), sq_reciprocal, random);
}

FASTFT_HD void store_encoded(const Encoding& a, const Walk& of,
                             const WideInt (&code)[kCodesTogether / kWide],
                             const WideInt (&sq_code)[kCodesTogether / kWide]) {
  const int left = of.left();
  if (left == kCodesTogether) {
    store_codes(code, a.codes + of.at), store_sq_codes(sq_code, a.sq_codes + of.at);
    return;
  }
  int8_t last[kCodesTogether];
  uint8_t sq_last[kCodesTogether];
  store_codes(code, last), store_sq_codes(sq_code, sq_last);
  memcpy(a.codes + of.at, last, size_t(left)), memcpy(a.sq_codes + of.at, sq_last, size_t(left));
}

// Square roots take the processor as long as all else: drawn ahead, they keep nobody waiting. With
// AVX-512 the root of a root does not wait for the first one either; AVX2 has no registers for it.
// Reads up to kCodesTogether elements behind the last block.
#if defined(__AVX512F__)
struct RootPair {
  Root lower, upper;
};

static inline void encode_all(const Encoding& a, const EncodedBlocks& blocks) {
  Walk ahead(blocks), of(blocks);
  const auto drawn = [&]() __attribute__((always_inline)) {
    const Wide reciprocal = ahead.reciprocal();
    const float* m = a.m + ahead.at;
    ahead.go_on();
    return RootPair{root_drawn(m, reciprocal), root_drawn(m + kWide, reciprocal)};
  };
  RootPair now = drawn(), next = drawn(), third = drawn();
  draw_again(now.lower), draw_again(now.upper);
  draw_again(next.lower), draw_again(next.upper);
  for (int left = blocks.end[blocks.count - 1]; left > 0; left -= of.left(), of.go_on()) {
    const RootPair last = drawn();
    draw_again(third.lower), draw_again(third.upper);
    WideInt code[2], sq_code[2];
    encode_register(a, of.at, of.sq_reciprocal(), now.lower, code[0], sq_code[0]);
    encode_register(a, of.at + kWide, of.sq_reciprocal(), now.upper, code[1], sq_code[1]);
    store_encoded(a, of, code, sq_code);
    now = next, next = third, third = last;
  }
}
#else
static inline void encode_all(const Encoding& a, const EncodedBlocks& blocks) {
  constexpr int kRegisters = kCodesTogether / kWide;
  Walk ahead(blocks), of(blocks);
  Root roots[kRegisters];
  const auto draw = [&](int k) __attribute__((always_inline)) {
    roots[k] = root_drawn(a.m + ahead.at + kWide * k, ahead.reciprocal());
    draw_again(roots[k]);
  };
  for (int k = 0; k < kRegisters; k++) draw(k);
  for (int left = blocks.end[blocks.count - 1]; left > 0; left -= of.left(), of.go_on()) {
    WideInt code[kRegisters], sq_code[kRegisters];
    ahead.go_on();
    for (int k = 0; k < kRegisters; k++) {
      const Root root = roots[k];
      draw(k);
      encode_register(a, of.at + kWide * k, of.sq_reciprocal(), root, code[k], sq_code[k]);
    }
    store_encoded(a, of, code, sq_code);
  }
}
#endif
#endif
}  // namespace
