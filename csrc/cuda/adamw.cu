// fastft::adamw_ on CUDA. The tables of up to 64 tensors of any size travel as the kernel's parameters, so a step needs
// one launch for each 64 tensors, no device memory of its own and no synchronisation. Memory-bound: 28 bytes per
// element for fp32 and 26 for bf16, in 16-byte (bf16: 8-byte) loads and stores.
#include <cstring>

#include "adamw_args.h"
#include "launch.h"

namespace {
constexpr int kThreads = 256, kVector = 4, kRounds = 4, kChunk = kThreads * kVector * kRounds;
constexpr int kTensors = 64, kRows = 8;

struct Batch {
  void* param[kTensors];
  const void* grad[kTensors];
  float* exp_avg[kTensors];
  float* exp_avg_sq[kTensors];
  int16_t* remainder[kTensors];
  int64_t numel[kTensors];
  uint32_t first_block[kTensors];
  AdamwHyper hyper[kRows];
  uint8_t row[kTensors];
  int32_t tensors;
};
static_assert(sizeof(Batch) <= 4096, "kernel parameters hold 4 KiB on every architecture");

struct Fp32 {
  float* param;
  const float* grad;
  __device__ Fp32(const Batch& batch, int t, int64_t base)
      : param(static_cast<float*>(batch.param[t]) + base), grad(static_cast<const float*>(batch.grad[t]) + base) {}
  __device__ bool aligned() const { return ((uintptr_t(param) | uintptr_t(grad)) & 15) == 0; }
  __device__ void one(int i, float* m, float* v, const AdamwHyper& h) const {
    param[i] = adamw_element(param[i], grad[i], m, v, h);
  }
  __device__ void four(int i, float4& m, float4& v, const AdamwHyper& h) const {
    float4 p = reinterpret_cast<const float4*>(param)[i];
    const float4 g = reinterpret_cast<const float4*>(grad)[i];
    p.x = adamw_element(p.x, g.x, &m.x, &v.x, h);
    p.y = adamw_element(p.y, g.y, &m.y, &v.y, h);
    p.z = adamw_element(p.z, g.z, &m.z, &v.z, h);
    p.w = adamw_element(p.w, g.w, &m.w, &v.w, h);
    reinterpret_cast<float4*>(param)[i] = p;
  }
};

struct Bf16 {
  uint16_t* param;
  const uint16_t* grad;
  int16_t* remainder;
  __device__ Bf16(const Batch& batch, int t, int64_t base)
      : param(static_cast<uint16_t*>(batch.param[t]) + base),
        grad(static_cast<const uint16_t*>(batch.grad[t]) + base),
        remainder(batch.remainder[t] + base) {}
  __device__ bool aligned() const { return ((uintptr_t(param) | uintptr_t(grad) | uintptr_t(remainder)) & 7) == 0; }
  __device__ static void update(uint16_t& p, int16_t& r, uint16_t g, float* m, float* v, const AdamwHyper& h) {
    master_split(adamw_element(master_join(p, r), bf16_to_float(g), m, v, h), &p, &r);
  }
  __device__ void one(int i, float* m, float* v, const AdamwHyper& h) const {
    uint16_t p = param[i];
    int16_t r = remainder[i];
    update(p, r, grad[i], m, v, h);
    param[i] = p;
    remainder[i] = r;
  }
  __device__ void four(int i, float4& m, float4& v, const AdamwHyper& h) const {
    ushort4 p = reinterpret_cast<const ushort4*>(param)[i];
    short4 r = reinterpret_cast<const short4*>(remainder)[i];
    const ushort4 g = reinterpret_cast<const ushort4*>(grad)[i];
    update(p.x, r.x, g.x, &m.x, &v.x, h);
    update(p.y, r.y, g.y, &m.y, &v.y, h);
    update(p.z, r.z, g.z, &m.z, &v.z, h);
    update(p.w, r.w, g.w, &m.w, &v.w, h);
    reinterpret_cast<ushort4*>(param)[i] = p;
    reinterpret_cast<short4*>(remainder)[i] = r;
  }
};

// One block's chunk of `n` elements of one tensor.
template <class Storage>
__device__ void update_chunk(const Storage& storage, float* exp_avg, float* exp_avg_sq, int n, const AdamwHyper& h) {
  int done = 0;
  if (storage.aligned() && ((uintptr_t(exp_avg) | uintptr_t(exp_avg_sq)) & 15) == 0) {
    for (int i = threadIdx.x; i < n / kVector; i += kThreads) {
      float4 m = reinterpret_cast<const float4*>(exp_avg)[i], v = reinterpret_cast<const float4*>(exp_avg_sq)[i];
      storage.four(i, m, v, h);
      reinterpret_cast<float4*>(exp_avg)[i] = m;
      reinterpret_cast<float4*>(exp_avg_sq)[i] = v;
    }
    done = n / kVector * kVector;
  }
  for (int i = done + threadIdx.x; i < n; i += kThreads) storage.one(i, exp_avg + i, exp_avg_sq + i, h);
}

__global__ void __launch_bounds__(kThreads) adamw_kernel(const __grid_constant__ Batch batch) {
  int t = 0;
  for (int width = kTensors / 2; width > 0; width /= 2)  // the last tensor whose first block is not after this one
    if (t + width < batch.tensors && batch.first_block[t + width] <= blockIdx.x) t += width;
  const int64_t base = int64_t(blockIdx.x - batch.first_block[t]) * kChunk;
  const int64_t left = batch.numel[t] - base;
  const int n = left < kChunk ? int(left) : kChunk;
  const AdamwHyper h = batch.hyper[batch.row[t]];
  float *exp_avg = batch.exp_avg[t] + base, *exp_avg_sq = batch.exp_avg_sq[t] + base;
  if (batch.remainder[t])
    update_chunk(Bf16(batch, t, base), exp_avg, exp_avg_sq, n, h);
  else
    update_chunk(Fp32(batch, t, base), exp_avg, exp_avg_sq, n, h);
}

class Launcher {
 public:
  explicit Launcher(cudaStream_t stream) : stream_(stream) {}

