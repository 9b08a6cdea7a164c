// The inner loops of a matrix product: tiles of sums that stay in registers, over factors that are
// packed so that they are read one number after the other.
#include "isa.h"
#include "matrix_product.h"
#include "packing.h"
#include "tiles.h"

namespace {
constexpr int kRows = fastft::tile_of(kWidth).rows, kColumns = fastft::tile_of(kWidth).columns;
constexpr int kBlock = 12 * kRows;

template <int kLanes>
void pack(const fastft::Factor& factor, int64_t at, int64_t stride, int64_t step, int64_t lanes,
          int64_t depth, float* to) {
  if (factor.bfloat16)
    pack<kLanes>(static_cast<const uint16_t*>(factor.data) + at, stride, step, lanes, depth, to);
  else
    pack<kLanes>(static_cast<const float*>(factor.data) + at, stride, step, lanes, depth, to);
}

// left: depth x kRows; right: depth x kColumns.
void whole_tile(int64_t depth, const float* left, const float* right, float* out, int64_t stride,
                bool add) {
  tile<kRows, 2, true>(depth, {left, kRows}, {right, kColumns}, out, stride, kRows, add);
}

// A tile of which the product has `rows` x `columns`.
void part_of_tile(int64_t depth, const float* left, const float* right, float* out, int64_t stride,
                  int64_t rows, int64_t columns, bool add) {
  float whole[kRows * kColumns];
  whole_tile(depth, left, right, whole, kColumns, false);
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < columns; j++)
      out[i * stride + j] = whole[i * kColumns + j] + (add ? out[i * stride + j] : 0.0f);
}

// Rows of `left` and columns of the part.
struct Block {
  int64_t row, last_row, column, last_column;
};

// Rows that are packed, `depth` terms from `begin` on, times columns of the part.
void multiply_packed(const fastft::ProductPart& part, const float* packed, const Block& block,
                     int64_t begin) {
  const int64_t depth = part.depth_at(begin);
  const bool add = part.add || begin > 0;
  for (int64_t column = block.column; column < block.last_column; column += kColumns) {
    const float* right = part.panel(begin, column / kColumns);
    for (int64_t i = block.row; i < block.last_row; i += kRows) {
      const float* left = packed + (i - block.row) * depth;
      float* out = part.out + i * part.out_stride + part.first_column + column;
      const int64_t rows = least(kRows, block.last_row - i),
                    columns = least(kColumns, block.last_column - column);
      if (rows == kRows && columns == kColumns)
        whole_tile(depth, left, right, out, part.out_stride, add);
      else
        part_of_tile(depth, left, right, out, part.out_stride, rows, columns, add);
    }
  }
}

// `packed` has room for kBlock rows: what is packed stays in the second-level cache, as results do
// from one depth to the next.
void multiply_block(const fastft::ProductPart& part, float* packed, const Block& block) {
  const fastft::Factor& left = part.left;
  for (int64_t begin = 0; begin < part.terms; begin += part.depth) {
    const int64_t depth = part.depth_at(begin);
    for (int64_t i = block.row; i < block.last_row; i += kRows)
      pack<kRows>(left, i * left.stride + (part.from + begin) * left.step, left.stride, left.step,
                  least(kRows, block.last_row - i), depth, packed + (i - block.row) * depth);
    multiply_packed(part, packed, block, begin);
  }
}
}  // namespace

extern "C" void FASTFT_KERNEL(pack_panels)(const fastft::ProductPart* part, int64_t first,
                                           int64_t last) {
  const fastft::Factor& right = part->right;
  for (int64_t begin = 0; begin < part->terms; begin += part->depth)
    for (int64_t index = first; index < last; index++) {
      const int64_t column = index * kColumns;
      pack<kColumns>(
          right, (part->from + begin) * right.stride + (part->first_column + column) * right.step,
          right.step, right.stride, least(kColumns, part->columns - column), part->depth_at(begin),
          part->panel(begin, index));
    }
}

// Panels of one tile of rows after the other; where it is all of them, of a block of tiles at once.
extern "C" void FASTFT_KERNEL(multiply_tiles)(const fastft::ProductPart* part, int64_t first,
                                              int64_t last) {
  alignas(64) float packed[kBlock * fastft::kMostDepth];
  const int64_t panels = part->panels();
  while (first < last) {
    const int64_t panel = first % panels, row = first / panels * kRows;
    const bool whole = panel == 0 && last - first >= panels;
    const int64_t tiles = whole ? least((last - first) / panels, kBlock / kRows) : 1;
    const int64_t count = whole ? panels : least(panels - panel, last - first);
    multiply_block(*part, packed,
                   {row, least(row + tiles * kRows, part->left.rows), panel * kColumns,
                    least((panel + count) * kColumns, part->columns)});
    first += tiles * count;
  }
}
