// The inner loops of attention. Scores lie transposed, (keys, queries): a softmax then runs down
// registers, with no sum across one, and products read rows of their factors, which are packed for
// none but a block of queries, once for all of its keys.
#include "attention_rows.h"
#include "isa.h"

namespace {
using fastft::Attention;
using fastft::AttentionTask;
using fastft::Heads;
using fastft::Piece;

constexpr int64_t kKeys = 96;  // of a block: their scores are in the second-level cache
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));
constexpr float kLowest = -__FLT_MAX__;
static_assert(kQueries % kRows == 0 && kQueries % kColumns == 0 && kKeys % kRows == 0, "tiles");

// Which keys of a block a register of queries sees. Queries and keys are counted from the first of
// the piece; the register's first query is `query`, the block's first key `key`.
struct Sight {
  int64_t begin, end;          // keys that any of them sees, from the block's first
  int64_t all_begin, all_end;  // that all of them see
  bool causal;
  int64_t window, ahead;  // ahead: of the first query, how many keys

  Sight(const Attention& call, int64_t query, int64_t last_query, int64_t key, int64_t keys)
      : begin(0),
        end(keys),
        all_begin(0),
        all_end(keys),
        causal(call.causal),
        window(call.window),
        ahead(query - key) {
    const int64_t last = last_query - key;
    if (call.causal) end = last + 1, all_end = ahead + 1;
    if (call.window > 0) {
      begin = ahead - call.window + 1, all_begin = last - call.window + 1;
      end = least(end, last + call.window), all_end = least(all_end, ahead + call.window);
    }
    begin = least(most(begin, 0), keys), end = most(least(end, keys), begin);
    all_begin = least(most(all_begin, begin), end), all_end = most(least(all_end, end), all_begin);
  }
  // -Inf for the queries that do not see key `j`, which some do.
  Floats hidden(Floats scores, int64_t j) const {
    constexpr int kFar = 0x7fffffff;
    Ints behind;
    for (int lane = 0; lane < kWidth; lane++) behind[lane] = lane;
    behind += static_cast<int>(ahead - j);
    const int near = static_cast<int>(least(window > 0 ? window : kFar, kFar));
    const Ints seen = (behind >= (causal ? 0 : -near + 1)) & (behind < near);
    return seen ? scores : Floats{} - __builtin_inff();
  }
};

// A block of queries and one of keys.
struct Block {
  int64_t query, queries;  // the first, and how many
  int64_t key, keys;
};

// scores[key, query] = left[key] . packed[:, query], of the tiles that have anything to see.
void scores_of(const Attention& call, const Block& block, int64_t size, Rows left,
               const float* packed, float* scores) {
  for (int64_t column = 0; column < block.queries; column += kColumns) {
    const int64_t first = block.query + column;
    const Sight sight(call, first, first + kColumns - 1, block.key, block.keys);
    for (int64_t j = sight.begin / kRows * kRows; j < sight.end; j += kRows)
      multiply<false>(size, {left.at(j), left.stride}, {packed + column, kQueries},
                      scores + j * kQueries + column, kQueries, least(kRows, block.keys - j),
                      false);
  }
}

// sums[query] (+)= sum over keys of weights[key, query] right[key].
void mix(const Attention& call, const Block& block, const float* weights, Rows right, int64_t width,
         float* sums, bool add) {
  for (int64_t i = 0; i < block.queries; i += kRows) {
    const Sight sight(call, block.query + i, block.query + i + kRows - 1, block.key, block.keys);
    for (int64_t column = 0; column < width; column += kColumns)
      multiply<true>(sight.end - sight.begin, {weights + sight.begin * kQueries + i, kQueries},
                     {right.at(sight.begin) + column, right.stride}, sums + i * width + column,
                     width, kRows, add);
  }
}

