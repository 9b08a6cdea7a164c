// Random bits for stochastic rounding: Philox4x32 (Salmon et al., 2011), with the seven rounds
// which that paper finds enough for every test. They are a function of the seed, the step, the
// stream (what is rounded) and the element's global index alone, so that neither the engine nor the
// way in which tensors are split over threads and processes changes them. Elements 8k to 8k + 7
// share one call, whose counter is (k, k >> 32, step, stream); each takes 16 of its 128 bits in
// memory order. Both moments of an element are rounded with the same 16 bits, the second one with
// the two bytes swapped: half of the work, and the pair fills the square evenly.
#pragma once
#include <stdint.h>

#include "host_device.h"

enum PhiloxStream : uint32_t { kStreamParam = 0, kStreamMoments = 1, kStreamMaxExpAvgSq = 2 };
enum { kPhiloxRounds = 7 };

FASTFT_HD uint16_t swap_bytes(uint16_t bits) { return (uint16_t)(bits << 8 | bits >> 8); }

FASTFT_HD uint32_t high_product(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  return __umulhi(a, b);
#else
  return (uint32_t)((uint64_t)a * b >> 32);
#endif
}

// The four words of one call, in 32-bit arithmetic, as GPUs have it.
FASTFT_HD void philox_words(uint64_t block, uint32_t step, uint32_t stream, uint64_t seed,
                            uint32_t* words) {
  uint32_t c0 = (uint32_t)block, c1 = (uint32_t)(block >> 32), c2 = step, c3 = stream;
  uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; round++, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u) {
    const uint32_t next0 = high_product(c2, 0xCD9E8D57u) ^ c1 ^ key0;
    const uint32_t next2 = high_product(c0, 0xD2511F53u) ^ c3 ^ key1;
    c1 = c2 * 0xCD9E8D57u, c3 = c0 * 0xD2511F53u, c0 = next0, c2 = next2;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

// The 16 bits of each of the 8 * lanes elements from 8 * block on.
template <int lanes>
FASTFT_HD void philox_bits(uint64_t block, uint32_t step, uint32_t stream, uint64_t seed,
                           uint16_t* bits) {
  uint32_t c0[lanes], c1[lanes], c2[lanes], c3[lanes];
  for (int lane = 0; lane < lanes; lane++) {
    c0[lane] = (uint32_t)(block + lane);
    c1[lane] = (uint32_t)((block + lane) >> 32);
    c2[lane] = step;
    c3[lane] = stream;
  }
  uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; round++) {
    for (int lane = 0; lane < lanes; lane++) {  // a structure of arrays: this becomes vectors
      const uint64_t a = (uint64_t)c0[lane] * 0xD2511F53u, b = (uint64_t)c2[lane] * 0xCD9E8D57u;
      const uint32_t next0 = (uint32_t)(b >> 32) ^ c1[lane] ^ key0;
      const uint32_t next2 = (uint32_t)(a >> 32) ^ c3[lane] ^ key1;
      c0[lane] = next0;
      c1[lane] = (uint32_t)b;
      c2[lane] = next2;
      c3[lane] = (uint32_t)a;
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  uint32_t words[4 * lanes];
  for (int lane = 0; lane < lanes; lane++) {
    words[4 * lane] = c0[lane];
    words[4 * lane + 1] = c1[lane];
    words[4 * lane + 2] = c2[lane];
    words[4 * lane + 3] = c3[lane];
  }
  for (int i = 0; i < 4 * lanes; i++) {  // by shifts and not memcpy: the same on every byte order
    bits[2 * i] = (uint16_t)words[i];
    bits[2 * i + 1] = (uint16_t)(words[i] >> 16);
  }
}
