// The functions that Python calls through ctypes after loading libfastft_cuda.so.
#include <cuda_runtime.h>

#include "shim.h"

namespace {
__global__ void probe() {}
}  // namespace

// 0 if this library's code runs on the device, else a CUDA error: no driver, one that is too old,
// no code for this chip.
FASTFT_EXPORT int fastft_cuda_probe(int device) {
  int current = 0;
  cudaError_t error = cudaGetDevice(&current);
  if (error == cudaSuccess) {
    cudaFuncAttributes attributes;
    error = cudaSetDevice(device);
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, probe);
    cudaSetDevice(current);
  }
  cudaGetLastError();  // leaves no error behind for torch to find
  return static_cast<int>(error);
}

FASTFT_EXPORT const char* fastft_cuda_error(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}
FASTFT_EXPORT int fastft_cuda_version() { return CUDART_VERSION; }
FASTFT_EXPORT const char* fastft_register() { return fastft::register_kernels("CUDA"); }
