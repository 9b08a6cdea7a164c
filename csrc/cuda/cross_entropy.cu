// fastft::cross_entropy_rows on CUDA: one block a row, one launch for the losses, statistics and gradient.
//
// Pass 1 keeps, for every thread, a running maximum of its logits without the target's and sums relative to it; the
// block merges them in a fixed order, one thread finishes the row in double precision, pass 2 writes the gradient.
// A row of which two fit into an SM's shared memory is kept there between the passes: one read, one write. Of a longer
// one the second read comes from the L2 cache as far as the rows in flight fit there. Logits move 16 bytes at a time;
// positions count from the 16 bytes before a row's start, so that only its first and last vector go by elements.
#include <cuda_fp16.h>

#include "cross_entropy_args.h"
#include "cross_entropy_math.h"
#include "launch.h"

namespace {
constexpr int kMaxThreads = 1024, kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLowest = -3.402823466e38f;  // finite: the difference of two of them is 0 and not NaN
constexpr float kFar = -200.0f;              // exp of it is 0; products with it are finite

struct Bf16 {
  uint16_t bits;
};

__device__ float to_float(float x) { return x; }
__device__ float to_float(__half x) { return __half2float(x); }
__device__ float to_float(Bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
__device__ void put(float* p, float x) { *p = x; }
__device__ void put(__half* p, float x) { *p = __float2half_rn(x); }
__device__ void put(Bf16* p, float x) {
  const unsigned bits = __float_as_uint(x);
  p->bits = static_cast<uint16_t>(x == x ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 : 0x7fc0u);
}

template <class T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T at[kSize];
};

struct Job {
  const void* logits;
  void* grad;  // may be the logits
  const void* target;
  const float *weight, *upstream[3];
  float *losses, *lse, *entropy;
  bool* is_top1;
  int64_t stride, grad_stride, ignore_index;
  int classes;
  bool wide_target, held;  // held: between the passes the row stays in shared memory
  float smoothing, z_loss, scale, softcap, softcap_inverse;
};

// A row seen in vectors: elements [shift, end) from `base` on, which lies on 16 bytes, are its logits.
template <class T>
struct Row {
  static constexpr int kSize = Vector<T>::kSize;
  const T* base;
  int shift, end, vectors;
  __device__ Row(const T* row, int classes) {
    shift = static_cast<int>((reinterpret_cast<uintptr_t>(row) & 15) / sizeof(T));
    base = row - shift;
    end = shift + classes;
    vectors = (end + kSize - 1) / kSize;
  }
  __device__ bool holds(int position) const { return position >= shift && position < end; }
  __device__ bool whole(int k) const { return k * kSize >= shift && (k + 1) * kSize <= end; }
  // Vector k; what lies beside the row is -Inf.
  __device__ Vector<T> load(int k) const {
    if (whole(k)) return reinterpret_cast<const Vector<T>*>(base)[k];
    Vector<T> v;
#pragma unroll
    for (int i = 0; i < kSize; i++) {
      const int position = k * kSize + i;
      if (holds(position))
        v.at[i] = base[position];
      else
        put(&v.at[i], -INFINITY);
    }
    return v;
  }
  // Writes vector k of a row of gradients at `to`.
  __device__ void store(T* to, int k, const Vector<T>& v) const {
    T* place = to + (static_cast<int64_t>(k) * kSize - shift);
    if (whole(k) && (reinterpret_cast<uintptr_t>(place) & 15) == 0) {
      *reinterpret_cast<Vector<T>*>(place) = v;
      return;
    }
#pragma unroll
    for (int i = 0; i < kSize; i++)
      if (holds(k * kSize + i)) place[i] = v.at[i];
  }
};

// What a thread, a warp or the block knows of a row; the sums are relative to `peak` and leave the target out.
struct Sums {
  float peak = kLowest, total = 0.0f;
  float moment = 0.0f;                 // sum of exp(z - peak) (z - peak)
  float below = 0.0f, weights = 0.0f;  // sum of weight (target's z - z) over all classes; of the weights
  int beaten = 0;                      // some class has a higher logit than the target, or as high a one before it
};

// Takes over sums relative to `peak`, which is not below theirs. No maximum drops a NaN: it is in the total.
__device__ void rebase(Sums& sums, float peak) {
  const float d = fmaxf(sums.peak - peak, kFar), keep = expf(sums.peak - peak);
  sums.moment = (sums.moment + sums.total * d) * keep;
  sums.total *= keep;
  sums.peak = peak;
}

__device__ void merge(Sums& a, Sums b) {
  const float peak = fmaxf(a.peak, b.peak);
  rebase(a, peak);
  rebase(b, peak);
  a.total += b.total;
  a.moment += b.moment;
  a.below += b.below;
  a.weights += b.weights;
  a.beaten |= b.beaten;
}

__device__ void merge_warp(Sums& sums) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) {
    Sums other;
    other.peak = __shfl_xor_sync(kAllLanes, sums.peak, lane);
    other.total = __shfl_xor_sync(kAllLanes, sums.total, lane);
    other.moment = __shfl_xor_sync(kAllLanes, sums.moment, lane);
    other.below = __shfl_xor_sync(kAllLanes, sums.below, lane);
    other.weights = __shfl_xor_sync(kAllLanes, sums.weights, lane);
    other.beaten = __shfl_xor_sync(kAllLanes, sums.beaten, lane);
    merge(sums, other);
  }
}

