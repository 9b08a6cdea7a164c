// fastft::scale_gradients_ on CUDA: one launch for up to 64 gradients, which travel as its
// parameters. Every block reads the scale and returns where it is 1: nothing else is read or
// written then, and no host has waited for it.
//
// A block has the 128 KiB between two multiples of that, counted from the last 16 bytes that begin
// at or before the gradient; so only the ends of a gradient can lie off 16 bytes, and these go
// element by element, a thread each.
#include "batches.cuh"
#include "launch.h"
#include "scale_gradients_args.h"
#include "vectors.cuh"

namespace {
constexpr int kThreads = 256, kTensors = 64, kVector = 16;
constexpr int kChunk = 128 << 10;
constexpr int kInFlight = 4;  // loads of a thread
enum Kind : int32_t { kFloat, kBfloat16, kHalf };

struct Batch : TensorBatch<kTensors> {
  char* data[kTensors];
  int64_t bytes[kTensors];
  Kind kind[kTensors];
  const float* scale;
};
static_assert(sizeof(Batch) <= 4096, "kernel parameters hold 4 KiB on every architecture");

// How far behind 16 bytes an address lies.
__host__ __device__ int lead(const char* address) {
  return int(reinterpret_cast<uintptr_t>(address) % kVector);
}

template <class T>
__device__ uint4 scaled(const uint4& bits, float scale) {
  float x[kVector / sizeof(T)];
  unpack<T>(bits, x);
#pragma unroll
  for (float& value : x) value *= scale;
  return pack<T>(x);
}

// The elements in the bytes from `begin` to `end`, fewer than there are threads.
template <class T>
__device__ void scale_ends(char* begin, char* end, float scale) {
  T* place = reinterpret_cast<T*>(begin) + threadIdx.x;
  if (reinterpret_cast<char*>(place) < end) put(place, widened(*place) * scale);
}

// The bytes from `begin` to `end` of a gradient; `from`, on 16 bytes, is where those of the block
// would begin.
template <class T>
__device__ void scale_chunk(char* from, char* begin, char* end, float scale) {
  char* up = begin == from ? from : from + kVector;
  up = up < end ? up : end;
  char* down = from + (end - from) / kVector * kVector;
  down = down > up ? down : up;
  scale_ends<T>(begin, up, scale);
  scale_ends<T>(down, end, scale);
  uint4* vectors = reinterpret_cast<uint4*>(up);
  const int count = int((down - up) / kVector);
  if (count == kChunk / kVector) {
    for (int i = threadIdx.x; i < kChunk / kVector; i += kInFlight * kThreads) {
      uint4 bits[kInFlight];
#pragma unroll
      for (int j = 0; j < kInFlight; j++) bits[j] = __ldcs(vectors + i + j * kThreads);
#pragma unroll
      for (int j = 0; j < kInFlight; j++)
        __stcs(vectors + i + j * kThreads, scaled<T>(bits[j], scale));
    }
  } else {
    for (int i = threadIdx.x; i < count; i += kThreads)
      __stcs(vectors + i, scaled<T>(__ldcs(vectors + i), scale));
  }
}

__global__ void __launch_bounds__(kThreads) scale_kernel(const __grid_constant__ Batch batch) {
  const float scale = *batch.scale;
  if (scale == 1.0f) return;
  const int tensor = batch.tensor_of_block();
  char* data = batch.data[tensor];
  char* from = data - lead(data) + int64_t(blockIdx.x - batch.first_block[tensor]) * kChunk;
  char* begin = data > from ? data : from;
  char* end = data + batch.bytes[tensor];
  end = end < from + kChunk ? end : from + kChunk;
  if (batch.kind[tensor] == kFloat)
    scale_chunk<float>(from, begin, end, scale);
  else if (batch.kind[tensor] == kBfloat16)
    scale_chunk<__nv_bfloat16>(from, begin, end, scale);
  else
    scale_chunk<__half>(from, begin, end, scale);
}

Kind kind_of(int32_t dtype) {
  if (dtype == aoti_torch_dtype_float32()) return kFloat;
  return dtype == aoti_torch_dtype_bfloat16() ? kBfloat16 : kHalf;
}

void scale_gradients(StableIValue* stack, uint64_t nargs, uint64_t) {
  FT_CHECK(nargs == 2, "scale_gradients_: 2 arguments expected, got %d", int(nargs));
  const fastft::ScaleGradientsArgs args(stack);
  const fastft::DeviceGuard guard(args.device_index);
  const cudaStream_t stream = fastft::current_stream(args.device_index);
  Batch empty{};
  empty.scale = args.scale;
  Batches batches("scale_gradients_", empty, [stream](const Batch& batch, unsigned blocks) {
    scale_kernel<<<blocks, kThreads, 0, stream>>>(batch);
  });
  for (const fastft::ScaleGradientsArgs::Gradient& gradient : args.gradients) {
    if (gradient.numel == 0) continue;
    const Kind kind = kind_of(gradient.dtype);
    char* data = static_cast<char*>(gradient.data);
    const int64_t bytes = gradient.numel * (kind == kFloat ? 4 : 2);
    const int i = batches.add((lead(data) + bytes + kChunk - 1) / kChunk);
    batches.batch.data[i] = data;
    batches.batch.bytes[i] = bytes;
    batches.batch.kind[i] = kind;
  }
  batches.flush();
  fastft::check_launch("scale_gradients_");
}

fastft::Kernel kernel_scale_gradients("scale_gradients_", scale_gradients);
}  // namespace
