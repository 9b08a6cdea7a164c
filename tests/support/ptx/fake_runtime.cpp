// The CUDA runtime and the device's part of libtorch, for the object files of
// fastft's CUDA library on a machine without a GPU. A launch that a GPU would
// accept goes to a function that Python has given, as does device memory that
// comes and goes; devices, streams, capture and limits are what Python says.
// Calls that wait for the device are counted.
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "shim.h"

namespace {
constexpr int kDevices = 4, kHost = -1;
constexpr int kCuda = 1, kCpu = 0; // c10::DeviceType
constexpr size_t kDefaultShared = 48 << 10;

typedef int (*OnLaunch)(const char *kernel, const unsigned *grid_and_block,
                        size_t shared, uint64_t stream, int device,
                        void **parameters);
typedef void (*OnMemory)(uint64_t begin, uint64_t bytes,
                         int device); // bytes 0: it goes

struct State {
  OnLaunch on_launch = nullptr;
  OnMemory on_memory = nullptr;
  int device = 0;
  int capturing = 0; // below 0: cudaStreamIsCapturing cannot tell
  int shared_of_block = 0, shared_of_processor = 0;
  int lowest_limit =
      0; // of dynamic shared memory that a kernel was ever given; 0 if none was
  uint64_t stream[kDevices] =
      {}; // the current one of each device, its number there
  cudaError_t last = cudaSuccess;
  std::map<uint64_t, std::pair<uint64_t, int>>
      places; // begin -> end, device of memory that is not of device 0
  std::map<const void *, std::string> names; // of kernels
  std::map<std::pair<const void *, int>, int>
      limits; // of dynamic shared memory, by kernel and device
  std::set<AtenTensorHandle> allocated;
  std::string waits; // names of the calls, each followed by a space
};

State &state() {
  static auto &only = *new State; // outlives the objects of the library
  return only;
}

cudaError_t failed(cudaError_t error) {
  if (error != cudaSuccess)
    state().last = error;
  return error;
}

cudaError_t waited(const char *call) {
  state().waits += std::string(call) + " ";
  return cudaSuccess;
}

uint64_t stream_of(int device) {
  return (uint64_t(device + 1) << 32) + state().stream[device] * 16;
}
int device_of(uint64_t stream) {
  return stream ? int(stream >> 32) - 1 : state().device;
}

template <class Function> Function torchs(const char *name, Function) {
  return reinterpret_cast<Function>(dlsym(RTLD_NEXT, name));
}

int place_of(AtenTensorHandle tensor) {
  const void *data = nullptr;
  torch_get_const_data_ptr(tensor, &data);
  const uint64_t address = reinterpret_cast<uint64_t>(data);
  auto after = state().places.upper_bound(address);
  if (after == state().places.begin())
    return 0;
  const auto &[end, device] = std::prev(after)->second;
  return address < end ? device : 0;
}

struct {
  dim3 grid, block;
  size_t shared;
  void *stream;
} configuration;
} // namespace

// -- what Python calls

FASTFT_EXPORT void fake_begin(OnLaunch on_launch, OnMemory on_memory,
                              int shared_of_block, int shared_of_processor) {
  State &now = state();
  now.on_launch = on_launch, now.on_memory = on_memory;
  now.shared_of_block = shared_of_block,
  now.shared_of_processor = shared_of_processor;
  now.device = 0, now.capturing = 0, now.lowest_limit = 0,
  now.last = cudaSuccess;
  std::fill_n(now.stream, kDevices, 0);
  now.places.clear(), now.limits.clear(), now.waits.clear();
}
FASTFT_EXPORT void fake_capturing(int capturing) {
  state().capturing = capturing;
}
FASTFT_EXPORT int fake_lowest_limit() { return state().lowest_limit; }
FASTFT_EXPORT void fake_stream(int device, uint64_t number) {
  state().stream[device] = number;
}
FASTFT_EXPORT void fake_place(uint64_t begin, uint64_t end, int device) {
  state().places[begin] = {end, device};
}
FASTFT_EXPORT void fake_unplace(uint64_t begin) { state().places.erase(begin); }
FASTFT_EXPORT const char *fake_waits() { return state().waits.c_str(); }
FASTFT_EXPORT int fake_register(const char *name, const char *key) {
  static TorchLibraryHandle library;
  int error =
      aoti_torch_library_init_impl(name, key, __FILE__, __LINE__, &library);
  for (fastft::Kernel *k = fastft::Kernel::first(); k && !error; k = k->next)
    error = torch_library_impl(library, k->name, k->function, fastft::kAbi);
  return error;
}

