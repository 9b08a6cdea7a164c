// One register of floats or of 32-bit integers with AVX2 or AVX-512: 8 or 16 of them, by intrinsics
// that have the same name with both but for their beginning.
#pragma once
#if defined(__AVX2__)
#if defined(__GNUC__) && !defined(__clang__)  // its bug 105593: it warns of its own header
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#define FASTFT_WIDE

#if defined(__AVX512F__)
constexpr int kWide = 16;
using Wide = __m512;
using WideInt = __m512i;
#define FASTFT_OF_WIDE(name) _mm512_##name
#else
constexpr int kWide = 8;
using Wide = __m256;
using WideInt = __m256i;
#define FASTFT_OF_WIDE(name) _mm256_##name
#endif
#endif
