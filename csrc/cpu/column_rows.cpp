// Rows of an Arrow column of number lists, joined for ctypes, where Python's concatenation would
// need an object for each.
#include <algorithm>

#include "shim.h"

namespace {
// A chunk of the column. Row `first + i` is numbers [offsets[i], offsets[i + 1]).
struct Chunk {
  int64_t first, rows;
  const void *offsets, *numbers;
  int64_t count;  // of its numbers
};

struct Column {
  const Chunk* chunks;
  int64_t count;         // of its chunks
  int64_t offset_bytes;  // 4 or 8
  int64_t number_bytes;  // 1, 2, 4 or 8, less than 0 for unsigned ones
};

// Finds the chunk and the numbers of a row; false where the column has no such row, or its offsets
// lead out of its memory, as those of a damaged file may.
bool find(const Column& column, int64_t row, const Chunk*& chunk, int64_t& begin, int64_t& end) {
  const auto later = [](int64_t asked, const Chunk& one) { return asked < one.first; };
  chunk = std::upper_bound(column.chunks, column.chunks + column.count, row, later);
  if (chunk-- == column.chunks || row - chunk->first >= chunk->rows) return false;
  const auto read = [&](const auto* offset) { begin = offset[0], end = offset[1]; };
  const int64_t place = row - chunk->first;
  column.offset_bytes == 8 ? read(static_cast<const int64_t*>(chunk->offsets) + place)
                           : read(static_cast<const int32_t*>(chunk->offsets) + place);
  return 0 <= begin && begin <= end && end <= chunk->count;
}

template <class T>
void copy(const Chunk& chunk, int64_t begin, int64_t end, int64_t* out) {
  const T* numbers = static_cast<const T*>(chunk.numbers);
  std::copy(numbers + begin, numbers + end, out);
}

using Copy = void (*)(const Chunk&, int64_t begin, int64_t end, int64_t* out);

Copy copy_of(int64_t number_bytes) {
  switch (number_bytes) {
    case 1:
      return copy<int8_t>;
    case 2:
      return copy<int16_t>;
    case 4:
      return copy<int32_t>;
    case 8:
      return copy<int64_t>;
    case -1:
      return copy<uint8_t>;
    case -2:
      return copy<uint16_t>;
    case -4:
      return copy<uint32_t>;
    default:
      return nullptr;
  }
}
}  // namespace

// Joins `count` rows in out[0 .. room). Returns how many numbers it wrote; -1 where a row is not to
// be had, or has more than there is room for.
FASTFT_EXPORT int64_t fastft_join_rows(const Column* column, const int64_t* rows, int64_t count,
                                       int64_t* out, int64_t room) {
  const Copy copy = copy_of(column->number_bytes);
  if (!copy) return -1;
  const Chunk* chunk;
  int64_t written = 0;
  for (int64_t i = 0, begin, end; i < count; i++) {
    if (!find(*column, rows[i], chunk, begin, end) || end - begin > room - written) return -1;
    copy(*chunk, begin, end, out + written);
    written += end - begin;
  }
  return written;
}