extern "C" {
// -- libtorch: where a tensor is, and memory of a device

AOTITorchError aoti_torch_get_device_type(AtenTensorHandle tensor,
                                          int32_t *type) {
  return *type = place_of(tensor) == kHost ? kCpu : kCuda, 0;
}
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle tensor,
                                           int32_t *index) {
  return *index = place_of(tensor), 0; // of the host -1, as torch's
}
AOTITorchError aoti_torch_create_device_guard(int32_t device,
                                              DeviceGuardHandle *guard) {
  *guard = reinterpret_cast<DeviceGuardHandle>(uint64_t(state().device) + 1);
  return cudaSetDevice(device) == cudaSuccess ? 0 : 1;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle guard) {
  state().device = int(reinterpret_cast<uint64_t>(guard)) - 1;
  return 0;
}
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                  void **stream) {
  if (device < 0 || device >= kDevices)
    return 1;
  return *stream = reinterpret_cast<void *>(stream_of(device)), 0;
}
AOTITorchError aoti_torch_empty_strided(int64_t dim, const int64_t *sizes,
                                        const int64_t *strides, int32_t dtype,
                                        int32_t type, int32_t device,
                                        AtenTensorHandle *tensor) {
  const auto empty =
      torchs("aoti_torch_empty_strided", &aoti_torch_empty_strided);
  if (const int error = empty(dim, sizes, strides, dtype, kCpu, 0, tensor))
    return error;
  if (type != kCuda)
    return 0;
  void *data = nullptr;
  torch_get_mutable_data_ptr(*tensor, &data);
  const uint64_t begin = reinterpret_cast<uint64_t>(data),
                 bytes = uint64_t(sizes[0]); // uint8 of one dimension
  state().allocated.insert(*tensor);
  if (device)
    state().places[begin] = {begin + bytes, device};
  if (state().on_memory)
    state().on_memory(begin, bytes, device);
  return 0;
}
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle tensor) {
  if (state().allocated.erase(tensor)) {
    void *data = nullptr;
    torch_get_mutable_data_ptr(tensor, &data);
    state().places.erase(reinterpret_cast<uint64_t>(data));
    if (state().on_memory)
      state().on_memory(reinterpret_cast<uint64_t>(data), 0, 0);
  }
  return torchs("aoti_torch_delete_tensor_object",
                &aoti_torch_delete_tensor_object)(tensor);
}

// -- launches

void **__cudaRegisterFatBinary(void *) {
  static void *handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void **) {}
void __cudaUnregisterFatBinary(void **) {}
void __cudaRegisterFunction(void **, const char *host, char *, const char *name,
                            int, uint3 *, uint3 *, dim3 *, dim3 *, int *) {
  state().names[host] = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared,
                                     void *stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared,
                                       void *stream) {
  *grid = configuration.grid, *block = configuration.block,
  *shared = configuration.shared;
  *static_cast<void **>(stream) = configuration.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *host) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void *>(host));
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block,
                             void **parameters, size_t shared,
                             cudaStream_t stream) {
  State &now = state();
  const auto name = now.names.find(kernel);
  if (name == now.names.end())
    return failed(cudaErrorInvalidDeviceFunction);
  const uint64_t handle = reinterpret_cast<uint64_t>(stream);
  if (device_of(handle) != now.device)
    return failed(cudaErrorInvalidResourceHandle);
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (grid.x < 1 || grid.x > 2147483647u || grid.y < 1 || grid.y > 65535 ||
      grid.z < 1 || grid.z > 65535 || threads < 1 || threads > 1024)
    return failed(cudaErrorInvalidConfiguration);
  const auto limit = now.limits.find({kernel, now.device});
  if (shared > (limit == now.limits.end() ? kDefaultShared
                                          : size_t(limit->second)) &&
      shared > kDefaultShared)
    return failed(cudaErrorInvalidValue);
  if (!now.on_launch)
    return failed(cudaErrorNoDevice);
  const unsigned shape[] = {grid.x, grid.y, grid.z, block.x, block.y, block.z};
  const int error = now.on_launch(name->second.c_str(), shape, shared, handle,
                                  now.device, parameters);
  return failed(error ? cudaErrorLaunchFailure : cudaSuccess);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block,
                               void **parameters, size_t shared,
                               cudaStream_t stream) {
  return cudaLaunchKernel(static_cast<const void *>(kernel), grid, block,
                          parameters, shared, stream);
}

