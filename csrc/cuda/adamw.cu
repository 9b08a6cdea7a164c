// fastft::adamw_ on CUDA. The tables of up to 48 tensors of any size travel as the kernel's parameters, so a step needs
// one launch for each 48 tensors, no device memory of its own and no synchronisation. Memory-bound: 28 bytes per
// element for fp32 and 26 for bf16 with exact rounding, in 16-byte (bf16: 8-byte) loads and stores. The other ways of
// keeping values take a plainer path: eight neighbouring elements for each thread, which share their random bits.
#include <cstring>

#include "adamw_args.h"
#include "launch.h"
#include "philox.h"

namespace {
constexpr int kThreads = 256, kVector = 4, kRounds = 4, kChunk = kThreads * kVector * kRounds;
constexpr int kTensors = 48, kRows = 8;

struct Batch {
  void* param[kTensors];
  const void* grad[kTensors];
  void* exp_avg[kTensors];
  void* exp_avg_sq[kTensors];
  void* max_exp_avg_sq[kTensors];
  void* residue[kTensors];
  int64_t numel[kTensors];
  int64_t first[kTensors];
  uint32_t first_block[kTensors];
  AdamwHyper hyper[kRows];
  uint8_t row[kTensors];
  uint8_t rounding[kTensors];
  bool narrow_moments[kTensors];
  const float* grad_factor;
  uint64_t seed;
  int32_t tensors;
};
static_assert(sizeof(Batch) <= 4096, "kernel parameters hold 4 KiB on every architecture");

struct Fp32 {
  float* param;
  const float* grad;
  __device__ Fp32(const Batch& batch, int t, int64_t base)
      : param(static_cast<float*>(batch.param[t]) + base), grad(static_cast<const float*>(batch.grad[t]) + base) {}
  __device__ bool aligned() const { return ((uintptr_t(param) | uintptr_t(grad)) & 15) == 0; }
  __device__ void one(int i, float* m, float* v, float factor, const AdamwHyper& h) const {
    param[i] = adamw_element(param[i], grad[i], factor, m, v, nullptr, h);
  }
  __device__ void four(int i, float4& m, float4& v, float factor, const AdamwHyper& h) const {
    float4 p = reinterpret_cast<const float4*>(param)[i];
    const float4 g = reinterpret_cast<const float4*>(grad)[i];
    p.x = adamw_element(p.x, g.x, factor, &m.x, &v.x, nullptr, h);
    p.y = adamw_element(p.y, g.y, factor, &m.y, &v.y, nullptr, h);
    p.z = adamw_element(p.z, g.z, factor, &m.z, &v.z, nullptr, h);
    p.w = adamw_element(p.w, g.w, factor, &m.w, &v.w, nullptr, h);
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
        remainder(static_cast<int16_t*>(batch.residue[t]) + base) {}
  __device__ bool aligned() const { return ((uintptr_t(param) | uintptr_t(grad) | uintptr_t(remainder)) & 7) == 0; }
  __device__ static void update(uint16_t& p, int16_t& r, uint16_t g, float* m, float* v, float factor,
                                const AdamwHyper& h) {
    master_split(adamw_element(master_join(p, r), bf16_to_float(g), factor, m, v, nullptr, h), &p, &r);
  }
  __device__ void one(int i, float* m, float* v, float factor, const AdamwHyper& h) const {
    uint16_t p = param[i];
    int16_t r = remainder[i];
    update(p, r, grad[i], m, v, factor, h);
    param[i] = p;
    remainder[i] = r;
  }
  __device__ void four(int i, float4& m, float4& v, float factor, const AdamwHyper& h) const {
    ushort4 p = reinterpret_cast<const ushort4*>(param)[i];
    short4 r = reinterpret_cast<const short4*>(remainder)[i];
    const ushort4 g = reinterpret_cast<const ushort4*>(grad)[i];
    update(p.x, r.x, g.x, &m.x, &v.x, factor, h);
    update(p.y, r.y, g.y, &m.y, &v.y, factor, h);
    update(p.z, r.z, g.z, &m.z, &v.z, factor, h);
    update(p.w, r.w, g.w, &m.w, &v.w, factor, h);
    reinterpret_cast<ushort4*>(param)[i] = p;
    reinterpret_cast<short4*>(remainder)[i] = r;
  }
};

// One block's chunk of `n` elements of one tensor.
template <class Storage>
__device__ void update_chunk(const Storage& storage, float* exp_avg, float* exp_avg_sq, int n, float factor,
                             const AdamwHyper& h) {
  int done = 0;
  if (storage.aligned() && ((uintptr_t(exp_avg) | uintptr_t(exp_avg_sq)) & 15) == 0) {
    for (int i = threadIdx.x; i < n / kVector; i += kThreads) {
      float4 m = reinterpret_cast<const float4*>(exp_avg)[i], v = reinterpret_cast<const float4*>(exp_avg_sq)[i];
      storage.four(i, m, v, factor, h);
      reinterpret_cast<float4*>(exp_avg)[i] = m;
      reinterpret_cast<float4*>(exp_avg_sq)[i] = v;
    }
    done = n / kVector * kVector;
  }
  for (int i = done + threadIdx.x; i < n; i += kThreads) storage.one(i, exp_avg + i, exp_avg_sq + i, factor, h);
}

struct Moment {  // fp32, or bf16 rounded stochastically
  void* data;
  bool narrow;
  __device__ float load(int64_t i) const {
    return narrow ? bf16_to_float(static_cast<const uint16_t*>(data)[i]) : static_cast<const float*>(data)[i];
  }
  __device__ void store(int64_t i, float value, uint16_t random) const {
    if (narrow)
      static_cast<uint16_t*>(data)[i] = bf16_stochastic(value, random);
    else
      static_cast<float*>(data)[i] = value;
  }
};

// One element of a tensor that is kept in any way; `bits` are those of the streams.
__device__ void update_any(const Batch& batch, int t, int64_t i, float factor, const AdamwHyper& h,
                           const uint16_t (&bits)[3]) {
  const bool narrow = batch.narrow_moments[t];
  const Moment moments[3] = {
      {batch.exp_avg[t], narrow}, {batch.exp_avg_sq[t], narrow}, {batch.max_exp_avg_sq[t], narrow}};
  const auto rounding = static_cast<AdamwRounding>(batch.rounding[t]);
  float* wide = static_cast<float*>(batch.param[t]) + i;
  uint16_t* param = static_cast<uint16_t*>(batch.param[t]) + i;
  int16_t* remainder = static_cast<int16_t*>(batch.residue[t]) + i;
  uint16_t* compensation = static_cast<uint16_t*>(batch.residue[t]) + i;
  float p;
  if (rounding == kFp32)
    p = *wide;
  else if (rounding == kExact)
    p = master_join(*param, *remainder);
  else
    p = rounding == kKahan ? kahan_join(*param, *compensation) : bf16_to_float(*param);
  const float grad = rounding == kFp32 ? static_cast<const float*>(batch.grad[t])[i]
                                       : bf16_to_float(static_cast<const uint16_t*>(batch.grad[t])[i]);
  const bool amsgrad = batch.max_exp_avg_sq[t];
  float m = moments[0].load(i), v = moments[1].load(i), w = amsgrad ? moments[2].load(i) : 0.0f;
  p = amsgrad ? adamw_element(p, grad, factor, &m, &v, &w, h) : adamw_element(p, grad, factor, &m, &v, nullptr, h);
  if (rounding == kFp32)
    *wide = p;
  else if (rounding == kExact)
    master_split(p, param, remainder);
  else if (rounding == kKahan)
    kahan_split(p, param, compensation);
  else
    *param = rounding == kStochastic ? bf16_stochastic(p, bits[kStreamParam]) : bf16_nearest(p);
  moments[0].store(i, m, bits[kStreamMoments]);
  moments[1].store(i, v, swap_bytes(bits[kStreamMoments]));
  if (amsgrad) moments[2].store(i, w, bits[kStreamMaxExpAvgSq]);
}

__device__ void update_chunk_any(const Batch& batch, int t, int64_t base, int n, float factor, const AdamwHyper& h) {
  const uint64_t first = uint64_t(batch.first[t] + base), block0 = first / 8;
  const int blocks = int((first + n + 7) / 8 - block0);
  for (int b = threadIdx.x; b < blocks; b += kThreads) {
    uint16_t bits[3][8] = {};
#pragma unroll
    for (int stream = 0; stream < 3; stream++) {
      const bool drawn = stream == kStreamParam ? batch.rounding[t] == kStochastic : batch.narrow_moments[t];
      if (drawn) philox_bits<1>(block0 + b, uint32_t(h.step), stream, batch.seed, bits[stream]);
    }
#pragma unroll
    for (int k = 0; k < 8; k++) {
      const int64_t i = int64_t((block0 + b) * 8 + k - first);  // within the chunk
      const uint16_t own[3] = {bits[0][k], bits[1][k], bits[2][k]};
      if (i >= 0 && i < n) update_any(batch, t, base + i, factor, h, own);
    }
  }
}

__global__ void __launch_bounds__(kThreads) adamw_kernel(const __grid_constant__ Batch batch) {
  int t = 0;
  for (int width = 32; width > 0; width /= 2)  // the last tensor whose first block is not after this one
    if (t + width < batch.tensors && batch.first_block[t + width] <= blockIdx.x) t += width;
  const int64_t base = int64_t(blockIdx.x - batch.first_block[t]) * kChunk;
  const int64_t left = batch.numel[t] - base;
  const int n = left < kChunk ? int(left) : kChunk;
  const AdamwHyper h = batch.hyper[batch.row[t]];
  const float factor = ft_mul(h.grad_sign, *batch.grad_factor);
  float *exp_avg = static_cast<float*>(batch.exp_avg[t]) + base,
        *exp_avg_sq = static_cast<float*>(batch.exp_avg_sq[t]) + base;
  if (batch.narrow_moments[t] || batch.max_exp_avg_sq[t] || batch.rounding[t] > kExact)
    update_chunk_any(batch, t, base, n, factor, h);
  else if (batch.rounding[t] == kExact)
    update_chunk(Bf16(batch, t, base), exp_avg, exp_avg_sq, n, factor, h);
  else
    update_chunk(Fp32(batch, t, base), exp_avg, exp_avg_sq, n, factor, h);
}

class Launcher {
 public:
  Launcher(cudaStream_t stream, const fastft::AdamwStep& step) : stream_(stream), hyper_(step.rows()) {
    batch_.grad_factor = static_cast<const float*>(step.grad_factor.data());
    batch_.seed = uint64_t(step.seed);
  }