  void add(const fastft::AdamwTensor& t) {
    if (t.numel == 0) return;
    const int64_t blocks = (t.numel + kChunk - 1) / kChunk;
    FT_CHECK(blocks < (int64_t(1) << 31), "adamw_: a tensor of %lld elements is too large",
             static_cast<long long>(t.numel));
    const bool new_row = t.hyper != last_row_;
    if (batch_.tensors == kTensors || (new_row && rows_ == kRows) || blocks_ + blocks >= (int64_t(1) << 31)) launch();
    if (t.hyper != last_row_) {
      batch_.hyper[rows_++] = *t.hyper;
      last_row_ = t.hyper;
    }
    const int i = batch_.tensors++;
    batch_.param[i] = t.param;
    batch_.grad[i] = t.grad;
    batch_.exp_avg[i] = t.exp_avg;
    batch_.exp_avg_sq[i] = t.exp_avg_sq;
    batch_.remainder[i] = t.remainder;
    batch_.numel[i] = t.numel;
    batch_.first_block[i] = static_cast<uint32_t>(blocks_);
    batch_.row[i] = static_cast<uint8_t>(rows_ - 1);
    blocks_ += blocks;
  }

  void launch() {
    if (blocks_ > 0) {
      FASTFT_LAUNCH(adamw_kernel, static_cast<unsigned>(blocks_), kThreads, 0, stream_, batch_);
      fastft::check_launch("adamw_");
    }
    batch_.tensors = rows_ = 0;
    blocks_ = 0;
    last_row_ = nullptr;
  }

 private:
  cudaStream_t stream_;
  Batch batch_{};
  int rows_ = 0;
  int64_t blocks_ = 0;
  const AdamwHyper* last_row_ = nullptr;
};

void adamw(StableIValue* stack, uint64_t nargs, uint64_t) {
  FT_CHECK(nargs == 7, "adamw_: 7 arguments expected, got %d", int(nargs));
  const fastft::AdamwArgs args(stack);
  if (args.tensors.empty()) return;
  const fastft::DeviceGuard guard(args.device_index);
  Launcher launcher(fastft::current_stream(args.device_index));
  for (const fastft::AdamwTensor& tensor : args.tensors) launcher.add(tensor);
  launcher.launch();
}

fastft::Kernel kernel_adamw("adamw_", adamw);
}  // namespace
