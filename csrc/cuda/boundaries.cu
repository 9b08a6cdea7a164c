// fastft::packed_boundaries on CUDA: two launches and no wait for the device, which may still
// receive the lengths.
//
// The first adds up the lengths in one block: 8 bytes read and 4 written a segment. The second
// finds the segment of each token by bisection of these sums, which stay in the cache, and writes
// 20 bytes a token beside the 8 that it reads. Lengths that do not add up to the tokens are the
// caller's fault; nothing is written beyond the outputs then.
#include "boundaries_args.h"
#include "first_block.h"
#include "launch.h"

namespace {
using fastft::BoundariesArgs;

constexpr int kThreads = 256, kScanThreads = 1024;

struct Job {
  int64_t segments, tokens, start;
  const int64_t *lengths, *ignored, *source;
  int64_t *labels, *position_ids;
  int32_t *seq_idx, *cu_seqlens;
};

// Every thread adds up a stretch of the lengths, the block adds up the stretches before it, and the
// thread writes.
__global__ void scan_kernel(Job job) {
  extern __shared__ __align__(16) unsigned char shared[];
  uint64_t* sums = reinterpret_cast<uint64_t*>(shared);  // of lengths that nobody has checked
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int64_t stretch = (job.segments + threads - 1) / threads, begin = thread * stretch;
  const int64_t end = begin + stretch < job.segments ? begin + stretch : job.segments;
  uint64_t sum = 0;
  for (int64_t s = begin; s < end; s++) sum += uint64_t(job.lengths[s]);
  sums[thread] = sum;
  __syncthreads();
  for (int distance = 1; distance < threads; distance *= 2) {
    const uint64_t before = thread >= distance ? sums[thread - distance] : 0;
    __syncthreads();
    sums[thread] += before;
    __syncthreads();
  }
  uint64_t first = sums[thread] - sum;
  if (thread == 0) job.cu_seqlens[0] = 0;
  for (int64_t s = begin; s < end; s++) {
    first += uint64_t(job.lengths[s]);
    job.cu_seqlens[s + 1] = static_cast<int32_t>(first);
  }
}

__global__ void fill_kernel(Job job) {
  const int64_t t = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (t >= job.tokens) return;
  const int64_t segment = last_not_after(job.cu_seqlens, job.segments, t);
  const int64_t offset = t - job.cu_seqlens[segment];
  job.labels[t] = offset < job.ignored[segment] ? fastft::kIgnoredLabel : job.source[t];
  job.position_ids[t] = int64_t(uint64_t(job.start) + uint64_t(offset));
  job.seq_idx[t] = static_cast<int32_t>(segment);
}

void packed_boundaries(StableIValue* stack, uint64_t nargs, uint64_t) {
  FT_CHECK(nargs == 8, "packed_boundaries takes 8 arguments, got %d", static_cast<int>(nargs));
  const BoundariesArgs args(stack);
  const Job job{args.segments, args.tokens, args.start,        args.lengths, args.ignored,
                args.source,   args.labels, args.position_ids, args.seq_idx, args.cu_seqlens};
  const fastft::DeviceGuard guard(args.device_index);
  const cudaStream_t stream = fastft::current_stream(args.device_index);
  const int scan_threads = args.segments > 32 ? kScanThreads : 32;
  scan_kernel<<<1, scan_threads, scan_threads * sizeof(int64_t), stream>>>(job);
  fastft::check_launch("packed_boundaries");
  if (args.tokens == 0 || args.segments == 0) return;
  const int64_t blocks = (args.tokens + kThreads - 1) / kThreads;
  fill_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(job);
  fastft::check_launch("packed_boundaries");
}

fastft::Kernel kernel_packed_boundaries("packed_boundaries", packed_boundaries);
}  // namespace
