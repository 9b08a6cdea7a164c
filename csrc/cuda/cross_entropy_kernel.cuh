// The CUDA kernel of cross_entropy_rows: one block a row, one launch for the losses, statistics and
// gradient.
//
// Pass 1 keeps, for every thread, a running maximum of its logits without the target's and sums
// relative to it; the block merges them in a fixed order, one thread finishes the row in double
// precision, pass 2 writes the gradient. A row of which two fit into an SM's shared memory is kept
// there between the passes: one read, one write. Of a longer one the second read comes from the L2
// cache as far as the rows in flight fit there. Logits move 16 bytes at a time, but for the few
// before the first 16 bytes of a row and after its last.
//
// HBM leaves time for 28 instructions a logit of 16 bits (H200). So options are asked for once a
// vector, in the plain kernel not at all, and no vector asks whether it lies within the row.
#pragma once
#include "cross_entropy_math.h"
#include "launch.h"
#include "vectors.cuh"

namespace {
constexpr int kMaxThreads = 1024, kWarp = 32;
constexpr int kInFlight = 2;  // loads of a thread
constexpr unsigned kAllLanes = 0xffffffffu;
// Finite: the difference of two of them is 0 and not NaN.
constexpr float kLowest = -3.402823466e38f;
constexpr float kFar = -200.0f;  // exp of it is 0; products with it are finite

// 2^x, off by 2 units in the last place; below 2^-126 it is 0.
__device__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// exp for x <= 0, with the accuracy that logits of type T ask for: what the product with log2(e)
// loses by rounding, |x| units of the last place, does not show behind 16 bits, and is added back
// for float32. For -Inf the loss is NaN, and the minimum drops it.
template <class T>
__device__ float exponential(float x) {
  constexpr float kLog2E = 1.44269502f, kRest = 1.925963033e-8f, kLn2 = 0.693147182f;
  const float power = __fmul_rn(x, kLog2E), value = exp2_approximate(power);
  if (sizeof(T) == 2) return value;
  const float lost = __fmaf_rn(x, kRest, __fmaf_rn(x, kLog2E, -power));
  return __fmaf_rn(value, fminf(lost, 1.0f) * kLn2, value);
}

struct Job {
  const void* logits;
  void* grad;  // may be the logits
  const void* target;
  const float *weight, *upstream[3];
  float *losses, *lse, *entropy;
  bool* is_top1;
  int64_t stride, grad_stride, ignore_index;
  int classes;
  bool wide_target;
  bool moments;  // the entropy is asked for, or has a gradient
  bool held;     // between the passes the row stays in shared memory
  float smoothing, z_loss, scale, softcap, softcap_inverse;
};

// A row of logits: vectors of 16 bytes from class `head` on. The classes before and after them,
// fewer than a warp has threads, go one by one.
template <class T>
struct Row {
  static constexpr int kSize = 16 / sizeof(T);
  const T* data;
  const uint4* words;
  int head, vectors, alone;
  __device__ Row(const Job& job, int64_t r)
      : data(static_cast<const T*>(job.logits) + r * job.stride) {
    head =
        min(static_cast<int>((-reinterpret_cast<uintptr_t>(data) & 15) / sizeof(T)), job.classes);
    words = reinterpret_cast<const uint4*>(data + head);
    vectors = (job.classes - head) / kSize;
    alone = job.classes - vectors * kSize;
  }
  __device__ int vector_class(int k) const { return head + k * kSize; }
  __device__ int alone_class(int i) const { return i < head ? i : i + vectors * kSize; }
};

// The place of a row's gradient, whose vectors may lie elsewhere than those of the logits.
template <class T>
struct GradRow {
  T* data;
  bool wide;
  __device__ GradRow(const Job& job, int64_t r, int head)
      : data(static_cast<T*>(job.grad) + r * job.grad_stride) {
    wide = (reinterpret_cast<uintptr_t>(data + head) & 15) == 0;
  }
  template <int n>
  __device__ void store(int c, const float (&x)[n]) const {
    if constexpr (n > 1) {
      // evict-first: nobody soon reads the gradient, and the rows are to stay in the cache
      if (wide) return __stcs(reinterpret_cast<uint4*>(data + c), pack<T>(x));
    }
#pragma unroll
    for (int i = 0; i < n; i++) put(data + c + i, x[i]);
  }
};

// The knowledge of a thread, a warp or the block of a row; the sums are relative to `peak` and
// leave the target out.
struct Sums {
  float peak = kLowest, total = 0.0f;
  float moment = 0.0f;   // sum of exp(z - peak) (z - peak)
  float below = 0.0f;    // sum of weight (target's z - z) over all classes
  float weights = 0.0f;  // sum of the weights
  float beaten = 0.0f;   // not 0: a class has a higher logit, or an earlier one as high a logit
};

// Takes over sums relative to `peak`, which is not below theirs. No maximum drops a NaN: it is in
// the total.
__device__ void rebase(Sums& sums, float peak) {
  const float d = fmaxf(sums.peak - peak, kFar), keep = exponential<float>(d);
  sums.moment = (sums.moment + sums.total * d) * keep;
  sums.total *= keep;
  sums.peak = peak;
}

__device__ float sum_of_warp(float x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}

template <bool kOptions>
__device__ void merge_warp(Sums& sums) {
  float peak = sums.peak;
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2)
    peak = fmaxf(peak, __shfl_xor_sync(kAllLanes, peak, lanes));
  rebase(sums, peak);
  sums.total = sum_of_warp(sums.total);
  if (kOptions) {
    sums.moment = sum_of_warp(sums.moment);
    sums.below = sum_of_warp(sums.below);
    sums.weights = sum_of_warp(sums.weights);
    sums.beaten = sum_of_warp(sums.beaten);
  }
}

