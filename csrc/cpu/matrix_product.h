// A part of a matrix product, as matrix_product.cpp hands it to matrix_product_kernel.cpp.
#pragma once
#include <stdint.h>

namespace fastft {
constexpr int64_t kMostDepth = 192;  // terms that are added up in registers
constexpr int64_t kPanel = 32;       // columns that are packed together

struct Factor {
  const void* data;  // float32, or bfloat16
  bool bfloat16;
  int64_t rows, columns;
  int64_t stride, step;  // elements from one row, and from one column, to the next
};

// out[rows, first_column + columns] (+)= left[rows, from + terms] right[from + terms, columns ...]
struct ProductPart {
  Factor left, right;
  float* out;
  int64_t out_stride;
  int64_t from, terms, depth;  // the terms, `depth` at a time
  int64_t first_column, columns;
  float* packed;  // of `right`: for each depth panels of kPanel columns, depth x kPanel
  bool add;

  int64_t panels() const { return (columns + kPanel - 1) / kPanel; }
  int64_t depth_at(int64_t begin) const { return begin + depth < terms ? depth : terms - begin; }
  float* panel(int64_t begin, int64_t index) const {
    return packed + (begin * panels() + index * depth_at(begin)) * kPanel;
  }
};

// Rows of a tile, whose sums all stay in registers.
inline int64_t tile_rows(bool avx512) { return avx512 ? 14 : 6; }
}  // namespace fastft
