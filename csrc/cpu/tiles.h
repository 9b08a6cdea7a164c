// Tiles of a product: sums that stay in registers over all terms.
#pragma once
#include "floats.h"

namespace {
// Rows of numbers, `stride` apart.
struct Rows {
  const float* data;
  int64_t stride;
  const float* at(int64_t row) const { return data + row * stride; }
};

// Terms of a tile in one turn of its loop. With one, each 12 multiply-adds of AVX2 have 12 other
// operations, more than a core starts beside them while another thread runs on it.
constexpr int kTerms = kWidth == 8 ? 4 : 1;

FASTFT_HD int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
FASTFT_HD int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// out[rows, kVectors registers] (+)= left right, `rows` at most kRows. `left` is read along its
// rows, or with kAcross along its columns: left[i, k] is then left[k * stride + i], of all kRows.
template <int kRows, int kVectors, bool kAcross>
FASTFT_HD void tile(int64_t depth, Rows left, Rows right, float* out, int64_t stride, int64_t rows,
                    bool add) {
  const float* row[kRows];
  for (int i = 0; i < kRows; i++)
    row[i] = left.data + (kAcross ? i : left.stride * least(i, rows - 1));
  const int64_t step = kAcross ? left.stride : 1;
  Floats sums[kRows][kVectors] = {};
#pragma GCC unroll kTerms
  for (int64_t k = 0; k < depth; k++) {
    const float* from = right.at(k);
    Floats across[kVectors];
    for (int v = 0; v < kVectors; v++) across[v] = load(from + v * kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; i++) {
      const Floats x = broadcast(row[kAcross ? 0 : i][k * step + (kAcross ? i : 0)]);
      for (int v = 0; v < kVectors; v++) sums[i][v] = multiply_add(x, across[v], sums[i][v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; i++) {
    if (i >= rows) break;
    for (int v = 0; v < kVectors; v++) {
      float* to = out + i * stride + v * kWidth;
      store(to, add ? load(to) + sums[i][v] : sums[i][v]);
    }
  }
}
}  // namespace
