// The entry points of libtorch's C shim that fastft uses, declared here so that building needs no
// torch. All of them exist since libtorch 2.10 and carry its two-year promise. tests/test_native.py
// compiles this file together with torch's own headers: a declaration that differs is a compile
// error.
#pragma once
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

struct TorchLibraryOpaque;
using TorchLibraryHandle = TorchLibraryOpaque*;
struct AtenTensorOpaque;
using AtenTensorHandle = AtenTensorOpaque*;
struct StableListOpaque;
using StableListHandle = StableListOpaque*;
struct DeviceGuardOpaque;
using DeviceGuardHandle = DeviceGuardOpaque*;
using StableIValue = uint64_t;
using AOTITorchError = int32_t;
typedef void (*ParallelFunc)(int64_t begin, int64_t end, void* context);

extern "C" {
AOTITorchError aoti_torch_library_init_impl(const char*, const char*, const char*, uint32_t,
                                            TorchLibraryHandle*);
AOTITorchError torch_library_impl(TorchLibraryHandle, const char*,
                                  void (*)(StableIValue*, uint64_t, uint64_t), uint64_t);
uint64_t aoti_torch_abi_version();
AOTITorchError torch_list_size(StableListHandle, size_t*);
AOTITorchError torch_list_get_item(StableListHandle, size_t, StableIValue*);
AOTITorchError torch_delete_list(StableListHandle);
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle);
AOTITorchError torch_get_mutable_data_ptr(AtenTensorHandle, void**);
AOTITorchError torch_get_const_data_ptr(AtenTensorHandle, const void**);
AOTITorchError aoti_torch_get_numel(AtenTensorHandle, int64_t*);
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle, int32_t*);
AOTITorchError aoti_torch_get_dim(AtenTensorHandle, int64_t*);
AOTITorchError aoti_torch_get_size(AtenTensorHandle, int64_t, int64_t*);
AOTITorchError aoti_torch_get_stride(AtenTensorHandle, int64_t, int64_t*);
AOTITorchError aoti_torch_is_contiguous(AtenTensorHandle, bool*);
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle, int32_t*);
AOTITorchError aoti_torch_get_device_type(AtenTensorHandle, int32_t*);
AOTITorchError aoti_torch_empty_strided(int64_t, const int64_t*, const int64_t*, int32_t, int32_t,
                                        int32_t, AtenTensorHandle*);
int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_device_type_cuda();
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_float64();
int32_t aoti_torch_dtype_float16();
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_dtype_int8();
int32_t aoti_torch_dtype_uint8();
int32_t aoti_torch_dtype_int16();
int32_t aoti_torch_dtype_int32();
int32_t aoti_torch_dtype_int64();
int32_t aoti_torch_dtype_bool();
AOTITorchError torch_parallel_for(int64_t, int64_t, int64_t, ParallelFunc, void*);
AOTITorchError torch_get_num_threads(uint32_t*);
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle*);
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle);
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
}

#ifndef FASTFT_SHIM_DECLARATIONS_ONLY
#define FASTFT_EXPORT extern "C" __attribute__((visibility("default")))
#define FT_CHECK(condition, ...)                                                \
  do {                                                                          \
    if (__builtin_expect(!(condition), 0)) fastft::fail(__LINE__, __VA_ARGS__); \
  } while (0)
#define FT_CALL(call) FT_CHECK((call) == 0, "%s", "libtorch call failed: " #call)