// sums[key] += sum over queries of weights[key, query] right[query].
void give(const Attention& call, const Block& block, const float* weights, Rows right,
          int64_t width, float* sums) {
  for (int64_t j = 0; j < block.keys; j += kRows) {
    // queries that see any of these keys, from the block's first
    int64_t begin = 0, end = block.queries;
    const int64_t last = least(j + kRows, block.keys) - 1, key = block.key - block.query;
    if (call.causal) begin = key + j;
    if (call.window > 0) {
      begin = most(begin, key + j - call.window + 1);
      end = least(end, key + last + call.window);
    }
    begin = most(begin, 0);
    if (begin >= end) continue;
    for (int64_t column = 0; column < width; column += kColumns)
      multiply<false>(end - begin, {weights + j * kQueries + begin, kQueries},
                      {right.at(begin) + column, right.stride}, sums + j * width + column, width,
                      last + 1 - j, true);
  }
}

FASTFT_HD Floats capped(Floats scores, float softcap) {
  return softcap > 0.0f ? hyperbolic_tangent(scores) * softcap : scores;
}

// Calls f(j, whether some of its queries do not see j) for the keys that a register sees.
template <class F>
void each_key(const Sight& sight, F f) {
  for (int64_t j = sight.begin; j < sight.all_begin; j++) f(j, true);
  for (int64_t j = sight.all_begin; j < sight.all_end; j++) f(j, false);
  for (int64_t j = sight.all_end; j < sight.end; j++) f(j, true);
}

// Writes 0 for the keys of a block that a register does not see.
void clear(float* scores, const Sight& sight, int64_t keys) {
  for (int64_t j = 0; j < sight.begin; j++) store(scores + j * kQueries, Floats{});
  for (int64_t j = sight.end; j < keys; j++) store(scores + j * kQueries, Floats{});
}

// Scores become exp(score - largest); `factor` is what earlier sums are to be multiplied with.
void online_softmax(const Attention& call, const Block& block, float* scores, float* largest,
                    float* sum, float* factor) {
  for (int64_t column = 0; column < block.queries; column += kWidth) {
    const int64_t first = block.query + column;
    const Sight sight(call, first, first + kWidth - 1, block.key, block.keys);
    float* at = scores + column;
    const Floats before = load(largest + column);
    Floats now = before, total = {};
    each_key(sight, [&](int64_t j, bool hide) {
      Floats score = capped(load(at + j * kQueries), call.softcap);
      if (hide) score = sight.hidden(score, j);
      if (hide || call.softcap > 0.0f) store(at + j * kQueries, score);
      now = larger(score, now);
    });
    for (int64_t j = sight.begin; j < sight.end; j++) {
      const Floats p = exp_negative(load(at + j * kQueries) - now);
      store(at + j * kQueries, p);
      total += p;
    }
    clear(at, sight, block.keys);
    const Floats rescale = exp_negative(before - now);
    store(largest + column, now);
    store(factor + column, rescale);
    store(sum + column, fused(load(sum + column), rescale, total));
  }
}

// Scores become probabilities p, and `grads`, the gradients of p, those of the scores.
void backward_softmax(const Attention& call, const Block& block, float* scores, float* grads,
                      const float* lse, const float* delta) {
  for (int64_t column = 0; column < block.queries; column += kWidth) {
    const int64_t first = block.query + column;
    const Sight sight(call, first, first + kWidth - 1, block.key, block.keys);
    float *at = scores + column, *grad = grads + column;
    const Floats total = load(lse + column), mean = load(delta + column);
    each_key(sight, [&](int64_t j, bool hide) {
      const Floats score = capped(load(at + j * kQueries), call.softcap);
      const Floats p = exp_negative((hide ? sight.hidden(score, j) : score) - total);
      Floats g = (load(grad + j * kQueries) - mean) * p;
      if (call.softcap > 0.0f) {
        const Floats t = score / call.softcap;
        g *= 1.0f - t * t;
      }
      store(at + j * kQueries, p);
      store(grad + j * kQueries, g);
    });
    clear(at, sight, block.keys);
    clear(grad, sight, block.keys);
  }
}

// Memory of a task, one part after the other.
struct Room {
  float* memory;  // null: only to be counted
  int64_t taken = 0;
  float *packed, *d_packed, *scores, *grads, *query, *d_query, *key, *value, *out, *d_out;