// The launch's shared memory; the row follows it.
struct alignas(16) Scratch {
  Sums of_warp[kMaxThreads / kWarp];
  fastft::RowResult result;
  float max;
  int target;
  int64_t row;
};

template <bool kOptions, int n>
__device__ void transform(float (&z)[n], const Job& job) {
#pragma unroll
  for (int i = 0; i < n; i++) {
    // no fused multiply-add may see more digits than the target's logit had
    z[i] = __fmul_rn(z[i], job.scale);
  }
  if (kOptions && job.softcap > 0.0f) {
#pragma unroll
    for (int i = 0; i < n; i++) z[i] = __fmul_rn(job.softcap, tanhf(z[i] * job.softcap_inverse));
  }
}

struct Target {
  bool known;    // it is a class
  int index;     // -1 if unknown
  float z;       // NaN if unknown
  float center;  // z, or 0 where that is -Inf
};

// Adds what smoothing and statistics need beside the exponentials, of the classes from c on.
template <int n>
__device__ void add_options(Sums& sums, const float (&z)[n], int c, const Target& target,
                            const Job& job) {
  if (job.smoothing > 0.0f && job.weight) {
#pragma unroll
    for (int i = 0; i < n; i++) {
      const float w = job.weight[c + i];
      sums.below += w * (target.center - z[i]);
      sums.weights += w;
    }
  } else if (job.smoothing > 0.0f) {
#pragma unroll
    for (int i = 0; i < n; i++) sums.below += target.center - z[i];
  }
  if (!job.entropy) return;
#pragma unroll
  for (int i = 0; i < n; i++)
    if (!(z[i] < target.z || (z[i] == target.z && c + i >= target.index))) sums.beaten = 1.0f;
}

// Takes in the logits of the classes from c on.
template <class T, bool kOptions, int n>
__device__ void add(Sums& sums, float (&z)[n], int c, const Target& target, const Job& job) {
  transform<kOptions>(z, job);
  if (kOptions) add_options(sums, z, c, target, job);
  const unsigned place = target.index - c;
  if (place < n) {
#pragma unroll
    for (int i = 0; i < n; i++)
      if (i == place) z[i] = -INFINITY;
  }
  float peak = sums.peak;
#pragma unroll
  for (int i = 0; i < n; i++) peak = fmaxf(peak, z[i]);
  if (peak > sums.peak) rebase(sums, peak);
  float e[n];
#pragma unroll
  for (int i = 0; i < n; i++) sums.total += e[i] = exponential<T>(z[i] - peak);
  if (kOptions && job.moments) {
#pragma unroll
    for (int i = 0; i < n; i++) sums.moment += e[i] * fmaxf(z[i] - peak, kFar);
  }
}