  void add(const AdamwTensor& t) {
    if (t.numel == 0) return;
    const int64_t blocks = (t.numel + kChunk - 1) / kChunk;
    FT_CHECK(blocks < (int64_t(1) << 31), "adamw_: a tensor of %lld elements is too large",
             static_cast<long long>(t.numel));
    const bool new_row = t.row != last_row_;
    if (batch_.tensors == kTensors || (new_row && rows_ == kRows) || blocks_ + blocks >= (int64_t(1) << 31)) launch();
    if (t.row != last_row_) {
      batch_.hyper[rows_++] = hyper_[t.row];
      last_row_ = t.row;
    }
    const int i = batch_.tensors++;
    batch_.param[i] = t.param;
    batch_.grad[i] = t.grad;
    batch_.exp_avg[i] = t.exp_avg;
    batch_.exp_avg_sq[i] = t.exp_avg_sq;
    batch_.max_exp_avg_sq[i] = t.max_exp_avg_sq;
    batch_.residue[i] = t.residue;
    batch_.numel[i] = t.numel;
    batch_.first[i] = t.first;
    batch_.first_block[i] = static_cast<uint32_t>(blocks_);
    batch_.row[i] = static_cast<uint8_t>(rows_ - 1);
    batch_.rounding[i] = static_cast<uint8_t>(t.rounding);
    batch_.narrow_moments[i] = t.narrow_moments;
    blocks_ += blocks;
  }

  void launch() {
    if (blocks_ > 0) {
      FASTFT_LAUNCH(adamw_kernel, static_cast<unsigned>(blocks_), kThreads, 0, stream_, batch_);
      fastft::check_launch("adamw_");
    }
    batch_.tensors = rows_ = 0;
    blocks_ = 0;
    last_row_ = -1;
  }

 private:
  cudaStream_t stream_;
  const AdamwHyper* hyper_;
  Batch batch_{};
  int rows_ = 0;
  int64_t blocks_ = 0, last_row_ = -1;
};

void adamw(StableIValue* stack, uint64_t nargs, uint64_t) {
  const fastft::AdamwCall call(stack, nargs);
  const fastft::AdamwTensors& tensors = call.tensors;
  if (tensors.rows.empty()) return;
  FT_CHECK(call.step.grad_factor.device_index() == tensors.device_index, "adamw_: grad_factor is on another device");
  const fastft::DeviceGuard guard(tensors.device_index);
  Launcher launcher(fastft::current_stream(tensors.device_index), call.step);
  for (const AdamwTensor& tensor : tensors.rows) launcher.add(tensor);
  launcher.launch();
}

fastft::Kernel kernel_adamw("adamw_", adamw);
}  // namespace