  Room(const Attention& call, float* memory) : memory(memory) {
    const int64_t size = call.query.size, value_size = call.value.size;
    packed = take(size * kQueries), d_packed = take(value_size * kQueries);
    scores = take(kKeys * kQueries), grads = take(kKeys * kQueries);
    query = take(kQueries * padded(size)), d_query = take(kQueries * padded(size));
    out = take(kQueries * padded(value_size)), d_out = take(kQueries * padded(value_size));
    key = take(kKeys * padded(size)), value = take(kKeys * padded(value_size));
  }
  float* take(int64_t count) {
    float* const part = memory ? memory + taken : nullptr;
    taken += count;
    return part;
  }
};

float scale_of(const Attention& call) {
  return call.softcap > 0.0f ? call.scale / call.softcap : call.scale;
}

void finish_forward(const Attention& call, const AttentionTask& task, const float* sums,
                    const float* largest, const float* sum) {
  const Piece& piece = *task.piece;
  const int64_t width = padded(call.value.size), token = piece.q0 + task.begin;
  for (int64_t i = 0; i < task.end - task.begin; i++) {
    // a query that sees nothing but -Inf gets 0
    const float factor = sum[i] == 0.0f ? 0.0f : 1.0f / sum[i];
    write_row(call.out, offset(call.out, piece.row, task.head, token + i), sums + i * width,
              factor);
    call.lse[(piece.row * call.heads + task.head) * call.length + token + i] =
        largest[i] + __builtin_logf(sum[i]);
  }
}

// The keys of a block, or their values.
Rows of_keys(const Attention& call, const AttentionTask& task, const Block& block,
             const Heads& heads, float* room) {
  const int64_t head = task.head / call.group, token = task.piece->k0 + block.key;
  return rows_of(heads, offset(heads, task.piece->row, head, token), block.keys, room);
}

void forward(const Attention& call, const AttentionTask& task, Room room) {
  const Piece& piece = *task.piece;
  const int64_t width = padded(call.value.size), queries = task.end - task.begin;
  float* const sums = room.out;
  float largest[kQueries], sum[kQueries], factor[kQueries];
  for (int i = 0; i < kQueries; i++) largest[i] = kLowest, sum[i] = 0.0f;
  pack_queries(call.query, offset(call.query, piece.row, task.head, piece.q0 + task.begin), queries,
               scale_of(call), room.packed);
  const Sight seen(call, task.begin, task.end - 1, 0, piece.k1 - piece.k0);
  for (int64_t key = seen.begin; key < seen.end; key += kKeys) {
    const Block block{task.begin, queries, key, least(kKeys, seen.end - key)};
    const Rows k = of_keys(call, task, block, call.key, room.key);
    const Rows v = of_keys(call, task, block, call.value, room.value);
    scores_of(call, block, call.query.size, k, room.packed, room.scores);
    online_softmax(call, block, room.scores, largest, sum, factor);
    if (key > seen.begin)
      for (int64_t i = 0; i < queries; i++)
        for (int64_t d = 0; d < width; d += kWidth)
          store(sums + i * width + d, load(sums + i * width + d) * factor[i]);
    mix(call, block, room.scores, v, width, sums, key > seen.begin);
  }
  finish_forward(call, task, sums, largest, sum);
}

// What a block of queries needs of forward: lse and delta, 0 beyond.
struct Sums {
  float lse[kQueries], delta[kQueries];

  Sums(const Attention& call, const AttentionTask& task, int64_t first, int64_t queries, Rows out,
       Rows d_out) {
    const int64_t row = task.piece->row * call.heads + task.head;
    const float* const totals = call.lse + row * call.length + task.piece->q0 + first;
    for (int64_t i = 0; i < kQueries; i++) {
      lse[i] = delta[i] = 0.0f;
      if (i >= queries) continue;
      Floats products = {};
      for (int64_t d = 0; d < padded(call.out.size); d += kWidth)
        products = multiply_add(load(out.at(i) + d), load(d_out.at(i) + d), products);
      for (int lane = 0; lane < kWidth; lane++) delta[i] += products[lane];
      lse[i] = totals[i] < kLowest ? kLowest : totals[i];
    }
  }
};

