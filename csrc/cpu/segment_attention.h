// Attention within segments, as segment_attention.cpp hands it to segment_attention_kernel.cpp.
#pragma once
#include <stdint.h>

namespace fastft {
// (R, H, T, size) of float32 or bfloat16, whose last dimension is dense. Strides are of elements.
struct Heads {
  void* data;
  bool bfloat16;
  int64_t size, row, head, token;
};

// Tokens of a row whose queries see these keys alone; a row of the table of pieces.
struct Piece {
  int64_t row, q0, q1, k0, k1;
};

struct Attention {
  Heads query, key, value, out;  // out as (R, H, T, Dv)
  Heads d_out, d_query, d_key, d_value;
  float* lse;  // (R, H, T)
  int64_t heads, group, length;
  bool causal;
  int64_t window;        // 0: none
  float scale, softcap;  // softcap 0: none
};

// Queries `begin` to `end` of a piece, of one head. In backward all of them: what they give to
// the gradients of keys and values is written to `d_key` and `d_value`, in float32, (keys, padded
// size).
struct AttentionTask {
  const Piece* piece;
  int64_t head, begin, end;
  float *d_key, *d_value;
};

// Queries whose scores lie side by side: of whole registers, and of whole tiles.
constexpr int64_t query_block(bool avx512) { return avx512 ? 64 : 48; }
// Of a head's numbers, what tiles read: whole ones.
constexpr int64_t padded(int64_t size, bool avx512) {
  const int64_t columns = avx512 ? 32 : 16;
  return (size + columns - 1) / columns * columns;
}
}  // namespace fastft
