// AdamW over a run of one tensor's elements; compiled once per instruction set (isa.h). One loop
// widens what is kept in 16 bits, updates and rounds. What needs random bits goes block by block,
// with the bits drawn into the first-level cache before; moments of 8 and 4 bits as well, decoded
// there, in whole blocks of theirs.
#include "adamw_math.h"
#include "isa.h"
#include "lanes.h"
#include "moment_blocks.h"
#include "pair_lanes.h"
#include "philox_lanes.h"

namespace {
constexpr int kBlock = kMomentsTogether;  // elements

// Encoding reads up to 32 elements behind the last one of an array, in the array behind it.
struct alignas(64) Block {
  float exp_avg[kBlock], exp_avg_sq[kBlock];
  uint16_t bits[3][kBlock + kPhiloxGroup];  // of each stream
  uint16_t swapped[kBlock];                 // those of the moments with their bytes swapped
};

struct Random {
  const PhiloxKeys& keys;
  uint64_t first;  // global index of the block's first element
  uint32_t step;

  // Returns the bits of `n` elements, which it draws into `bits`.
  const uint16_t* draw(uint32_t stream, int n, uint16_t* bits) const {
    constexpr int kTogether = kPhiloxTogether * kPhiloxGroup;
    const int skip = int(first % kPhiloxGroup);
    for (int i = 0; i < skip + n;) {
      const uint64_t from = first - uint64_t(skip) + uint64_t(i);
      const bool together = from % kTogether == 0 && i + kTogether - kPhiloxGroup < skip + n;
      if (together)
        philox_groups<kPhiloxTogether>(from, step, stream, keys, bits + i);
      else
        philox_groups<1>(from, step, stream, keys, bits + i);
      i += together ? kTogether : kPhiloxGroup;
    }
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

template <class Number>
struct Begun {
  Number exp_avg, root;
};

// Updates as many of `n` elements as are whole Numbers; returns how many. Roots and quotients come
// late, and a processor looks only some sixty operations ahead for one that it can do: so each is
// used one turn after it has been begun.
template <class Number, int64_t kLanes, class Begin, class Change, class End>
FASTFT_HD int64_t in_turns(int64_t n, Begin begin, Change change_of, End end) {
  int64_t i = 0;
  if (n >= 2 * kLanes) {
    auto change = change_of(begin(0, Number()));
    auto begun = begin(kLanes, Number());
    for (; i + 3 * kLanes <= n; i += kLanes) {
      const auto next = begin(i + 2 * kLanes, Number());
      const auto next_change = change_of(begun);
      end(i, change);
      begun = next, change = next_change;
    }
    end(i, change), end(i + kLanes, change_of(begun));
    i += 2 * kLanes;
  }
  for (; i + kLanes <= n; i += kLanes) end(i, change_of(begin(i, Number())));
  return i;
}

template <AdamwRounding rounding, class Moment, bool amsgrad,
          class Element = typename Kept<rounding>::Element>
void update(Element* __restrict param, const Element* __restrict grad, void* __restrict residue,
            Moment* __restrict exp_avg, Moment* __restrict exp_avg_sq,
            Moment* __restrict max_exp_avg_sq, int64_t n, float factor, const AdamwHyper& hyper,
            const Bits& bits) {
  const AdamwHyper h = hyper;
  const auto begin = [&](int64_t i, auto g) __attribute__((always_inline)) {
    Begun<decltype(g)> begun;
    decltype(g) v, largest;
    load(grad + i, &g);
    load(exp_avg + i, &begun.exp_avg);
    load(exp_avg_sq + i, &v);
    if constexpr (amsgrad) load(max_exp_avg_sq + i, &largest);
    begun.root = adamw_root(g, factor, &begun.exp_avg, &v, amsgrad ? &largest : nullptr, h);
    store_moment(begun.exp_avg, bits.exp_avg, exp_avg, i);
    store_moment(v, bits.exp_avg_sq, exp_avg_sq, i);
    if constexpr (amsgrad) store_moment(largest, bits.max_exp_avg_sq, max_exp_avg_sq, i);
    return begun;
  };
  const auto end = [&](int64_t i, auto change) __attribute__((always_inline)) {
    const auto old = load_param<rounding, decltype(change)>(param, residue, i);
    store_param<rounding>(adamw_changed(old, change, h), bits.param, param, residue, i);
  };
  const auto change_of = [&](auto begun) __attribute__((always_inline)) {
    return adamw_change(begun.exp_avg, begun.root, h);
  };
  int64_t i = 0;
#if defined(FASTFT_LANES)
  using Number = Lanes<sizeof(Element) == 4 || sizeof(Moment) == 4>;
  i = in_turns<Number, FASTFT_LANES>(n, begin, change_of, end);
#elif defined(FASTFT_PAIR_LANES)
  if constexpr (sizeof(Element) == 2) {
    using Number = PairLanes<sizeof(Moment) == 4>;
    i = in_turns<Number, Number::kCount>(n, begin, change_of, end);
  }
#endif
  for (; i < n; i++) end(i, change_of(begin(i, float())));
}

// The bits for `n` elements of whatever is rounded stochastically by the update.
Bits draw(const AdamwTensor& t, const Random& random, int n, Block& block) {
  const auto of = [&](PhiloxStream stream) { return random.draw(stream, n, block.bits[stream]); };
  Bits bits{};
  if (t.rounding == kStochastic) bits.param = of(kStreamParam);
  if (!t.bf16_moments) return bits;
  bits.exp_avg = of(kStreamMoments);
  bits.exp_avg_sq = block.swapped;
  for (int i = 0; i < n; i++) block.swapped[i] = swap_bytes(bits.exp_avg[i]);
  if (t.max_exp_avg_sq) bits.max_exp_avg_sq = of(kStreamMaxExpAvgSq);
  return bits;
}

template <class T>
T* at(void* base, int64_t i) {
  return base ? static_cast<T*>(base) + i : nullptr;
}

// `n` elements from `i` on, with the moments there or, decoded from codes, in `block`.
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
  const PhiloxKeys keys(seed);
  const auto random = [&] {
    return Random{keys, uint64_t(t.first + begin), uint32_t(hyper->step)};
  };
  Block block;
  while (t.columns && begin < end) {
    const MomentRun run = moment_run(t, begin, end);
    const Bits bits = draw(t, random(), run.n, block);
    decode_moments(run, block.exp_avg, block.exp_avg_sq);
    update_part(t, begin, run.n, factor, *hyper, bits, &block);
    const MomentScales scales(run, block.exp_avg, block.exp_avg_sq);
    // drawn while the scales, for which all wait, come out; codes swap the bytes themselves
    const uint16_t* of_codes = random().draw(kStreamMoments, run.n, block.bits[kStreamMoments]);
    encode_moments(run, scales, of_codes, block.exp_avg, block.exp_avg_sq);
    begin += run.n;
  }
  while (begin < end) {
    const int64_t room = kBlock - int64_t(random().first % kBlock);
    const int n = int(end - begin < room ? end - begin : room);
    update_part(t, begin, n, factor, *hyper, draw(t, random(), n, block), nullptr);
    begin += n;
  }
}
