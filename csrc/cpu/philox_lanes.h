// The random bits of philox.h for 128 neighbouring elements at once. With AVX2 and AVX-512 by hand:
// compilers find no vectors in products of which both halves are needed.
#pragma once
#include <string.h>

#include "philox.h"
#include "wide.h"

constexpr int kPhiloxGroup = 128;

#if defined(FASTFT_WIDE)
// Counters of a register, each in the lower half of 64 bits; above is anything.
constexpr int kPhiloxCounters = kWide / 2;
constexpr int kPhiloxRegisters = kPhiloxGroup / 8 / kPhiloxCounters;

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

static inline void philox_round(PhiloxLanes* lanes, uint32_t key0, uint32_t key1) {
  const WideInt a = philox_product(lanes->word0, 0xD2511F53u);
  const WideInt b = philox_product(lanes->word2, 0xCD9E8D57u);
  *lanes = {philox_xor(philox_upper(b), lanes->word1, philox_word(key0)), b,
            philox_xor(philox_upper(a), lanes->word3, philox_word(key1)), a};
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

// `first` is the index of the group's first element, a multiple of kPhiloxGroup: no counter's lower
// word overflows. Of the first two rounds, what does not depend on that word is done once for all.
static inline void philox_group(uint64_t first, uint32_t step, uint32_t stream, uint64_t seed,
                                uint16_t* bits) {
  const uint32_t block = (uint32_t)(first / 8);
  uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
  const uint64_t b0 = (uint64_t)step * 0xCD9E8D57u;
  const uint64_t a1 =
      (uint64_t)((uint32_t)(b0 >> 32) ^ (uint32_t)(first / 8 >> 32) ^ key0) * 0xD2511F53u;
  const WideInt counts = FASTFT_OF_WIDE(add_epi32)(philox_word(block), philox_order());
  const WideInt key2 = philox_word(stream ^ key1);
  key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
  const WideInt key3 = philox_word((uint32_t)b0 ^ key0);
  const WideInt key4 = philox_word((uint32_t)(a1 >> 32) ^ key1);
  PhiloxLanes lanes[kPhiloxRegisters];
  for (int i = 0; i < kPhiloxRegisters; i++) {
    const WideInt count =
        FASTFT_OF_WIDE(add_epi32)(counts, philox_word((uint32_t)(i * kPhiloxCounters)));
    const WideInt a0 = philox_product(count, 0xD2511F53u);
    const WideInt b1 = philox_product(philox_upper(a0) ^ key2, 0xCD9E8D57u);
    lanes[i] = {philox_upper(b1) ^ key3, b1, a0 ^ key4, philox_word((uint32_t)a1)};
  }
  for (int round = 2; round < kPhiloxRounds; round++) {
    key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
    for (int i = 0; i < kPhiloxRegisters; i++) philox_round(lanes + i, key0, key1);
  }
  for (int i = 0; i < kPhiloxRegisters; i++) philox_store(lanes[i], bits + i * 8 * kPhiloxCounters);
}
#else
static inline void philox_group(uint64_t first, uint32_t step, uint32_t stream, uint64_t seed,
                                uint16_t* bits) {
  philox_bits<kPhiloxGroup / 8>(first / 8, step, stream, seed, bits);
}
#endif
