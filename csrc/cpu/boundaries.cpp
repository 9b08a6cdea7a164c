// packed_boundaries(Tensor lengths, Tensor ignored, Tensor source, int position_ids_start,
//                   Tensor(a!) labels, Tensor(b!) position_ids, Tensor(c!) seq_idx,
//                   Tensor(d!) cu_seqlens) -> ()
//
// Everything a packed batch says about its segments, in one pass over the T tokens: reads source (8
// bytes a token, none where labels is source itself), writes labels (8), position_ids (8) and
// seq_idx (4).
#include <algorithm>

#include "boundaries_args.h"
#include "first_block.h"

namespace {
using fastft::BoundariesArgs;

constexpr int64_t kGrain = 1 << 16;  // tokens: about 30 microseconds of one core

void fill(const BoundariesArgs& args, int64_t begin, int64_t end) {
  const int32_t* cu_seqlens = args.cu_seqlens;
  if (args.labels != args.source)
    std::memcpy(args.labels + begin, args.source + begin,
                static_cast<size_t>(end - begin) * sizeof *args.labels);
  int64_t segment = last_not_after(cu_seqlens, args.segments, begin);
  for (int64_t t = begin; t < end; segment++) {
    const int64_t first = cu_seqlens[segment], ignored = args.ignored[segment];
    const int64_t stop = std::min<int64_t>(end, cu_seqlens[segment + 1]);
    const int64_t unlabelled = ignored < stop - first ? first + ignored : stop;
    for (int64_t i = t; i < unlabelled; i++) args.labels[i] = fastft::kIgnoredLabel;
    for (int64_t i = t; i < stop; i++)
      args.position_ids[i] = int64_t(uint64_t(args.start) + uint64_t(i - first));
    std::fill(args.seq_idx + t, args.seq_idx + stop, static_cast<int32_t>(segment));
    t = stop;
  }
}

void packed_boundaries(StableIValue* stack, uint64_t nargs, uint64_t) {
  FT_CHECK(nargs == 8, "packed_boundaries takes 8 arguments, got %d", static_cast<int>(nargs));
  const BoundariesArgs args(stack);
  int64_t sum = 0;
  args.cu_seqlens[0] = 0;
  for (int64_t s = 0; s < args.segments; s++) {
    FT_CHECK(args.lengths[s] >= 0 && args.lengths[s] <= args.tokens - sum,
             "packed_boundaries: lengths do not add up to %lld tokens",
             static_cast<long long>(args.tokens));
    sum += args.lengths[s];
    args.cu_seqlens[s + 1] = static_cast<int32_t>(sum);
  }
  FT_CHECK(sum == args.tokens, "packed_boundaries: lengths add up to %lld, not %lld tokens",
           static_cast<long long>(sum), static_cast<long long>(args.tokens));
  fastft::parallel_for(args.tokens, kGrain,
                       [&](int64_t begin, int64_t end) { fill(args, begin, end); });
}

fastft::Kernel kernel("packed_boundaries", packed_boundaries);
}  // namespace