// -- the rest of the runtime

cudaError_t cudaGetDevice(int *device) {
  return *device = state().device, cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices)
    return failed(cudaErrorInvalidDevice);
  return state().device = device, cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
  case cudaDevAttrMaxSharedMemoryPerBlock:
    return *value = int(kDefaultShared), cudaSuccess;
  case cudaDevAttrMaxSharedMemoryPerBlockOptin:
    return *value = state().shared_of_block, cudaSuccess;
  case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
    return *value = state().shared_of_processor, cudaSuccess;
  case cudaDevAttrMaxThreadsPerMultiProcessor:
    return *value = 2048, cudaSuccess;
  case cudaDevAttrMultiProcessorCount:
    return *value = 108, cudaSuccess;
  case cudaDevAttrReservedSharedMemoryPerBlock:
    return *value = 1024, cudaSuccess;
  default:
    return failed(
        cudaErrorInvalidValue); // say here what it is before a launcher asks
  }
}
cudaError_t cudaFuncSetAttribute(const void *kernel,
                                 cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize)
    return cudaSuccess; // wishes
  if (value < 0 || value > state().shared_of_block)
    return failed(cudaErrorInvalidValue);
  state().limits[{kernel, state().device}] = value;
  int &lowest = state().lowest_limit;
  lowest = lowest ? std::min(lowest, value) : value;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *attributes,
                                  const void *) {
  return memset(attributes, 0, sizeof *attributes), cudaSuccess;
}
cudaError_t cudaGetLastError() {
  return std::exchange(state().last, cudaSuccess);
}
cudaError_t cudaPeekAtLastError() { return state().last; }
const char *cudaGetErrorString(cudaError_t error) {
  switch (error) {
  case cudaSuccess:
    return "no error";
  case cudaErrorInvalidValue:
    return "invalid argument";
  case cudaErrorInvalidConfiguration:
    return "invalid configuration argument";
  case cudaErrorInvalidResourceHandle:
    return "invalid resource handle";
  case cudaErrorInvalidDevice:
    return "invalid device ordinal";
  case cudaErrorLaunchFailure:
    return "unspecified launch failure";
  default:
    return "an error of the fake runtime";
  }
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream,
                                  cudaStreamCaptureStatus *status) {
  if (state().capturing < 0)
    return failed(cudaErrorStreamCaptureImplicit);
  *status = state().capturing ? cudaStreamCaptureStatusActive
                              : cudaStreamCaptureStatusNone;
  return device_of(reinterpret_cast<uint64_t>(stream)) < kDevices
             ? cudaSuccess
             : failed(cudaErrorInvalidResourceHandle);
}

cudaError_t cudaDeviceSynchronize() { return waited("cudaDeviceSynchronize"); }
cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return waited("cudaStreamSynchronize");
}
cudaError_t cudaEventSynchronize(cudaEvent_t) {
  return waited("cudaEventSynchronize");
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes,
                       cudaMemcpyKind) {
  return memcpy(to, from, bytes), waited("cudaMemcpy");
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes,
                            cudaMemcpyKind, cudaStream_t) {
  return memcpy(to, from, bytes),
         waited("cudaMemcpyAsync"); // of pageable memory it waits
}
}
