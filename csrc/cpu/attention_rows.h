// Heads of queries, keys and values as attention's products read and write them: as rows of
// float32.
#pragma once
#include "packing.h"
#include "segment_attention.h"
#include "tiles.h"

namespace {
#if defined(__AVX512F__)
constexpr bool kAvx512 = true;
constexpr int kRows = 8;
#else
constexpr bool kAvx512 = false;
constexpr int kRows = 6;
#endif
constexpr int kQueries = fastft::query_block(kAvx512), kColumns = fastft::padded(1, kAvx512);
constexpr int64_t padded(int64_t size) { return fastft::padded(size, kAvx512); }

// A tile of kRows x kColumns.
template <bool kAcross>
void multiply(int64_t depth, Rows left, Rows right, float* out, int64_t stride, int64_t rows,
              bool add) {
  tile<kRows, kColumns / kWidth, kAcross>(depth, left, right, out, stride, rows, add);
}

int64_t offset(const fastft::Heads& heads, int64_t row, int64_t head, int64_t token) {
  return row * heads.row + head * heads.head + token * heads.token;
}

template <class T>
void widen_row(const T* from, int64_t size, int64_t width, float* to) {
  int64_t k = 0;
  for (; k + kWidth <= size; k += kWidth) store(to + k, load(from + k));
  for (; k < width; k++) to[k] = k < size ? widened(from[k]) : 0.0f;
}

// Tokens of a head in float32, as wide as tiles need them: where they are, or in `room`. Tokens
// that are a power of two apart, as those of projections are, would push each other out of the
// caches.
Rows rows_of(const fastft::Heads& heads, int64_t at, int64_t count, float* room) {
  if (!heads.bfloat16 && heads.size % kColumns == 0 && heads.token == heads.size)
    return {static_cast<const float*>(heads.data) + at, heads.token};
  const int64_t width = padded(heads.size);
  for (int64_t i = 0; i < count; i++, at += heads.token)
    if (heads.bfloat16)
      widen_row(static_cast<const uint16_t*>(heads.data) + at, heads.size, width, room + i * width);
    else
      widen_row(static_cast<const float*>(heads.data) + at, heads.size, width, room + i * width);
  return {room, width};
}

// to[k, query] = scale * the query's number k, 0 beyond `count`.
void pack_queries(const fastft::Heads& heads, int64_t at, int64_t count, float scale, float* to) {
  const int64_t size = heads.size;
  if (heads.bfloat16)
    pack<kQueries>(static_cast<const uint16_t*>(heads.data) + at, heads.token, 1, count, size, to);
  else
    pack<kQueries>(static_cast<const float*>(heads.data) + at, heads.token, 1, count, size, to);
  for (int64_t i = 0; i < size * kQueries; i += kWidth) store(to + i, load(to + i) * scale);
}

template <class T>
void write_row(T* to, const float* from, int64_t size, float factor) {
  int64_t k = 0;
  for (; k + kWidth <= size; k += kWidth) store(to + k, load(from + k) * factor);
  for (; k < size; k++) put(to + k, from[k] * factor);
}

void write_row(const fastft::Heads& heads, int64_t at, const float* from, float factor) {
  if (heads.bfloat16)
    write_row(static_cast<uint16_t*>(heads.data) + at, from, heads.size, factor);
  else
    write_row(static_cast<float*>(heads.data) + at, from, heads.size, factor);
}
}  // namespace