// The gradients of `queries` queries from `first` on, and what they give to keys and values.
void backward_block(const Attention& call, const AttentionTask& task, int64_t first,
                    int64_t queries, Room& room) {
  const Piece& piece = *task.piece;
  const int64_t width = padded(call.query.size), value_width = padded(call.value.size);
  const auto at = [&](const Heads& heads) {
    return offset(heads, piece.row, task.head, piece.q0 + first);
  };
  pack_queries(call.query, at(call.query), queries, scale_of(call), room.packed);
  pack_queries(call.d_out, at(call.d_out), queries, 1.0f, room.d_packed);
  const Rows q = rows_of(call.query, at(call.query), queries, room.query);
  const Rows d_o = rows_of(call.d_out, at(call.d_out), queries, room.d_out);
  const Rows out = rows_of(call.out, at(call.out), queries, room.out);
  const Sums sums(call, task, first, queries, out, d_o);
  const Sight seen(call, first, first + queries - 1, 0, piece.k1 - piece.k0);
  for (int64_t key = seen.begin; key < seen.end; key += kKeys) {
    const Block block{first, queries, key, least(kKeys, seen.end - key)};
    const Rows k = of_keys(call, task, block, call.key, room.key);
    const Rows v = of_keys(call, task, block, call.value, room.value);
    scores_of(call, block, call.query.size, k, room.packed, room.scores);
    scores_of(call, block, call.value.size, v, room.d_packed, room.grads);
    backward_softmax(call, block, room.scores, room.grads, sums.lse, sums.delta);
    give(call, block, room.scores, d_o, value_width, task.d_value + key * value_width);
    give(call, block, room.grads, q, width, task.d_key + key * width);
    mix(call, block, room.grads, k, width, room.d_query, key > seen.begin);
  }
  for (int64_t i = 0; i < queries; i++)
    write_row(call.d_query, at(call.d_query) + i * call.d_query.token, room.d_query + i * width,
              call.scale);
}

void backward(const Attention& call, const AttentionTask& task, Room room) {
  const int64_t keys = task.piece->k1 - task.piece->k0;
  for (int64_t i = 0; i < keys * padded(call.query.size); i++) task.d_key[i] = 0.0f;
  for (int64_t i = 0; i < keys * padded(call.value.size); i++) task.d_value[i] = 0.0f;
  for (int64_t first = task.begin; first < task.end; first += kQueries)
    backward_block(call, task, first, least(kQueries, task.end - first), room);
}

// What the query heads of a key head give, added up in their order.
void add_up(const Heads& to, const Piece& piece, int64_t key_head, int64_t group, float* first,
            int64_t apart, float factor) {
  const int64_t width = padded(to.size), keys = piece.k1 - piece.k0;
  for (int64_t other = 1; other < group; other++)
    for (int64_t i = 0; i < keys * width; i += kWidth)
      store(first + i, load(first + i) + load(first + other * apart + i));
  for (int64_t j = 0; j < keys; j++)
    write_row(to, offset(to, piece.row, key_head, piece.k0 + j), first + j * width, factor);
}
}  // namespace

// How many floats a task needs beside its tensors.
extern "C" void FASTFT_KERNEL(attention_room)(const Attention* call, int64_t* floats) {
  *floats = Room(*call, nullptr).taken;
}

extern "C" void FASTFT_KERNEL(attention_forward)(const Attention* call, const AttentionTask* task,
                                                 float* memory) {
  forward(*call, *task, Room(*call, memory));
}

extern "C" void FASTFT_KERNEL(attention_backward)(const Attention* call, const AttentionTask* task,
                                                  float* memory) {
  backward(*call, *task, Room(*call, memory));
}

// `task` is that of a key head's first query head; the next one's sums are `apart` floats further.
extern "C" void FASTFT_KERNEL(attention_add_up)(const Attention* call, const AttentionTask* task,
                                                int64_t apart) {
  const int64_t key_head = task->head / call->group;
  add_up(call->d_key, *task->piece, key_head, call->group, task->d_key, apart, call->scale);
  add_up(call->d_value, *task->piece, key_head, call->group, task->d_value, apart, 1.0f);
}
