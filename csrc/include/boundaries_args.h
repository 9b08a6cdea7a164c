// Reads and checks the arguments of fastft::packed_boundaries for the CPU and the CUDA launcher.
#pragma once
#include "shim.h"

namespace fastft {
constexpr int64_t kIgnoredLabel = -100;

// packed_boundaries(Tensor lengths, Tensor ignored, Tensor source, int position_ids_start,
//                   Tensor(a!) labels, Tensor(b!) position_ids, Tensor(c!) seq_idx,
//                   Tensor(d!) cu_seqlens) -> ()
class BoundariesArgs {
  Tensor lengths_, ignored_, source_, labels_, position_ids_, seq_idx_, cu_seqlens_;

 public:
  const int64_t segments, tokens, start;
  const int64_t *lengths, *ignored, *source;
  int64_t *labels, *position_ids;
  int32_t *seq_idx, *cu_seqlens;
  const int32_t device_index;

  explicit BoundariesArgs(StableIValue* stack)
      : lengths_(stack[0]),
        ignored_(stack[1]),
        source_(stack[2]),
        labels_(stack[4]),
        position_ids_(stack[5]),
        seq_idx_(stack[6]),
        cu_seqlens_(stack[7]),
        segments(lengths_.numel()),
        tokens(source_.numel()),
        start(as_int(stack[3])),
        device_index(source_.device_index()) {
    const int32_t int64 = aoti_torch_dtype_int64(), int32 = aoti_torch_dtype_int32();
    FT_CHECK(tokens <= INT32_MAX, "packed_boundaries: %lld tokens are too many",
             static_cast<long long>(tokens));
    lengths = checked<const int64_t>(lengths_, "lengths", int64, segments);
    ignored = checked<const int64_t>(ignored_, "ignored", int64, segments);
    source = checked<const int64_t>(source_, "source", int64, tokens);
    labels = checked<int64_t>(labels_, "labels", int64, tokens);
    position_ids = checked<int64_t>(position_ids_, "position_ids", int64, tokens);
    seq_idx = checked<int32_t>(seq_idx_, "seq_idx", int32, tokens);
    cu_seqlens = checked<int32_t>(cu_seqlens_, "cu_seqlens", int32, segments + 1);
  }

 private:
  template <class T>
  T* checked(const Tensor& tensor, const char* name, int32_t dtype, int64_t size) const {
    FT_CHECK(tensor.is_beside(source_), "packed_boundaries: %s must be on the device of source",
             name);
    FT_CHECK(tensor.numel() == size && tensor.contiguous() && tensor.dtype() == dtype,
             "packed_boundaries: %s must be contiguous, hold %lld numbers and have the right dtype",
             name, static_cast<long long>(size));
    return static_cast<T*>(tensor.mutable_data());
  }
};
}  // namespace fastft
