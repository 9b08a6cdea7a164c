// The random bits of philox.h for 128 neighbouring elements at once. With AVX2 by hand: compilers find no vectors in
// products of which both halves are needed.
#pragma once
#include "philox.h"

constexpr int kPhiloxGroup = 128;

#if defined(__AVX2__)
#include <immintrin.h>

struct PhiloxLanes {  // eight counters
  __m256i word0, word1, word2, word3;
};

// Both halves of the products of eight words with one.
static inline void philox_multiply(__m256i words, uint32_t factor, __m256i* high, __m256i* low) {
  const __m256i factors = _mm256_set1_epi32((int)factor);
  const __m256i even = _mm256_mul_epu32(words, factors);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(words, 32), factors);
  *low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
  *high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
}

static inline void philox_round(PhiloxLanes* lanes, uint32_t key0, uint32_t key1) {
  __m256i high0, low0, high2, low2;
  philox_multiply(lanes->word0, 0xD2511F53u, &high0, &low0);
  philox_multiply(lanes->word2, 0xCD9E8D57u, &high2, &low2);
  lanes->word0 = _mm256_xor_si256(_mm256_xor_si256(high2, lanes->word1), _mm256_set1_epi32((int)key0));
  lanes->word2 = _mm256_xor_si256(_mm256_xor_si256(high0, lanes->word3), _mm256_set1_epi32((int)key1));
  lanes->word1 = low2;
  lanes->word3 = low0;
}

// Writes each counter's four words side by side.
static inline void philox_store(const PhiloxLanes& lanes, uint16_t* bits) {
  const __m256i low01 = _mm256_unpacklo_epi32(lanes.word0, lanes.word1);
  const __m256i high01 = _mm256_unpackhi_epi32(lanes.word0, lanes.word1);
  const __m256i low23 = _mm256_unpacklo_epi32(lanes.word2, lanes.word3);
  const __m256i high23 = _mm256_unpackhi_epi32(lanes.word2, lanes.word3);
  const __m256i counters04 = _mm256_unpacklo_epi64(low01, low23), counters15 = _mm256_unpackhi_epi64(low01, low23);
  const __m256i counters26 = _mm256_unpacklo_epi64(high01, high23), counters37 = _mm256_unpackhi_epi64(high01, high23);
  __m256i* out = reinterpret_cast<__m256i*>(bits);
  _mm256_storeu_si256(out, _mm256_permute2x128_si256(counters04, counters15, 0x20));
  _mm256_storeu_si256(out + 1, _mm256_permute2x128_si256(counters26, counters37, 0x20));
  _mm256_storeu_si256(out + 2, _mm256_permute2x128_si256(counters04, counters15, 0x31));
  _mm256_storeu_si256(out + 3, _mm256_permute2x128_si256(counters26, counters37, 0x31));
}

// `first` is the index of the group's first element, a multiple of kPhiloxGroup.
static inline void philox_group(uint64_t first, uint32_t step, uint32_t stream, uint64_t seed, uint16_t* bits) {
  const uint32_t block = (uint32_t)(first / 8), high = (uint32_t)(first / 8 >> 32);
  const __m256i counts = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);  // no carry: the block is a multiple of 16
  const __m256i block0 = _mm256_add_epi32(_mm256_set1_epi32((int)block), counts);
  const __m256i block1 = _mm256_add_epi32(_mm256_set1_epi32((int)block + 8), counts);
  const __m256i word1 = _mm256_set1_epi32((int)high), word2 = _mm256_set1_epi32((int)step);
  const __m256i word3 = _mm256_set1_epi32((int)stream);
  PhiloxLanes lanes0{block0, word1, word2, word3}, lanes1{block1, word1, word2, word3};
  uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; round++, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u) {
    philox_round(&lanes0, key0, key1);
    philox_round(&lanes1, key0, key1);
  }
  philox_store(lanes0, bits);
  philox_store(lanes1, bits + kPhiloxGroup / 2);
}
#else
static inline void philox_group(uint64_t first, uint32_t step, uint32_t stream, uint64_t seed, uint16_t* bits) {
  philox_bits<kPhiloxGroup / 8>(first / 8, step, stream, seed, bits);
}
#endif
