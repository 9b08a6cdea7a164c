// segment_attention_forward(Tensor(a!) out, Tensor(b!) lse, Tensor query, Tensor key, Tensor value,
//     Tensor pieces, float scale, bool causal, int window, float softcap) -> ()
// segment_attention_backward(Tensor(a!) d_query, Tensor(b!) d_key, Tensor(c!) d_value, Tensor
//     d_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor pieces, float
//     scale, bool causal, int window, float softcap) -> ()
//
// Forward's tasks are a block of queries of a head each, backward's a head of a piece: each has
// sums of its own for the gradients of keys and values, which are then added up over the query
// heads in one order, whoever computed them. Key heads follow each other in waves, so that these
// sums take 16 MiB, or as much as all threads need at once.
#include "segment_attention.h"

#include <algorithm>
#include <atomic>
#include <utility>
#include <vector>

#include "isa.h"
#include "shim.h"

FASTFT_DECLARE_KERNEL(attention_room, const fastft::Attention*, int64_t*)
FASTFT_DECLARE_KERNEL(attention_forward, const fastft::Attention*, const fastft::AttentionTask*,
                      float*)
FASTFT_DECLARE_KERNEL(attention_backward, const fastft::Attention*, const fastft::AttentionTask*,
                      float*)
FASTFT_DECLARE_KERNEL(attention_add_up, const fastft::Attention*, const fastft::AttentionTask*,
                      int64_t)

namespace {
using fastft::Attention;
using fastft::AttentionTask;
using fastft::Heads;
using fastft::Piece;
using fastft::Tensor;

constexpr int64_t kSums = 1 << 22;  // floats of a wave: 16 MiB

bool wide() { return fastft::isa() >= fastft::Isa::avx512; }

Tensor floats(int64_t count) {
  return fastft::new_tensor(count, aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0);
}

int64_t threads() {
  uint32_t count;
  FT_CALL(torch_get_num_threads(&count));
  return std::max<int64_t>(count, 1);
}

Heads heads(const Tensor& tensor, const char* name) {
  FT_CHECK(tensor.on_cpu() && tensor.dim() == 4, "segment_attention: %s must be (R, H, T, D)",
           name);
  const bool bfloat16 = tensor.dtype() == aoti_torch_dtype_bfloat16();
  FT_CHECK(bfloat16 || tensor.dtype() == aoti_torch_dtype_float32(),
           "segment_attention: %s must be float32 or bfloat16", name);
  FT_CHECK(tensor.numel() == 0 || tensor.size(3) == 1 || tensor.stride(3) == 1,
           "segment_attention: the last dimension of %s must be dense", name);
  return {const_cast<void*>(tensor.data()),
          bfloat16,
          tensor.size(3),
          tensor.stride(0),
          tensor.stride(1),
          tensor.stride(2)};
}

bool same_shape(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < 4; d++)
    if (a.size(d) != b.size(d)) return false;
  return true;
}

// Fills what both directions share; the tensors' shapes fit afterwards.
Attention attention(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
                    const Tensor& lse, const StableIValue* options) {
  Attention call{};
  call.query = heads(query, "query"), call.key = heads(key, "key");
  call.value = heads(value, "value"), call.out = heads(out, "out");
  call.heads = query.size(1), call.length = query.size(2);
  FT_CHECK(key.size(1) > 0 && call.heads % key.size(1) == 0 && key.size(0) == query.size(0) &&
               key.size(3) == query.size(3) && value.size(0) == query.size(0) &&
               value.size(1) == key.size(1) && value.size(2) == key.size(2) &&
               out.size(0) == query.size(0) && out.size(1) == call.heads &&
               out.size(2) == call.length && out.size(3) == value.size(3),
           "segment_attention: shapes do not fit");
  call.group = call.heads / key.size(1);
  FT_CHECK(lse.on_cpu() && lse.contiguous() && lse.dtype() == aoti_torch_dtype_float32() &&
               lse.numel() == query.size(0) * call.heads * call.length,
           "segment_attention: lse must be float32, contiguous, (R, H, T)");
  call.lse = const_cast<float*>(static_cast<const float*>(lse.data()));
  call.scale = static_cast<float>(fastft::as_double(options[0]));
  call.causal = fastft::as_int(options[1]) != 0;
  call.window = fastft::as_int(options[2]);
  call.softcap = static_cast<float>(fastft::as_double(options[3]));
  return call;
}

// The table of pieces, each of which lies within its tensors.
std::pair<const Piece*, int64_t> pieces_of(const Tensor& table, const Attention& call,
                                           const Tensor& query, const Tensor& key) {
  FT_CHECK(table.on_cpu() && table.contiguous() && table.dtype() == aoti_torch_dtype_int64() &&
               table.dim() == 2 && table.size(1) == 5,
           "segment_attention: pieces must be int64, contiguous, (pieces, 5)");
  const auto* pieces = static_cast<const Piece*>(table.data());
  const int64_t count = table.size(0), rows = query.size(0), keys = key.size(2);
  for (int64_t i = 0; i < count; i++) {
    const Piece& one = pieces[i];
    FT_CHECK(0 <= one.row && one.row < rows && 0 <= one.q0 && one.q0 <= one.q1 &&
                 one.q1 <= call.length && 0 <= one.k0 && one.k0 < one.k1 && one.k1 <= keys,
             "segment_attention: piece %lld lies beyond its row", static_cast<long long>(i));
    FT_CHECK((!call.causal && call.window == 0) || one.q1 - one.q0 == one.k1 - one.k0,
             "segment_attention: piece %lld needs as many keys as queries",
             static_cast<long long>(i));
  }
  return {pieces, count};
}