// The launch's shared memory; the row follows it.
struct alignas(16) Scratch {
  Sums of_warp[kMaxThreads / kWarp];
  fastft::RowResult result;
  float max;
  int target;  // its position
  int64_t row;
};

__device__ float transform(float x, const Job& job) {
  const float z = __fmul_rn(x, job.scale);  // no fused multiply-add may see more digits than the target's logit had
  return job.softcap > 0.0f ? __fmul_rn(job.softcap, tanhf(z * job.softcap_inverse)) : z;
}

struct Target {
  bool known;    // it is a class
  int position;  // in the row's own count; below 0 if unknown
  float z;       // NaN if unknown
  float center;  // z, or 0 where that is -Inf
};

template <class T, bool kOptions>
__device__ void add(Sums& sums, const Vector<T>& v, int k, const Row<T>& row, const Target& target, const Job& job) {
  constexpr int kSize = Vector<T>::kSize;
  const bool edge = !row.whole(k);
  float z[kSize], peak = sums.peak;
#pragma unroll
  for (int i = 0; i < kSize; i++) {
    const int position = k * kSize + i;
    const bool inside = !edge || row.holds(position);
    z[i] = inside ? transform(to_float(v.at[i]), job) : -INFINITY;
    if (kOptions && inside) {
      if (job.smoothing > 0.0f) {
        const float w = job.weight ? job.weight[position - row.shift] : 1.0f;
        sums.below += w * (target.center - z[i]);
        sums.weights += w;
      }
      if (!(z[i] < target.z || (z[i] == target.z && position >= target.position))) sums.beaten = 1;
    }
  }
  if (target.position / kSize == k) {
#pragma unroll
    for (int i = 0; i < kSize; i++)
      if (k * kSize + i == target.position) z[i] = -INFINITY;
  }
#pragma unroll
  for (int i = 0; i < kSize; i++) peak = fmaxf(peak, z[i]);
  rebase(sums, peak);
#pragma unroll
  for (int i = 0; i < kSize; i++) {
    const float e = expf(z[i] - peak);
    sums.total += e;
    if (kOptions) sums.moment += e * fmaxf(z[i] - peak, kFar);
  }
}

__device__ void finish(Scratch* scratch, const Sums& sums, const Target& target, int shift, const Job& job, int64_t r) {
  const float weight = !job.weight ? 1.0f : target.known ? job.weight[target.position - shift] : NAN;
  const float max = fmaxf(sums.peak, target.z);
  Sums all = sums;
  rebase(all, max);
  const double weights = job.smoothing > 0.0f && job.weight ? sums.weights : job.classes;
  const float d = fmaxf(target.z - max, kFar);
  const double below = sums.below + weights * (static_cast<double>(max) - target.center);
  const fastft::RowSums row{max, target.z, all.total, job.smoothing > 0.0f ? below : 0.0,
                            all.moment + static_cast<double>(expf(d)) * d};
  const double hit = (1.0 - job.smoothing) * weight, spread = static_cast<double>(job.smoothing) / job.classes;
  const double g_loss = job.upstream[0] ? job.upstream[0][r] : 1.0f,
               g_lse = job.upstream[1] ? job.upstream[1][r] : 0.0f;
  const double g_entropy = job.upstream[2] ? job.upstream[2][r] : 0.0f;
  const fastft::RowTerms terms{hit, spread, weights, weight, job.z_loss, g_loss, g_lse, g_entropy};
  const fastft::RowResult result = fastft::finish_row(row, terms);
  job.losses[r] = result.loss;
  job.lse[r] = result.lse;
  if (job.entropy) {
    job.entropy[r] = result.entropy;
    job.is_top1[r] = !sums.beaten;
  }
  scratch->result = result;
  scratch->max = max;
  scratch->target = target.position;
  scratch->row = r;
}