template <class T, bool kOptions>
__device__ Sums add_row(const Row<T>& row, const Target& target, uint4* held, const Job& job) {
  const int threads = blockDim.x;
  Sums sums;
  for (int first = threadIdx.x; first < row.vectors; first += kInFlight * threads) {
    uint4 bits[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; j++) {
      const int k = first + j * threads;
      if (k < row.vectors) bits[j] = row.words[k];
    }
#pragma unroll
    for (int j = 0; j < kInFlight; j++) {
      const int k = first + j * threads;
      if (k >= row.vectors) break;
      if (job.held) held[k] = bits[j];
      float z[Row<T>::kSize];
      unpack<T>(bits[j], z);
      add<T, kOptions>(sums, z, row.vector_class(k), target, job);
    }
  }
  if (threadIdx.x < row.alone) {
    const int c = row.alone_class(threadIdx.x);
    float z[1] = {widened(row.data[c])};
    add<T, kOptions>(sums, z, c, target, job);
  }
  return sums;
}

__device__ void finish(Scratch* scratch, const Sums& sums, const Target& target, const Job& job,
                       int64_t r) {
  const float weight = !job.weight ? 1.0f : target.known ? job.weight[target.index] : NAN;
  const float max = fmaxf(sums.peak, target.z);
  Sums all = sums;
  rebase(all, max);
  const double weights = job.smoothing > 0.0f && job.weight ? sums.weights : job.classes;
  const float d = fmaxf(target.z - max, kFar);
  const double below = sums.below + weights * (static_cast<double>(max) - target.center);
  const fastft::RowSums row{max, target.z, all.total, job.smoothing > 0.0f ? below : 0.0,
                            all.moment + static_cast<double>(expf(d)) * d};
  const double hit = (1.0 - job.smoothing) * weight;
  const double spread = static_cast<double>(job.smoothing) / job.classes;
  const double g_loss = job.upstream[0] ? job.upstream[0][r] : 1.0f;
  const double g_lse = job.upstream[1] ? job.upstream[1][r] : 0.0f;
  const double g_entropy = job.upstream[2] ? job.upstream[2][r] : 0.0f;
  const fastft::RowTerms terms{hit, spread, weights, weight, job.z_loss, g_loss, g_lse, g_entropy};
  fastft::RowResult result = fastft::finish_row(row, terms);
  job.losses[r] = result.loss;
  job.lse[r] = result.lse;
  if (job.entropy) {
    job.entropy[r] = result.entropy;
    job.is_top1[r] = sums.beaten == 0.0f;
  }
  result.base *= job.scale, result.slope *= job.scale;
  result.spread *= job.scale, result.target_grad *= job.scale;
  scratch->result = result;
  scratch->max = max;
  scratch->target = target.index;
  scratch->row = r;
}

// Makes the gradient of the logits of the classes from c on, in their place.
template <class T, bool kOptions, int n>
__device__ void differentiate(float (&z)[n], int c, const Scratch& of_row, const Job& job) {
  const fastft::RowResult& result = of_row.result;
  transform<kOptions>(z, job);
  float dz[n];
#pragma unroll
  for (int i = 0; i < n; i++) dz[i] = exponential<T>(z[i] - of_row.max);
  if (kOptions && job.moments) {
#pragma unroll
    for (int i = 0; i < n; i++)
      dz[i] *= result.base + result.slope * fmaxf(z[i] - of_row.max, kFar);
  } else {
#pragma unroll
    for (int i = 0; i < n; i++) dz[i] *= result.base;
  }
  if (kOptions && job.smoothing > 0.0f && job.weight) {
#pragma unroll
    for (int i = 0; i < n; i++) dz[i] -= result.spread * job.weight[c + i];
  } else if (kOptions && job.smoothing > 0.0f) {
#pragma unroll
    for (int i = 0; i < n; i++) dz[i] -= result.spread;
  }
  const unsigned place = of_row.target - c;
  if (place < n) {
#pragma unroll
    for (int i = 0; i < n; i++)
      if (i == place) dz[i] = result.target_grad;
  }
  if (kOptions && job.softcap > 0.0f) {
#pragma unroll
    for (int i = 0; i < n; i++) {
      const float ratio = z[i] * job.softcap_inverse;
      dz[i] *= (1.0f - ratio) * (1.0f + ratio);
    }
  }
#pragma unroll
  for (int i = 0; i < n; i++) z[i] = dz[i];
}

