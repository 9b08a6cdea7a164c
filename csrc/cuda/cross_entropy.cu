// fastft::cross_entropy_rows on CUDA: which kernel a call needs, with how many threads, and whether
// rows are held.
#include "cross_entropy_args.h"
#include "cross_entropy_kernel.cuh"
#include "launch.h"

namespace {
// Bytes of shared memory of which this device has as many for one block, and for all blocks of an
// SM.
struct SharedMemory {
  int block = 0, processor = 0;
  explicit SharedMemory(int32_t device) {
    cudaDeviceGetAttribute(&block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaDeviceGetAttribute(&processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  }
  // Says whether there are `bytes` for two blocks of an SM, each with the KiB that the driver
  // takes.
  bool two_fit(int64_t bytes) const { return bytes <= block && 2 * (bytes + 1024) <= processor; }
};

template <class T, bool kOptions>
void launch(Job job, int64_t rows, int32_t device) {
  const int64_t vectors = job.classes / Row<T>::kSize;
  const int64_t held_bytes = sizeof(Scratch) + vectors * sizeof(uint4);
  const auto kernel = rows_kernel<T, kOptions>;
  const SharedMemory memory(device);
  // few rows in flight: they share the L2 cache
  int64_t bytes = sizeof(Scratch), most = kMaxThreads;
  if (job.grad && memory.two_fit(held_bytes)) {
    bytes = held_bytes, most = kMaxThreads / 2;
    job.held = true;
    // The limit is the kernel's and not a launch's: a thread that set it to what its own rows need
    // would take from another's launch what that needs. So it is always all that a block of this
    // device may have.
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, memory.block);
    FT_CHECK(error == cudaSuccess, "cross_entropy_rows: %d bytes of shared memory refused: %s",
             memory.block, cudaGetErrorString(error));
  }
  int threads = kWarp;
  while (threads < most && threads * 4 < vectors) threads *= 2;
  kernel<<<static_cast<unsigned>(rows), threads, bytes, fastft::current_stream(device)>>>(job);
  fastft::check_launch("cross_entropy_rows");
}

template <class T>
void launch_for(const Job& job, int64_t rows, int32_t device) {
  // class weights without smoothing, a z-loss and a scale cost the plain kernel nothing
  if (job.moments || job.smoothing > 0.0f || job.softcap > 0.0f)
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
  job.moments = args.entropy || args.upstream[2];
  job.smoothing = args.label_smoothing;
  job.z_loss = args.z_loss;
  job.scale = args.logit_scale;
  job.softcap = args.softcap;
  job.softcap_inverse = args.softcap > 0.0f ? 1.0f / args.softcap : 0.0f;
  return job;
}

void cross_entropy_rows(StableIValue* stack, uint64_t nargs, uint64_t) {
  FT_CHECK(nargs == 13, "cross_entropy_rows: 13 arguments expected, got %d",
           static_cast<int>(nargs));
  const fastft::CrossEntropyArgs args(stack, true);
  FT_CHECK(args.rows < (int64_t(1) << 31) && args.classes < (int64_t(1) << 29),
           "cross_entropy_rows: logits of %lld x %lld are too large",
           static_cast<long long>(args.rows), static_cast<long long>(args.classes));
  if (args.rows == 0) return;
  const Job job = read(args);
  const fastft::DeviceGuard guard(args.device_index);
  if (args.dtype == aoti_torch_dtype_float32())
    launch_for<float>(job, args.rows, args.device_index);
  else if (args.dtype == aoti_torch_dtype_bfloat16())
    launch_for<__nv_bfloat16>(job, args.rows, args.device_index);
  else
    launch_for<__half>(job, args.rows, args.device_index);
}

fastft::Kernel kernel_cross_entropy_rows("cross_entropy_rows", cross_entropy_rows);
}  // namespace