// Tasks go to whoever is free, as those at the end of a causal piece take longer.
template <class Kernel>
void run(const Attention& call, const std::vector<AttentionTask>& tasks, Kernel kernel) {
  int64_t room;
  attention_room_kernel()(&call, &room);
  const int64_t count = static_cast<int64_t>(tasks.size());
  const int64_t workers = std::min(count, threads());
  const Tensor memory = floats(workers * room);
  float* const first = static_cast<float*>(memory.mutable_data());
  std::atomic<int64_t> next{0};
  fastft::parallel_for(workers, 1, [&](int64_t begin, int64_t) {
    for (int64_t i; (i = next++) < count;)
      kernel(&call, &tasks[static_cast<size_t>(i)], first + begin * room);
  });
}

void segment_attention_forward(StableIValue* stack, uint64_t nargs, uint64_t) {
  FT_CHECK(nargs == 10, "segment_attention_forward takes 10 arguments, got %d",
           static_cast<int>(nargs));
  const Tensor out(stack[0]), lse(stack[1]), query(stack[2]), key(stack[3]), value(stack[4]),
      table(stack[5]);
  Attention call = attention(query, key, value, out, lse, stack + 6);
  call.out.data = out.mutable_data(), call.lse = static_cast<float*>(lse.mutable_data());
  const auto [pieces, count] = pieces_of(table, call, query, key);
  const int64_t block = fastft::query_block(wide());
  std::vector<AttentionTask> tasks;
  for (const Piece* piece = pieces; piece < pieces + count; piece++)
    for (int64_t head = 0; head < call.heads; head++)
      for (int64_t begin = 0; begin < piece->q1 - piece->q0; begin += block)
        tasks.push_back(
            {piece, head, begin, std::min(begin + block, piece->q1 - piece->q0), nullptr, nullptr});
  run(call, tasks, attention_forward_kernel());
}

// A key head of a piece: its query heads' tasks share nothing but keys and values.
struct KeyHead {
  const Piece* piece;
  int64_t head;
  int64_t keys() const { return piece->k1 - piece->k0; }
};

// Computes the gradients of some key heads, whose sums are `count` floats in all.
void backward_wave(const Attention& call, const KeyHead* first, const KeyHead* last,
                   int64_t count) {
  const int64_t key_width = fastft::padded(call.query.size, wide());
  const int64_t width = key_width + fastft::padded(call.value.size, wide());
  const Tensor sums = floats(count);
  auto* next = static_cast<float*>(sums.mutable_data());
  std::vector<AttentionTask> tasks;
  for (const KeyHead* one = first; one < last; one++)
    for (int64_t member = 0; member < call.group; member++, next += one->keys() * width)
      tasks.push_back({one->piece, one->head * call.group + member, 0,
                       one->piece->q1 - one->piece->q0, next, next + one->keys() * key_width});
  run(call, tasks, attention_backward_kernel());
  const auto add_up = attention_add_up_kernel();
  fastft::parallel_for(last - first, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      add_up(&call, &tasks[static_cast<size_t>(i * call.group)], first[i].keys() * width);
  });
}

void backward_in_waves(const Attention& call, const Piece* pieces, int64_t count) {
  const int64_t width =
      fastft::padded(call.query.size, wide()) + fastft::padded(call.value.size, wide());
  const int64_t busy = 2 * threads();
  std::vector<KeyHead> all;
  for (const Piece* piece = pieces; piece < pieces + count; piece++)
    for (int64_t head = 0; head < call.heads / call.group; head++) all.push_back({piece, head});
  const KeyHead* const end = all.data() + all.size();
  for (const KeyHead *first = all.data(), *last; first < end; first = last) {
    int64_t sums = 0;
    for (last = first; last < end; last++) {
      const int64_t more = last->keys() * call.group * width;
      const bool enough = sums + more > kSums && (last - first) * call.group >= busy;
      if (last > first && enough) break;
      sums += more;
    }
    backward_wave(call, first, last, sums);
  }
}

void segment_attention_backward(StableIValue* stack, uint64_t nargs, uint64_t) {
  FT_CHECK(nargs == 14, "segment_attention_backward takes 14 arguments, got %d",
           static_cast<int>(nargs));
  const Tensor d_query(stack[0]), d_key(stack[1]), d_value(stack[2]), d_out(stack[3]),
      query(stack[4]), key(stack[5]), value(stack[6]), out(stack[7]), lse(stack[8]),
      table(stack[9]);
  Attention call = attention(query, key, value, out, lse, stack + 10);
  call.d_out = heads(d_out, "d_out"), call.d_query = heads(d_query, "d_query");
  call.d_key = heads(d_key, "d_key"), call.d_value = heads(d_value, "d_value");
  FT_CHECK(same_shape(d_out, out) && same_shape(d_query, query) && same_shape(d_key, key) &&
               same_shape(d_value, value),
           "segment_attention: a gradient has another shape");
  call.d_query.data = d_query.mutable_data(), call.d_key.data = d_key.mutable_data();
  call.d_value.data = d_value.mutable_data();
  const auto [pieces, count] = pieces_of(table, call, query, key);
  backward_in_waves(call, pieces, count);
}

fastft::Kernel forward_kernel("segment_attention_forward", segment_attention_forward);
fastft::Kernel backward_kernel("segment_attention_backward", segment_attention_backward);
}  // namespace
