// AdamW over a run of one tensor's elements; compiled once per instruction set (isa.h). One loop
// widens what is kept in 16 bits, updates and rounds. What needs random bits goes block by block,
// with the bits drawn into the first-level cache before; 8-bit moments as well, decoded there, in
// whole blocks of theirs.
#include "adamw_math.h"
#include "isa.h"
#include "lanes.h"
#include "moments_8bit_lanes.h"
#include "philox_lanes.h"

namespace {
constexpr int kBlock = 512;  // elements

struct alignas(64) Block {
  float exp_avg[kBlock], exp_avg_sq[kBlock];
  uint16_t bits[3][kBlock + kPhiloxGroup];  // of each stream
  uint16_t swapped[kBlock];                 // those of the moments with their bytes swapped
};

struct Random {
  uint64_t seed, first;  // global index of the block's first element
  uint32_t step;

  // Returns the bits of `n` elements, which it draws into `bits`.
  const uint16_t* draw(uint32_t stream, int n, uint16_t* bits) const {
    const int skip = int(first % kPhiloxGroup);
    for (int i = 0; i < skip + n; i += kPhiloxGroup)
      philox_group(first - skip + i, step, stream, seed, bits + i);
    return bits + skip;
  }
};

// Elements as Numbers, which are floats or Lanes.
inline void load(const float* from, float* to) { *to = *from; }
inline void load(const uint16_t* from, float* to) { *to = widened(*from); }
inline void load_master(const uint16_t* param, const int16_t* remainder, float* to) {
  *to = master_join(widened(*param), *remainder);
}
inline void store(float value, float* to) { *to = value; }
inline void store_nearest(float value, uint16_t* to) { *to = bf16_nearest(value); }
inline void store_stochastic(float value, const uint16_t* random, uint16_t* to) {
  *to = bf16_stochastic(value, *random);
}
inline void store_master(float value, uint16_t* param, int16_t* remainder) {
  master_split(value, param, remainder);
}

template <AdamwRounding rounding, class Number, class Element>
FASTFT_HD Number load_param(const Element* param, const void* residue, int64_t i) {
  Number value;
  if constexpr (rounding == kExact) {
    load_master(param + i, static_cast<const int16_t*>(residue) + i, &value);
  } else {
    load(param + i, &value);
    if constexpr (rounding == kKahan) {
      Number compensation;
      load(static_cast<const uint16_t*>(residue) + i, &compensation);
      value = ft_add(value, compensation);
    }
  }
  return value;
}

template <AdamwRounding rounding, class Number, class Element>
FASTFT_HD void store_param(Number value, const uint16_t* random, Element* param, void* residue,
                           int64_t i) {
  if constexpr (rounding == kFp32) store(value, param + i);
  if constexpr (rounding == kExact)
    store_master(value, param + i, static_cast<int16_t*>(residue) + i);
  if constexpr (rounding == kStochastic) store_stochastic(value, random + i, param + i);
  if constexpr (rounding == kNearest || rounding == kKahan) store_nearest(value, param + i);
  if constexpr (rounding == kKahan) {
    Number rounded;
    load(param + i, &rounded);
    store_nearest(finite_or_zero(ft_sub(value, rounded)), static_cast<uint16_t*>(residue) + i);
  }
}

template <class Number>
FASTFT_HD void store_moment(Number value, const uint16_t*, float* to, int64_t i) {
  store(value, to + i);
}
template <class Number>
FASTFT_HD void store_moment(Number value, const uint16_t* random, uint16_t* to, int64_t i) {
  store_stochastic(value, random + i, to + i);
}

struct Bits {
  const uint16_t *param, *exp_avg, *exp_avg_sq, *max_exp_avg_sq;  // nullptr where nothing is drawn
};

template <AdamwRounding rounding>
struct Kept {
  using Element = uint16_t;
};
template <>
struct Kept<kFp32> {
  using Element = float;
};

template <AdamwRounding rounding, class Moment, bool amsgrad,
          class Element = typename Kept<rounding>::Element>
void update(Element* __restrict param, const Element* __restrict grad, void* __restrict residue,
            Moment* __restrict exp_avg, Moment* __restrict exp_avg_sq,
            Moment* __restrict max_exp_avg_sq, int64_t n, float factor, const AdamwHyper& hyper,
            const Bits& bits) {
  const AdamwHyper h = hyper;
  const auto at = [&](int64_t i, auto g) __attribute__((always_inline)) {
    using Number = decltype(g);
    Number m, v, largest;
    load(grad + i, &g);
    load(exp_avg + i, &m);
    load(exp_avg_sq + i, &v);
    if constexpr (amsgrad) load(max_exp_avg_sq + i, &largest);
    const Number value = adamw_element(load_param<rounding, Number>(param, residue, i), g, factor,
                                       &m, &v, amsgrad ? &largest : nullptr, h);
    store_param<rounding>(value, bits.param, param, residue, i);
    store_moment(m, bits.exp_avg, exp_avg, i);
    store_moment(v, bits.exp_avg_sq, exp_avg_sq, i);
    if constexpr (amsgrad) store_moment(largest, bits.max_exp_avg_sq, max_exp_avg_sq, i);
  };
  int64_t i = 0;
#if defined(FASTFT_LANES)
  constexpr bool floats = sizeof(Element) == 4 || sizeof(Moment) == 4;
  for (; i + FASTFT_LANES <= n; i += FASTFT_LANES) at(i, Lanes<floats>());
#endif
  for (; i < n; i++) at(i, float());
}

// The bits for `n` elements of whatever is rounded stochastically.
Bits draw(const AdamwTensor& t, const Random& random, int n, Block& block) {
  const auto of = [&](PhiloxStream stream) { return random.draw(stream, n, block.bits[stream]); };
  Bits bits{};
  if (t.rounding == kStochastic) bits.param = of(kStreamParam);
  if (!t.bf16_moments && !t.columns) return bits;
  bits.exp_avg = of(kStreamMoments);
  if (t.columns) return bits;  // codes swap the bytes themselves
  bits.exp_avg_sq = block.swapped;
  for (int i = 0; i < n; i++) block.swapped[i] = swap_bytes(bits.exp_avg[i]);
  if (t.max_exp_avg_sq) bits.max_exp_avg_sq = of(kStreamMaxExpAvgSq);
  return bits;
}

// The blocks of 8-bit moments in `n` elements from element `i` on, as f(offset from i, elements,
// scale).
template <class F>
void each_moment_block(const AdamwTensor& t, int64_t i, int n, F f) {
  const int64_t row = i / t.columns;
  int64_t column = i - row * t.columns;
  int64_t scale = row * (moment_blocks_of_row(t.columns)) + column / kMomentBlock;
  for (int done = 0; done < n; scale++) {
    const int64_t left = t.columns - column;
    const int size = left < kMomentBlock ? int(left) : int(kMomentBlock);
    f(done, size, scale);
    done += size;
    column = column + size == t.columns ? 0 : column + size;
  }
}

// How many elements from `begin` on, the first of a block, make whole blocks and at most kBlock.
int whole_moment_blocks(const AdamwTensor& t, int64_t begin, int64_t end) {
  int64_t n = 0;
  for (int64_t column = begin % t.columns; n < end - begin;) {
    const int64_t left = t.columns - column;
    const int64_t size = left < kMomentBlock ? left : int64_t(kMomentBlock);
    if (n + size > kBlock) break;
    n += size;
    column = column + size == t.columns ? 0 : column + size;
  }
  return int(n);
}

void decode_moments(const AdamwTensor& t, int64_t i, int n, Block& block) {
  each_moment_block(t, i, n, [&](int from, int size, int64_t scale) {
    const int8_t* __restrict codes = static_cast<const int8_t*>(t.exp_avg) + i + from;
    const uint8_t* __restrict sq_codes = static_cast<const uint8_t*>(t.exp_avg_sq) + i + from;
    const float m_scale = t.exp_avg_scale[scale], v_scale = t.exp_avg_sq_scale[scale];
    if (decode_block(codes, sq_codes, m_scale, v_scale, size, block.exp_avg + from,
                     block.exp_avg_sq + from))
      return;
    for (int j = 0; j < size; j++) block.exp_avg[from + j] = exp_avg_decode(codes[j], m_scale);
    for (int j = 0; j < size; j++)
      block.exp_avg_sq[from + j] = exp_avg_sq_decode(sq_codes[j], v_scale);
  });
}

void encode_moments(const AdamwTensor& t, int64_t i, int n, const Bits& bits, const Block& block) {
  each_moment_block(t, i, n, [&](int from, int size, int64_t scale) {
    const float* __restrict m = block.exp_avg + from;
    const float* __restrict v = block.exp_avg_sq + from;
    int8_t* __restrict codes = static_cast<int8_t*>(t.exp_avg) + i + from;
    uint8_t* __restrict sq_codes = static_cast<uint8_t*>(t.exp_avg_sq) + i + from;
    float *m_scale = t.exp_avg_scale + scale, *v_scale = t.exp_avg_sq_scale + scale;
    if (encode_block(m, v, bits.exp_avg + from, size, codes, sq_codes, m_scale, v_scale)) return;
    int32_t largest = 0, largest_sq = 0;
    for (int j = 0; j < size; j++) {
      const bool finite = both_finite(m[j], v[j]);
      const int32_t a = finite ? magnitude(m[j]) : 0, b = finite ? magnitude(v[j]) : 0;
      largest = a > largest ? a : largest;
      largest_sq = b > largest_sq ? b : largest_sq;
    }
    *m_scale = bits_float(uint32_t(largest)), *v_scale = bits_float(uint32_t(largest_sq));
    const float divisor = largest ? *m_scale : 1.0f, sq_divisor = largest_sq ? *v_scale : 1.0f;
    for (int j = 0; j < size; j++)
      codes[j] = exp_avg_encode(m[j], both_finite(m[j], v[j]), divisor, bits.exp_avg[from + j]);
    for (int j = 0; j < size; j++)
      sq_codes[j] = exp_avg_sq_encode(v[j], both_finite(m[j], v[j]), sq_divisor,
                                      swap_bytes(bits.exp_avg[from + j]));
  });
}

template <class T>
T* at(void* base, int64_t i) {
  return base ? static_cast<T*>(base) + i : nullptr;
}

// `n` elements from `i` on, with the moments there or, decoded from 8 bits, in `block`.
template <AdamwRounding rounding, class Moment, bool amsgrad>
void update_part(const AdamwTensor& t, int64_t i, int64_t n, float factor, const AdamwHyper& h,
                 const Bits& bits, Block* block) {
  using Element = typename Kept<rounding>::Element;
  Moment* exp_avg = block ? reinterpret_cast<Moment*>(block->exp_avg) : at<Moment>(t.exp_avg, i);
  Moment* exp_avg_sq =
      block ? reinterpret_cast<Moment*>(block->exp_avg_sq) : at<Moment>(t.exp_avg_sq, i);
  update<rounding, Moment, amsgrad>(
      at<Element>(t.param, i), static_cast<const Element*>(t.grad) + i, at<uint16_t>(t.residue, i),
      exp_avg, exp_avg_sq, at<Moment>(t.max_exp_avg_sq, i), n, factor, h, bits);
}

using UpdatePart = void (*)(const AdamwTensor&, int64_t, int64_t, float, const AdamwHyper&,
                            const Bits&, Block*);

template <AdamwRounding rounding>
UpdatePart update_part_of(const AdamwTensor& t) {
  if (t.bf16_moments)
    return t.max_exp_avg_sq ? update_part<rounding, uint16_t, true>
                            : update_part<rounding, uint16_t, false>;
  return t.max_exp_avg_sq ? update_part<rounding, float, true>
                          : update_part<rounding, float, false>;
}

UpdatePart update_part_of(const AdamwTensor& t) {
  switch (t.rounding) {
    case kExact:
      return update_part_of<kExact>(t);
    case kKahan:
      return update_part_of<kKahan>(t);
    case kStochastic:
      return update_part_of<kStochastic>(t);
    case kNearest:
      return update_part_of<kNearest>(t);
    default:
      return update_part_of<kFp32>(t);
  }
}
}  // namespace

extern "C" void FASTFT_KERNEL(adamw)(const AdamwTensor* tensor, int64_t begin, int64_t end,
                                     const AdamwHyper* hyper, float factor, uint64_t seed) {
  const AdamwTensor& t = *tensor;
  factor = ft_mul(hyper->grad_sign, factor);
  const UpdatePart update_part = update_part_of(t);
  if (t.rounding != kStochastic && !t.bf16_moments && !t.columns) {
    update_part(t, begin, end - begin, factor, *hyper, Bits{}, nullptr);
    return;
  }
  Block block;
  while (begin < end) {
    const Random random{seed, uint64_t(t.first + begin), uint32_t(hyper->step)};
    const int64_t room = kBlock - int64_t(random.first % kBlock);
    const int n = t.columns ? whole_moment_blocks(t, begin, end)
                            : int(end - begin < room ? end - begin : room);
    const Bits bits = draw(t, random, n, block);
    if (t.columns) decode_moments(t, begin, n, block);
    update_part(t, begin, n, factor, *hyper, bits, t.columns ? &block : nullptr);
    if (t.columns) encode_moments(t, begin, n, bits, block);
    begin += n;
  }
}
