// A part of a matrix product, as matrix_product.cpp hands it to matrix_product_kernel.cpp.
#pragma once
#include <stdint.h>

namespace fastft {
constexpr int64_t kMostDepth = 192;  // terms that are added up in registers

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
  int64_t tile_columns;  // a panel: what is packed together
  float* packed;         // of `right`: for each depth panels, depth x tile_columns
  bool add;

  int64_t panels() const { return (columns + tile_columns - 1) / tile_columns; }
  int64_t depth_at(int64_t begin) const { return begin + depth < terms ? depth : terms - begin; }
  float* panel(int64_t begin, int64_t index) const {
    return packed + (begin * panels() + index * depth_at(begin)) * tile_columns;
  }
};

// A tile, whose sums all stay in registers of `width` floats.
struct Tile {
  int64_t rows, columns;
};
constexpr Tile tile_of(int64_t width) { return {width == 16 ? 14 : 6, 2 * width}; }
}  // namespace fastft
