// The norm of gradients on CUDA: sums of squares of fixed chunks, one block each, then one block
// that adds them up, in an order that depends on sizes alone. 190 gradients of any size for
// each launch, which travel as its parameters; loads are of 16 bytes where a gradient lies on 16
// bytes.
//
// Double precision runs at 1/64 of the rate of float32 on sm_86, 89 and 120, so a thread adds its
// 64 squares in float32, with what each rounding loses beside the sum: the two together are off by
// less than 2e-11 of the sum. Where squares leave the range of float32, the thread does its part
// again in double, whose range no square of a float32 leaves: the sum is finite if and only if
// every gradient is.
#include "batches.cuh"
#include "grad_norm_args.h"
#include "launch.h"
#include "vectors.cuh"

namespace {
constexpr int kThreads = 256, kTotalThreads = 1024, kTensors = 190;
constexpr int kChunk = int(fastft::kNormChunk);
constexpr int kInFlight = 4;  // loads of a thread
// The loss of squares below 2^-126 is nothing beside a sum of at least 2^-70.
constexpr float kLeast = 8.470329473e-22f;

struct Batch : TensorBatch<kTensors> {
  const void* data[kTensors];
  int64_t numel[kTensors];
  bool bf16[kTensors];
  double* sums;  // one for each block of this launch
};
static_assert(sizeof(Batch) <= 4096, "kernel parameters hold 4 KiB on every architecture");

// A sum of squares, and what it has lost by rounding.
struct Squares {
  float sum = 0.0f, lost = 0.0f;

  // Adds the square of x, which is the value of a T.
  template <class T>
  __device__ void add(float x) {
    const float square = __fmul_rn(x, x);
    const float next = __fadd_rn(sum, square), added = __fsub_rn(next, sum);
    lost = __fadd_rn(lost,
                     __fadd_rn(__fsub_rn(sum, __fsub_rn(next, added)), __fsub_rn(square, added)));
    if (sizeof(T) == 4)  // the square of a bfloat16 is exact
      lost = __fadd_rn(lost, __fmaf_rn(x, x, -square));
    sum = next;
  }
};

template <class T>
__device__ void add_vector(Squares& squares, const uint4& bits) {
  // word by word: unpacked all at once, they cost sm_90 17 instructions more
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (const uint32_t word : words) {
    if constexpr (sizeof(T) == 4) {
      squares.add<T>(bits_float(word));
    } else {
      const float2 pair = unpack<T>(word);
      squares.add<T>(pair.x), squares.add<T>(pair.y);
    }
  }
}

// The squares of a thread's elements, neighbours of which there are kSize: the same ones in the
// same order wherever a gradient lies.
template <class T>
__device__ double add_squares(const T* grad, int n) {
  constexpr int kSize = 16 / sizeof(T), kStep = kThreads * kSize;
  const int first = threadIdx.x * kSize;
  Squares squares;
  if (n == kChunk && (reinterpret_cast<uintptr_t>(grad) & 15) == 0) {
    for (int k = first; k < kChunk; k += kInFlight * kStep) {
      uint4 bits[kInFlight];
#pragma unroll
      for (int j = 0; j < kInFlight; j++)
        bits[j] = *reinterpret_cast<const uint4*>(grad + k + j * kStep);
#pragma unroll
      for (int j = 0; j < kInFlight; j++) add_vector<T>(squares, bits[j]);
    }
  } else {
    for (int k = first; k < n; k += kStep)
      for (int i = k; i < n && i < k + kSize; i++) squares.add<T>(widened(grad[i]));
  }
  if (squares.sum >= kLeast && squares.sum < INFINITY) return double(squares.sum) + squares.lost;
  double sum = 0.0;
  for (int k = first; k < n; k += kStep)
    for (int i = k; i < n && i < k + kSize; i++) sum += double(widened(grad[i])) * widened(grad[i]);
  return sum;
}

// The sum over the block's threads, for its first thread.
__device__ double sum_of_block(double sum) {
  extern __shared__ __align__(16) unsigned char shared[];
  double* sums = reinterpret_cast<double*>(shared);
  sums[threadIdx.x] = sum;
  for (int width = blockDim.x / 2; width > 0; width /= 2) {
    __syncthreads();
    if (threadIdx.x < width) sums[threadIdx.x] += sums[threadIdx.x + width];
  }
  return sums[0];
}

__global__ void __launch_bounds__(kThreads) squares_kernel(const __grid_constant__ Batch batch) {
  const int tensor = batch.tensor_of_block();
  const int64_t chunk = int64_t(blockIdx.x - batch.first_block[tensor]) * kChunk;
  const int64_t left = batch.numel[tensor] - chunk;
  const int n = int(left < kChunk ? left : kChunk);
  double sum = batch.bf16[tensor]
                   ? add_squares(static_cast<const uint16_t*>(batch.data[tensor]) + chunk, n)
                   : add_squares(static_cast<const float*>(batch.data[tensor]) + chunk, n);
  sum = sum_of_block(sum);
  if (threadIdx.x == 0) batch.sums[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kTotalThreads)
    total_kernel(const double* sums, int64_t count, double* total) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += kTotalThreads) sum += sums[i];
  sum = sum_of_block(sum);
  if (threadIdx.x == 0) *total = sum;
}

