// Launchers' needs of the runtime and of torch: the device, its stream and memory, and whether a
// launch failed.
#pragma once
#include <cuda_runtime.h>

#include "shim.h"

namespace fastft {
struct DeviceGuard {
  DeviceGuardHandle handle = nullptr;
  explicit DeviceGuard(int32_t device) { FT_CALL(aoti_torch_create_device_guard(device, &handle)); }
  ~DeviceGuard() { aoti_torch_delete_device_guard(handle); }
};

inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  FT_CALL(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Memory of torch's allocator, aligned for every type; may be freed while kernels of the current
// stream still use it.
inline Tensor device_memory(int64_t bytes, int32_t device) {
  return new_tensor(bytes, aoti_torch_dtype_uint8(), aoti_torch_device_type_cuda(), device);
}

inline void check_launch(const char* name) {
  const cudaError_t error = cudaGetLastError();
  FT_CHECK(error == cudaSuccess, "%s: launch failed: %s", name, cudaGetErrorString(error));
}
}  // namespace fastft