template <class T, bool kOptions>
__device__ Vector<T> gradient(const Vector<T>& v, int k, const Row<T>& row, const Scratch& of_row, const Job& job) {
  constexpr int kSize = Vector<T>::kSize;
  const fastft::RowResult& result = of_row.result;
  Vector<T> out;
#pragma unroll
  for (int i = 0; i < kSize; i++) {
    const int position = k * kSize + i;
    const float z = transform(to_float(v.at[i]), job), e = expf(z - of_row.max);
    float dz = e * result.base;
    if (kOptions) {
      dz = e * (result.base + result.slope * fmaxf(z - of_row.max, kFar));
      if (job.smoothing > 0.0f && row.holds(position))
        dz -= result.spread * (job.weight ? job.weight[position - row.shift] : 1.0f);
    }
    if (position == of_row.target) dz = result.target_grad;
    if (kOptions && job.softcap > 0.0f) {
      const float ratio = z * job.softcap_inverse;
      dz *= (1.0f - ratio) * (1.0f + ratio);
    }
    put(&out.at[i], dz * job.scale);
  }
  return out;
}

template <class T>
__device__ Target find_target(const Row<T>& row, int64_t y, const Job& job) {
  Target target{y >= 0 && y < job.classes, -(1 << 30), NAN, 0.0f};
  if (!target.known) return target;
  target.position = row.shift + static_cast<int>(y);
  target.z = transform(to_float(row.base[target.position]), job);
  if (target.z > -INFINITY) target.center = target.z;
  return target;
}

template <class T>
__device__ void ignore(const Row<T>& row, const Job& job, int64_t r) {
  if (threadIdx.x == 0) {
    job.losses[r] = job.lse[r] = 0.0f;
    if (job.entropy) {
      job.entropy[r] = 0.0f;
      job.is_top1[r] = false;
    }
  }
  Vector<T> zeros;
  for (int i = 0; i < Vector<T>::kSize; i++) put(&zeros.at[i], 0.0f);
  if (!job.grad) return;
  T* grad = static_cast<T*>(job.grad) + r * job.grad_stride;
  for (int k = threadIdx.x; k < row.vectors; k += blockDim.x) row.store(grad, k, zeros);
}

template <class T, bool kOptions>
__device__ void write_gradient(const Scratch& of_row, const Vector<T>* held, const Job& job) {
  // read back instead of kept: the registers that pass 1 and the double precision between need are short
  const int64_t r = of_row.row;
  const int threads = blockDim.x;
  const Row<T> row(static_cast<const T*>(job.logits) + r * job.stride, job.classes);
  T* grad = static_cast<T*>(job.grad) + r * job.grad_stride;
  for (int k = row.vectors - 1 - static_cast<int>(threadIdx.x); k >= 0; k -= 2 * threads) {
    const int next = k >= threads ? k - threads : k;
    const Vector<T> first = held ? held[k] : row.load(k), second = held ? held[next] : row.load(next);
    row.store(grad, k, gradient<T, kOptions>(first, k, row, of_row, job));
    if (next != k) row.store(grad, next, gradient<T, kOptions>(second, next, row, of_row, job));
  }
}

template <class T, bool kOptions>
__global__ void __launch_bounds__(kMaxThreads) rows_kernel(const __grid_constant__ Job job) {
  FASTFT_SHARED(shared);
  Scratch* scratch = reinterpret_cast<Scratch*>(shared);
  Vector<T>* held = job.held ? reinterpret_cast<Vector<T>*>(scratch + 1) : nullptr;
  const int64_t r = blockIdx.x;
  const Row<T> row(static_cast<const T*>(job.logits) + r * job.stride, job.classes);
  const int64_t y =
      job.wide_target ? static_cast<const int64_t*>(job.target)[r] : static_cast<const int32_t*>(job.target)[r];
  if (y == job.ignore_index) return ignore(row, job, r);
  const Target target = find_target(row, y, job);
  const int threads = blockDim.x, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;

  Sums sums;
  for (int k = threadIdx.x; k < row.vectors; k += 2 * threads) {  // two loads in flight
    const bool two = k + threads < row.vectors;
    const Vector<T> first = row.load(k), second = row.load(two ? k + threads : k);
    if (held) {
      held[k] = first;
      if (two) held[k + threads] = second;
    }
    add<T, kOptions>(sums, first, k, row, target, job);
    if (two) add<T, kOptions>(sums, second, k + threads, row, target, job);
  }
  merge_warp(sums);
  if (lane == 0) scratch->of_warp[warp] = sums;
  __syncthreads();
  if (warp == 0) {
    Sums all;
    if (lane < threads / kWarp) all = scratch->of_warp[lane];
    merge_warp(all);
    if (lane == 0) finish(scratch, all, target, row.shift, job, r);
  }
  __syncthreads();  // also: every thread has read the target's logit and the row, which the gradient may overwrite

  if (job.grad) write_gradient<T, kOptions>(*scratch, held, job);
}