// Writes the gradient from the end of the row on, which is still in the L2 cache.
template <class T, bool kOptions>
__device__ void write_gradient(const Scratch& of_row, const uint4* held, const Job& job) {
  // read back instead of kept: the registers that pass 1 and the double precision between need are
  // short
  const int64_t r = of_row.row;
  const Row<T> row(job, r);
  const GradRow<T> grad(job, r, row.head);
  const int threads = blockDim.x;
  for (int last = row.vectors - 1 - static_cast<int>(threadIdx.x); last >= 0;
       last -= kInFlight * threads) {
    uint4 bits[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; j++) {
      const int k = last - j * threads;
      if (k >= 0) bits[j] = job.held ? held[k] : row.words[k];
    }
#pragma unroll
    for (int j = 0; j < kInFlight; j++) {
      const int k = last - j * threads;
      if (k < 0) break;
      float z[Row<T>::kSize];
      unpack<T>(bits[j], z);
      differentiate<T, kOptions>(z, row.vector_class(k), of_row, job);
      grad.store(row.vector_class(k), z);
    }
  }
  if (threadIdx.x < row.alone) {
    const int c = row.alone_class(threadIdx.x);
    float z[1] = {widened(row.data[c])};
    differentiate<T, kOptions>(z, c, of_row, job);
    grad.store(c, z);
  }
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
  if (!job.grad) return;
  const GradRow<T> grad(job, r, row.head);
  const float zeros[Row<T>::kSize] = {}, zero[1] = {};
  for (int k = threadIdx.x; k < row.vectors; k += blockDim.x)
    grad.store(row.vector_class(k), zeros);
  if (threadIdx.x < row.alone) grad.store(row.alone_class(threadIdx.x), zero);
}

template <class T>
__device__ Target find_target(const Row<T>& row, int64_t y, const Job& job) {
  Target target{y >= 0 && y < job.classes, -1, NAN, 0.0f};
  if (!target.known) return target;
  target.index = static_cast<int>(y);
  float z[1] = {widened(row.data[y])};
  transform<true>(z, job);
  target.z = z[0];
  if (target.z > -INFINITY) target.center = target.z;
  return target;
}

template <class T, bool kOptions>
__global__ void __launch_bounds__(kMaxThreads) rows_kernel(const __grid_constant__ Job job) {
  extern __shared__ __align__(16) unsigned char shared[];
  Scratch* scratch = reinterpret_cast<Scratch*>(shared);
  uint4* held = reinterpret_cast<uint4*>(scratch + 1);
  const int64_t r = blockIdx.x;
  const Row<T> row(job, r);
  const int64_t y = job.wide_target ? static_cast<const int64_t*>(job.target)[r]
                                    : static_cast<const int32_t*>(job.target)[r];
  if (y == job.ignore_index) return ignore(row, job, r);
  const Target target = find_target(row, y, job);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;

  Sums sums = add_row<T, kOptions>(row, target, held, job);
  merge_warp<kOptions>(sums);
  if (lane == 0) scratch->of_warp[warp] = sums;
  __syncthreads();
  if (warp == 0) {
    Sums all;
    if (lane < blockDim.x / kWarp) all = scratch->of_warp[lane];
    merge_warp<kOptions>(all);
    if (lane == 0) finish(scratch, all, target, job, r);
  }
  // also: every thread has read the target's logit and the row, which the gradient may overwrite
  __syncthreads();

  if (job.grad) write_gradient<T, kOptions>(*scratch, held, job);
}
}  // namespace
