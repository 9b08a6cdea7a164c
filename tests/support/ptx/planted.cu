// A kernel with a fault to choose, and a launch with a wish to choose, for the tests of the machine that runs PTX.
#include <cuda_runtime.h>

#include "launch.h"

namespace {
// Writes the threads' numbers backwards by way of shared memory.
__global__ void __launch_bounds__(256) reverse_kernel(int* out, bool barrier) {
  extern __shared__ int numbers[];
  numbers[threadIdx.x] = int(threadIdx.x);
  if (barrier) __syncthreads();
  out[threadIdx.x] = numbers[blockDim.x - 1 - threadIdx.x];
}
}  // namespace

// Returns the runtime's error. `allowed`: dynamic shared memory that the kernel is allowed first, 0 for the default.
FASTFT_EXPORT int planted_launch(int* out, bool barrier, int threads, int shared, int allowed, int device,
                                 int device_of_stream) {
  const fastft::DeviceGuard guard(device);
  if (allowed) {
    const cudaError_t error = cudaFuncSetAttribute(reverse_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, allowed);
    if (error != cudaSuccess) return int(error);
  }
  reverse_kernel<<<1, threads, shared, fastft::current_stream(device_of_stream)>>>(out, barrier);
  return int(cudaGetLastError());
}

FASTFT_EXPORT void planted_waits(int* out) {
  int copy = 0;
  cudaMemcpy(&copy, out, sizeof copy, cudaMemcpyDeviceToHost);
  cudaStreamSynchronize(fastft::current_stream(0));
  cudaStreamSynchronize(fastft::current_stream(0));
}