namespace fastft {
// The ABI which these declarations were written against, handed to libtorch with every kernel:
// 2.10.
constexpr uint64_t kAbi = (2ULL << 56) | (10ULL << 48);

// printf and not iostream: no symbol newer than GLIBCXX_3.4.21, so that old distributions load the
// wheel
[[noreturn]] __attribute__((noinline, cold, format(printf, 2, 3))) inline void fail(
    int line, const char* format, ...) {
  char message[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  throw std::runtime_error(std::string("fastft: ") + message + " (line " + std::to_string(line) +
                           ")");
}

struct Tensor {  // owns its handle
  AtenTensorHandle handle = nullptr;
  explicit Tensor(StableIValue value) : handle(reinterpret_cast<AtenTensorHandle>(value)) {}
  Tensor(Tensor&& other) noexcept : handle(std::exchange(other.handle, nullptr)) {}
  Tensor(const Tensor&) = delete;
  ~Tensor() {
    if (handle) aoti_torch_delete_tensor_object(handle);
  }
  void* mutable_data() const { return get<void*>(torch_get_mutable_data_ptr); }
  const void* data() const { return get<const void*>(torch_get_const_data_ptr); }
  int64_t numel() const { return get<int64_t>(aoti_torch_get_numel); }
  int64_t dim() const { return get<int64_t>(aoti_torch_get_dim); }
  int32_t dtype() const { return get<int32_t>(aoti_torch_get_dtype); }
  bool contiguous() const { return get<bool>(aoti_torch_is_contiguous); }
  int32_t device_index() const { return get<int32_t>(aoti_torch_get_device_index); }
  int32_t device_type() const { return get<int32_t>(aoti_torch_get_device_type); }
  bool on_cpu() const { return device_type() == aoti_torch_device_type_cpu(); }
  bool is_beside(const Tensor& other) const {
    return device_type() == other.device_type() && device_index() == other.device_index();
  }
  int64_t size(int64_t d) const {
    int64_t n;
    FT_CALL(aoti_torch_get_size(handle, d, &n));
    return n;
  }
  int64_t stride(int64_t d) const {
    int64_t n;
    FT_CALL(aoti_torch_get_stride(handle, d, &n));
    return n;
  }

 private:
  template <class T>
  T get(AOTITorchError (*getter)(AtenTensorHandle, T*)) const {
    T value;
    FT_CALL(getter(handle, &value));
    return value;
  }
};

// A new tensor of one dimension, whose memory is torch's allocator's and holds anything.
inline Tensor new_tensor(int64_t count, int32_t dtype, int32_t device_type, int32_t device) {
  const int64_t stride = 1;
  AtenTensorHandle handle;
  FT_CALL(aoti_torch_empty_strided(1, &count, &stride, dtype, device_type, device, &handle));
  return Tensor(reinterpret_cast<StableIValue>(handle));
}

// Owns its tensors. A list of torch's has one handle of each and frees none: whoever reads it has
// to, so that all are read once, here, and none is left behind by a call that is refused.
class TensorList {
  std::vector<Tensor> tensors_;

 public:
  size_t size = 0;
  explicit TensorList(StableIValue value) {
    const std::unique_ptr<StableListOpaque, AOTITorchError (*)(StableListHandle)> list(
        reinterpret_cast<StableListHandle>(value), torch_delete_list);
    FT_CALL(torch_list_size(list.get(), &size));
    tensors_.reserve(size);
    for (size_t i = 0; i < size; i++) {
      StableIValue tensor;
      FT_CALL(torch_list_get_item(list.get(), i, &tensor));
      tensors_.emplace_back(tensor);
    }
  }
  const Tensor& operator[](size_t i) const { return tensors_[i]; }
  // Gives a tensor away, from any thread.
  Tensor take(size_t i) { return std::move(tensors_[i]); }
};

inline double as_double(StableIValue value) {
  double d;
  std::memcpy(&d, &value, sizeof d);
  return d;
}
inline int64_t as_int(StableIValue value) { return static_cast<int64_t>(value); }

// Runs body(begin, end) over [0, n) on torch's own thread pool, in pieces of at least `grain`.
template <class Body>
void parallel_for(int64_t n, int64_t grain, Body&& body) {
  auto call = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<Body*>(context))(begin, end);
  };
  if (n > 0)
    FT_CALL(
        torch_parallel_for(0, n, grain, call, const_cast<void*>(static_cast<const void*>(&body))));
}

// An operator's kernel, registered by a static object in the file which holds it; schemas are
// defined in Python. A kernel receives its arguments as a stack of `nargs` values, takes ownership
// of each, and writes its results over them.
struct Kernel {
  const char* name;
  void (*function)(StableIValue* stack, uint64_t nargs, uint64_t nreturns);
  Kernel* next;
  Kernel(const char* name, void (*function)(StableIValue*, uint64_t, uint64_t))
      : name(name), function(function), next(std::exchange(first(), this)) {}
  static Kernel*& first() {
    static Kernel* kernel = nullptr;
    return kernel;
  }
};

// Gives all kernels of this library to torch under one dispatch key. Returns nullptr or what
// failed; never throws.
inline const char* register_kernels(const char* key) {
  // kept for the life of the process: deleting it would unregister
  static TorchLibraryHandle library = nullptr;
  if (library) return nullptr;
  if (aoti_torch_abi_version() < kAbi) return "libtorch is older than 2.10";
  if (aoti_torch_library_init_impl("fastft", key, "shim.h", __LINE__, &library))
    return "library_init_impl failed";
  for (Kernel* k = Kernel::first(); k; k = k->next)
    if (torch_library_impl(library, k->name, k->function, kAbi)) return k->name;
  return nullptr;
}
}  // namespace fastft
#endif
