// The random bits of philox.h for 128 neighbouring elements at once, or twice as many. With AVX2
// and AVX-512 by hand: compilers find no vectors in products of which both halves are needed.
#pragma once
#include <string.h>

#include "philox.h"
#include "wide.h"

namespace {
constexpr int kPhiloxGroup = 128;

// Every round's keys, in memory: a register is filled from there at no cost, and from a scalar one
// only one a cycle.
struct PhiloxKeys {
  uint64_t seed;
  uint32_t key0[kPhiloxRounds], key1[kPhiloxRounds];

  explicit PhiloxKeys(uint64_t seed) : seed(seed) {
    for (uint32_t round = 0; round < kPhiloxRounds; round++) {
      key0[round] = (uint32_t)seed + round * 0x9E3779B9u;
      key1[round] = (uint32_t)(seed >> 32) + round * 0xBB67AE85u;
    }
  }
};

#if defined(FASTFT_WIDE)
// Counters of a register, each in the lower half of 64 bits; above is anything.
constexpr int kPhiloxCounters = kWide / 2;
constexpr int kPhiloxRegisters = kPhiloxGroup / 8 / kPhiloxCounters;
// A round of one register waits six cycles for its products: four registers fill them.
constexpr int kPhiloxTogether = 4 / kPhiloxRegisters;

struct PhiloxLanes {
  WideInt word0, word1, word2, word3;
};

static inline WideInt philox_word(uint32_t word) { return FASTFT_OF_WIDE(set1_epi32)((int)word); }
static inline WideInt philox_product(WideInt words, uint32_t factor) {
  return FASTFT_OF_WIDE(mul_epu32)(words, philox_word(factor));
}

#if defined(__AVX512F__)
static inline WideInt philox_xor(WideInt a, WideInt b, WideInt c) {
  return _mm512_ternarylogic_epi32(a, b, c, 0x96);
}
static inline WideInt philox_pair(WideInt low, WideInt high) {
  return _mm512_mask_shuffle_epi32(low, 0xaaaa, high, _MM_PERM_CDAB);
}
// The counters' order, in which unpacking halves of 128 bits leaves them in theirs.
static inline WideInt philox_order() { return _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7); }
#else
static inline WideInt philox_xor(WideInt a, WideInt b, WideInt c) { return a ^ b ^ c; }
static inline WideInt philox_pair(WideInt low, WideInt high) {
  return _mm256_blend_epi32(low, _mm256_slli_epi64(high, 32), 0xaa);
}
static inline WideInt philox_order() { return _mm256_setr_epi64x(0, 2, 1, 3); }
#endif

static inline WideInt philox_upper(WideInt product) {
  return FASTFT_OF_WIDE(srli_epi64)(product, 32);
}

static inline void philox_round(PhiloxLanes* lanes, WideInt key0, WideInt key1) {
  const WideInt a = philox_product(lanes->word0, 0xD2511F53u);
  const WideInt b = philox_product(lanes->word2, 0xCD9E8D57u);
  *lanes = {philox_xor(philox_upper(b), lanes->word1, key0), b,
            philox_xor(philox_upper(a), lanes->word3, key1), a};
}

// Writes each counter's four words side by side.
static inline void philox_store(const PhiloxLanes& lanes, uint16_t* bits) {
  const WideInt low = philox_pair(lanes.word0, lanes.word1);
  const WideInt high = philox_pair(lanes.word2, lanes.word3);
  WideInt* out = reinterpret_cast<WideInt*>(bits);
  const WideInt first = FASTFT_OF_WIDE(unpacklo_epi64)(low, high);
  const WideInt last = FASTFT_OF_WIDE(unpackhi_epi64)(low, high);
  memcpy(out, &first, sizeof first), memcpy(out + 1, &last, sizeof last);
}

// `first` is the index of the groups' first element, a multiple of all of theirs: no counter's
// lower word overflows. Of the first two rounds, what does not depend on that word is done once for
// all.
template <int groups>
FASTFT_HD void philox_groups(uint64_t first, uint32_t step, uint32_t stream, const PhiloxKeys& keys,
                             uint16_t* bits) {
  constexpr int kRegisters = groups * kPhiloxRegisters;
  const uint64_t b0 = (uint64_t)step * 0xCD9E8D57u;
  const uint64_t a1 =
      (uint64_t)((uint32_t)(b0 >> 32) ^ (uint32_t)(first / 8 >> 32) ^ keys.key0[0]) * 0xD2511F53u;
  const WideInt counts =
      FASTFT_OF_WIDE(add_epi32)(philox_word((uint32_t)(first / 8)), philox_order());
  const WideInt key2 = philox_word(stream ^ keys.key1[0]);
  const WideInt key3 = philox_word((uint32_t)b0 ^ keys.key0[1]);
  const WideInt key4 = philox_word((uint32_t)(a1 >> 32) ^ keys.key1[1]);
  PhiloxLanes lanes[kRegisters];
  for (int i = 0; i < kRegisters; i++) {
    const WideInt count =
        FASTFT_OF_WIDE(add_epi32)(counts, philox_word((uint32_t)(i * kPhiloxCounters)));
    const WideInt a0 = philox_product(count, 0xD2511F53u);
    const WideInt b1 = philox_product(philox_upper(a0) ^ key2, 0xCD9E8D57u);
    lanes[i] = {philox_upper(b1) ^ key3, b1, a0 ^ key4, philox_word((uint32_t)a1)};
  }
  for (int round = 2; round < kPhiloxRounds; round++) {
    const WideInt key0 = philox_word(keys.key0[round]), key1 = philox_word(keys.key1[round]);
    for (int i = 0; i < kRegisters; i++) philox_round(lanes + i, key0, key1);
  }
  for (int i = 0; i < kRegisters; i++) philox_store(lanes[i], bits + i * 8 * kPhiloxCounters);
}
#else
constexpr int kPhiloxTogether = 1;

template <int groups>
static inline void philox_groups(uint64_t first, uint32_t step, uint32_t stream,
                                 const PhiloxKeys& keys, uint16_t* bits) {
  philox_bits<groups * kPhiloxGroup / 8>(first / 8, step, stream, keys.seed, bits);
}
#endif
}  // namespace