// Writes the sum of the squares of each chunk.
void sum_chunks(const fastft::GradNormArgs& args, double* sums, const char* operation,
                cudaStream_t stream) {
  Batch empty{};
  empty.sums = sums;
  Batches batches(operation, empty, [stream](Batch& batch, unsigned blocks) {
    squares_kernel<<<blocks, kThreads, kThreads * sizeof(double), stream>>>(batch);
    batch.sums += blocks;
  });
  for (const auto& [data, numel, bf16] : args.gradients) {
    if (numel == 0) continue;
    const int i = batches.add(fastft::norm_chunks(numel));
    batches.batch.data[i] = data;
    batches.batch.numel[i] = numel;
    batches.batch.bf16[i] = bf16;
  }
  batches.flush();
}

void add_up(const double* sums, int64_t count, double* total, cudaStream_t stream) {
  total_kernel<<<1, kTotalThreads, kTotalThreads * sizeof(double), stream>>>(sums, count, total);
}

void grad_norm_squared(StableIValue* stack, uint64_t nargs, uint64_t) {
  FT_CHECK(nargs == 2, "grad_norm_squared_: 2 arguments expected, got %d", int(nargs));
  const fastft::GradNormArgs args(stack, "grad_norm_squared_", "total");
  args.result.check_size(1, "grad_norm_squared_", "total");
  const int32_t device = args.result.device_index;
  const fastft::DeviceGuard guard(device);
  const cudaStream_t stream = fastft::current_stream(device);
  const int64_t bytes = (args.chunks + 1) * int64_t(sizeof(double));
  const fastft::Tensor memory = fastft::device_memory(bytes, device);
  double* sums = static_cast<double*>(memory.mutable_data());
  sum_chunks(args, sums, "grad_norm_squared_", stream);
  add_up(sums, args.chunks, args.result.writable(), stream);
  fastft::check_launch("grad_norm_squared_");
}

void grad_square_sums(StableIValue* stack, uint64_t nargs, uint64_t) {
  FT_CHECK(nargs == 2, "grad_square_sums_: 2 arguments expected, got %d", int(nargs));
  const fastft::GradNormArgs args(stack, "grad_square_sums_", "sums");
  args.result.check_size(args.chunks, "grad_square_sums_", "sums");
  const fastft::DeviceGuard guard(args.result.device_index);
  sum_chunks(args, args.result.writable(), "grad_square_sums_",
             fastft::current_stream(args.result.device_index));
  fastft::check_launch("grad_square_sums_");
}

void grad_norm_total(StableIValue* stack, uint64_t nargs, uint64_t) {
  FT_CHECK(nargs == 2, "grad_norm_total_: 2 arguments expected, got %d", int(nargs));
  fastft::Tensor tensors[] = {fastft::Tensor(stack[0]), fastft::Tensor(stack[1])};
  const fastft::Doubles total(std::move(tensors[0]), "grad_norm_total_", "total");
  const fastft::Doubles sums(std::move(tensors[1]), "grad_norm_total_", "sums");
  total.check_size(1, "grad_norm_total_", "total");
  FT_CHECK(sums.device_index == total.device_index,
           "grad_norm_total_: sums are not on the total's device");
  const fastft::DeviceGuard guard(total.device_index);
  add_up(sums.data(), sums.size, total.writable(), fastft::current_stream(total.device_index));
  fastft::check_launch("grad_norm_total_");
}

fastft::Kernel kernel_grad_norm("grad_norm_squared_", grad_norm_squared);
fastft::Kernel kernel_square_sums("grad_square_sums_", grad_square_sums);
fastft::Kernel kernel_norm_total("grad_norm_total_", grad_norm_total);
}  // namespace
