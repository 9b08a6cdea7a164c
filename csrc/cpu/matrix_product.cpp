// matrix_product(Tensor(a!) out, Tensor left, Tensor right, bool add) -> ()
//
// out (+)= left right in fp32, of float32 or bfloat16 matrices with any strides. A part of `right`
// that stays in the second- or third-level cache is packed once for all threads; each thread packs
// its rows of `left`, a block at a time that stays in its first two. Threads share tiles of rows,
// of which a few have few, by columns.
#include "matrix_product.h"

#include <algorithm>
#include <memory>

#include "isa.h"
#include "shim.h"

FASTFT_DECLARE_KERNEL(pack_panels, const fastft::ProductPart*, int64_t, int64_t)
FASTFT_DECLARE_KERNEL(multiply_tiles, const fastft::ProductPart*, int64_t, int64_t)

namespace {
using fastft::Tensor;
constexpr int64_t kMostColumns = 1024;
constexpr int64_t kPacked = 1 << 19;  // floats of `right` that are packed at once: 2 MiB
constexpr uintptr_t kAligned = 16;    // floats of a cache line

fastft::Factor factor(const Tensor& tensor, const char* name) {
  FT_CHECK(tensor.on_cpu() && tensor.dim() == 2, "matrix_product: %s must be a matrix on the CPU",
           name);
  const bool bfloat16 = tensor.dtype() == aoti_torch_dtype_bfloat16();
  FT_CHECK(bfloat16 || tensor.dtype() == aoti_torch_dtype_float32(),
           "matrix_product: %s must be float32 or bfloat16", name);
  return {tensor.data(),  bfloat16,         tensor.size(0),
          tensor.size(1), tensor.stride(0), tensor.stride(1)};
}

// Where a matrix' memory begins and ends, with the gaps between its rows.
std::pair<uintptr_t, uintptr_t> extent(const Tensor& matrix) {
  const auto begin = reinterpret_cast<uintptr_t>(matrix.data());
  if (matrix.numel() == 0) return {begin, begin};
  const int64_t last =
      (matrix.size(0) - 1) * matrix.stride(0) + (matrix.size(1) - 1) * matrix.stride(1);
  const uintptr_t item = matrix.dtype() == aoti_torch_dtype_bfloat16() ? 2 : 4;
  return {begin, begin + uintptr_t(last + 1) * item};
}

bool apart(const Tensor& a, const Tensor& b) {
  const auto [begin_a, end_a] = extent(a);
  const auto [begin_b, end_b] = extent(b);
  return std::min(end_a, end_b) <= std::max(begin_a, begin_b);
}

int64_t parts_of(int64_t whole, int64_t most) { return (whole + most - 1) / most; }

// Floats in a register.
int64_t width_of(fastft::Isa isa) {
  return isa >= fastft::Isa::avx512 ? 16 : isa == fastft::Isa::avx2 ? 8 : 4;
}

void compute(fastft::ProductPart part, bool add) {
  const fastft::Tile tile = fastft::tile_of(width_of(fastft::isa()));
  const int64_t terms = part.left.columns, columns = part.right.columns;
  part.depth = parts_of(terms, parts_of(terms, fastft::kMostDepth));
  const int64_t width = std::min(kMostColumns, parts_of(columns, tile.columns) * tile.columns);
  const int64_t span = std::max<int64_t>(1, kPacked / (width * part.depth)) * part.depth;
  part.tile_columns = tile.columns;
  const std::unique_ptr<float[]> memory(new float[width * std::min(span, terms) + kAligned]);
  const uintptr_t address = reinterpret_cast<uintptr_t>(memory.get()) / sizeof(float);
  part.packed = memory.get() + (kAligned - address % kAligned) % kAligned;
  const auto pack = pack_panels_kernel(), multiply = multiply_tiles_kernel();
  for (int64_t column = 0; column < columns; column += width)
    for (int64_t from = 0; from < terms; from += span) {
      part.first_column = column, part.columns = std::min(width, columns - column);
      part.from = from, part.terms = std::min(span, terms - from);
      part.add = add || from > 0;
      const auto call = [&](auto kernel) {
        return [&, kernel](int64_t begin, int64_t end) { kernel(&part, begin, end); };
      };
      fastft::parallel_for(part.panels(), 1, call(pack));
      fastft::parallel_for(parts_of(part.left.rows, tile.rows) * part.panels(), 1, call(multiply));
    }
}

void matrix_product(StableIValue* stack, uint64_t nargs, uint64_t) {
  FT_CHECK(nargs == 4, "matrix_product takes 4 arguments, got %d", static_cast<int>(nargs));
  const Tensor out(stack[0]), left(stack[1]), right(stack[2]);
  fastft::ProductPart part{};
  part.left = factor(left, "left"), part.right = factor(right, "right");
  FT_CHECK(out.on_cpu() && out.dim() == 2 && out.dtype() == aoti_torch_dtype_float32() &&
               (out.size(1) <= 1 || out.stride(1) == 1) &&
               (out.size(0) <= 1 || out.stride(0) >= out.size(1)),
           "matrix_product: out must be a float32 matrix with contiguous rows of their own");
  FT_CHECK(out.size(0) == part.left.rows && out.size(1) == part.right.columns &&
               part.left.columns == part.right.rows,
           "matrix_product: shapes do not fit");
  FT_CHECK(apart(out, left) && apart(out, right),
           "matrix_product: out must not share memory with a factor");
  part.out = static_cast<float*>(out.mutable_data());
  part.out_stride = out.stride(0);
  const bool add = fastft::as_int(stack[3]) != 0;
  if (part.left.columns == 0 && !add)
    for (int64_t row = 0; row < part.left.rows; row++)
      std::fill_n(part.out + row * part.out_stride, part.right.columns, 0.0f);
  else if (part.left.rows > 0 && part.left.columns > 0 && part.right.columns > 0)
    compute(part, add);
}

fastft::Kernel kernel("matrix_product", matrix_product);
}  // namespace
