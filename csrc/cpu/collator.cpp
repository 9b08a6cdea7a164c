// packed_boundaries(Tensor lengths, Tensor source, int position_ids_start, int padding, Tensor(a!) labels,
//                   Tensor(b!) position_ids, Tensor(c!) seq_idx, Tensor(d!) cu_seqlens) -> ()
// Everything a packed batch says about its segments, in one pass over the T tokens: reads source (8 bytes a token, none
// where labels is source itself), writes labels (8), position_ids (8) and seq_idx (4).
#include <algorithm>

#include "shim.h"

namespace {
using fastft::as_int;
using fastft::Tensor;

constexpr int64_t kIgnored = -100;
constexpr int64_t kGrain = 1 << 16;  // tokens: about 30 microseconds of one core

struct Batch {
  const int32_t* cu_seqlens;
  int64_t segments, start, unpadded;
  const int64_t* source;
  int64_t *labels, *position_ids;
  int32_t* seq_idx;

  void fill(int64_t begin, int64_t end) const {
    int64_t segment = std::upper_bound(cu_seqlens, cu_seqlens + segments + 1, begin) - cu_seqlens - 1;
    if (labels != source)
      std::memcpy(labels + begin, source + begin, static_cast<size_t>(end - begin) * sizeof *labels);
    for (int64_t t = begin; t < end; segment++) {
      const int64_t first = cu_seqlens[segment], stop = std::min<int64_t>(end, cu_seqlens[segment + 1]);
      if (t == first && t < stop) labels[t] = kIgnored;
      for (int64_t i = t; i < stop; i++) position_ids[i] = start + i - first;
      std::fill(seq_idx + t, seq_idx + stop, static_cast<int32_t>(segment));
      t = stop;
    }
    for (int64_t t = std::max(begin, unpadded); t < end; t++) labels[t] = kIgnored;
  }
};

void packed_boundaries(StableIValue* stack, uint64_t nargs, uint64_t) {
  FT_CHECK(nargs == 8, "packed_boundaries takes 8 arguments, got %d", static_cast<int>(nargs));
  const Tensor lengths(stack[0]), source(stack[1]), labels(stack[4]), position_ids(stack[5]), seq_idx(stack[6]);
  const Tensor cu_seqlens(stack[7]);
  for (const Tensor* tensor : {&lengths, &source, &labels, &position_ids})
    FT_CHECK(tensor->dtype() == aoti_torch_dtype_int64() && tensor->contiguous(),
             "packed_boundaries: not contiguous int64");
  for (const Tensor* tensor : {&seq_idx, &cu_seqlens})
    FT_CHECK(tensor->dtype() == aoti_torch_dtype_int32() && tensor->contiguous(),
             "packed_boundaries: not contiguous int32");
  const int64_t segments = lengths.numel(), tokens = source.numel();
  FT_CHECK(labels.numel() == tokens && position_ids.numel() == tokens && seq_idx.numel() == tokens &&
               cu_seqlens.numel() == segments + 1 && tokens <= INT32_MAX,
           "packed_boundaries: outputs do not fit %lld tokens in %lld segments", static_cast<long long>(tokens),
           static_cast<long long>(segments));

  const int64_t* length = static_cast<const int64_t*>(lengths.data());
  int32_t* cumulative = static_cast<int32_t*>(cu_seqlens.mutable_data());
  int64_t sum = 0;
  cumulative[0] = 0;
  for (int64_t s = 0; s < segments; s++) {
    FT_CHECK(length[s] >= 0 && length[s] <= tokens - sum, "packed_boundaries: lengths do not add up to %lld tokens",
             static_cast<long long>(tokens));
    sum += length[s];
    cumulative[s + 1] = static_cast<int32_t>(sum);
  }
  FT_CHECK(sum == tokens, "packed_boundaries: lengths add up to %lld, not %lld tokens", static_cast<long long>(sum),
           static_cast<long long>(tokens));
  const Batch batch{cumulative,
                    segments,
                    as_int(stack[2]),
                    tokens - as_int(stack[3]),
                    static_cast<const int64_t*>(source.data()),
                    static_cast<int64_t*>(labels.mutable_data()),
                    static_cast<int64_t*>(position_ids.mutable_data()),
                    static_cast<int32_t*>(seq_idx.mutable_data())};
  fastft::parallel_for(tokens, kGrain, [&](int64_t begin, int64_t end) { batch.fill(begin, end); });
}

fastft::Kernel kernel("packed_boundaries", packed_boundaries);
}  // namespace