// Whether `bytes` of shared memory are there for two blocks of an SM, each with the KiB that the driver takes.
bool two_fit(int bytes, int32_t device) {
  int block = 0, processor = 0;
  cudaDeviceGetAttribute(&block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaDeviceGetAttribute(&processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  return bytes <= block && 2 * (bytes + 1024) <= processor;
}

template <class T, bool kOptions>
void launch(Job job, int64_t rows, int32_t device) {
  const int64_t vectors = (int64_t(job.classes) + 2 * Vector<T>::kSize - 2) / Vector<T>::kSize;
  int bytes = sizeof(Scratch), most = kMaxThreads;  // few rows in flight: they share the L2 cache
  const auto kernel = rows_kernel<T, kOptions>;
  if (job.grad && vectors < 16384 && two_fit(bytes + static_cast<int>(vectors) * 16, device)) {
    bytes += static_cast<int>(vectors) * 16;
    most = kMaxThreads / 2;
    job.held = true;
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    FT_CHECK(error == cudaSuccess, "cross_entropy_rows: %d bytes of shared memory refused: %s", bytes,
             cudaGetErrorString(error));
  }
  int threads = kWarp;
  while (threads < most && threads * 4 < vectors) threads *= 2;
  FASTFT_LAUNCH(kernel, static_cast<unsigned>(rows), threads, bytes, fastft::current_stream(device), job);
  fastft::check_launch("cross_entropy_rows");
}

template <class T>
void launch_for(const Job& job, int64_t rows, int32_t device) {
  if (job.weight || job.entropy || job.upstream[1] || job.smoothing > 0.0f || job.softcap > 0.0f)
    launch<T, true>(job, rows, device);
  else
    launch<T, false>(job, rows, device);
}

Job read(const fastft::CrossEntropyArgs& args) {
  Job job{};
  job.logits = args.logits;
  job.grad = args.grad;
  job.target = args.target;
  job.weight = args.weight;
  for (int i = 0; i < 3; i++) job.upstream[i] = args.upstream[i];
  job.losses = args.losses;
  job.lse = args.lse;
  job.entropy = args.entropy;
  job.is_top1 = args.is_top1;
  job.stride = args.stride;
  job.grad_stride = args.grad_stride;
  job.ignore_index = args.ignore_index;
  job.classes = static_cast<int>(args.classes);
  job.wide_target = args.wide_target;
  job.smoothing = args.label_smoothing;
  job.z_loss = args.z_loss;
  job.scale = args.logit_scale;
  job.softcap = args.softcap;
  job.softcap_inverse = args.softcap > 0.0f ? 1.0f / args.softcap : 0.0f;
  return job;
}

void cross_entropy_rows(StableIValue* stack, uint64_t nargs, uint64_t) {
  FT_CHECK(nargs == 13, "cross_entropy_rows: 13 arguments expected, got %d", static_cast<int>(nargs));
  const fastft::CrossEntropyArgs args(stack, true);
  FT_CHECK(args.rows < (int64_t(1) << 31) && args.classes < (int64_t(1) << 29),
           "cross_entropy_rows: logits of %lld x %lld are too large", static_cast<long long>(args.rows),
           static_cast<long long>(args.classes));
  if (args.rows == 0) return;
  const Job job = read(args);
  const fastft::DeviceGuard guard(args.device_index);
  if (args.dtype == aoti_torch_dtype_float32())
    launch_for<float>(job, args.rows, args.device_index);
  else if (args.dtype == aoti_torch_dtype_bfloat16())
    launch_for<Bf16>(job, args.rows, args.device_index);
  else
    launch_for<__half>(job, args.rows, args.device_index);
}

fastft::Kernel kernel_cross_entropy_rows("cross_entropy_rows", cross_entropy_rows);
}  // namespace
