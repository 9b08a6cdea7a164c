// fastft::adamw_ on CUDA: one launch over all tensors of all groups, each block a chunk of one tensor.
//
// adamw_bind checks the tensors once and lays a table of them into device memory; adamw_bound_ is then a step, which
// writes the gradients' pointers into the table where they are others than before. The hyper-parameters travel as the
// kernel's parameters, or are already in device memory (capturable), whence a CUDA graph's replay reads them anew.
// Nothing waits for the device: what goes there goes by value, as parameters of small kernels.
//
// Memory-bound, bytes in adamw_update.py: accesses are of 16 bytes, and of 8 where 16-bit values lie beside fp32 ones,
// but for the last elements of a tensor and for tensors that do not begin on 16 bytes. Not yet run on a GPU.
#include <algorithm>
#include <cmath>
#include <vector>

#include "adamw_args.h"
#include "launch.h"
#include "philox.h"

namespace {
constexpr int kThreads = 256, kChunk = 4096;  // elements of a block
constexpr int kOwnRows = 64;                  // of the hyper table, as the kernel's parameters
constexpr int kWords = 1000;                  // of an upload

struct Step {
  const AdamwTensor* tensors;  // in device memory, as all that follow; without their gradients
  const void* const* grads;
  const uint32_t* first_block;
  const AdamwHyper* hyper;  // nullptr: own
  const float* grad_factor;
  uint64_t seed;
  int32_t count;
  AdamwHyper own[kOwnRows];
};

struct Upload {
  uint32_t words[kWords], *to;
  int32_t count;
};
static_assert(sizeof(Step) <= 4096 && sizeof(Upload) <= 4096, "kernel parameters hold 4 KiB on every architecture");

template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth < 16 ? sizeof(T) * kWidth : 16) Vector {
  T at[kWidth];
};

template <int kWidth, class T>
__device__ Vector<T, kWidth> load(const void* data, int64_t i) {
  return *reinterpret_cast<const Vector<T, kWidth>*>(static_cast<const T*>(data) + i);
}

template <class T, int kWidth>
__device__ void store(void* data, int64_t i, const Vector<T, kWidth>& values) {
  *reinterpret_cast<Vector<T, kWidth>*>(static_cast<T*>(data) + i) = values;
}

__device__ float widen(float value) { return value; }
__device__ float widen(uint16_t value) { return bf16_to_float(value); }

struct Random {
  uint64_t seed;
  uint32_t step;

  // The bits of kWidth elements from the one with global index `element` on, which is a multiple of kWidth.
  template <int kWidth>
  __device__ Vector<uint16_t, kWidth> draw(uint32_t stream, uint64_t element) const {
    uint16_t bits[8];
    philox_bits<1>(element / 8, step, stream, seed, bits);
    uint64_t halves[2] = {};  // shifted below, because an index would put the bits into local memory
#pragma unroll
    for (int i = 0; i < 8; i++) halves[i / 4] |= uint64_t(bits[i]) << (i % 4 * 16);
    Vector<uint16_t, kWidth> own;
#pragma unroll
    for (int i = 0; i < kWidth; i++) {
      const uint64_t half = kWidth == 8 ? halves[i / 4] : element & 4 ? halves[1] : halves[0];
      own.at[i] = uint16_t(half >> ((kWidth == 1 ? element % 4 : i % 4) * 16));
    }
    return own;
  }
};

// Where a thread is: element `i` of tensor `t`.
struct Place {
  const AdamwTensor& t;
  int64_t i;
  Random random;
  template <int kWidth>
  __device__ Vector<uint16_t, kWidth> draw(uint32_t stream) const {
    return random.draw<kWidth>(stream, uint64_t(t.first + i));
  }
};

template <int kWidth>
__device__ void store_moment(const Place& at, void* data, uint32_t, const float (&values)[kWidth], float) {
  Vector<float, kWidth> kept;
#pragma unroll
  for (int k = 0; k < kWidth; k++) kept.at[k] = values[k];
  store(data, at.i, kept);
}

template <int kWidth>
__device__ void store_moment(const Place& at, void* data, uint32_t stream, const float (&values)[kWidth], uint16_t) {
  const auto bits = at.draw<kWidth>(stream);
  Vector<uint16_t, kWidth> kept;
#pragma unroll
  for (int k = 0; k < kWidth; k++) kept.at[k] = bf16_stochastic(values[k], bits.at[k]);
  store(data, at.i, kept);
}

template <int kWidth>
__device__ void load_param(const Place& at, float (&values)[kWidth], float) {
  const auto kept = load<kWidth, float>(at.t.param, at.i);
#pragma unroll
  for (int k = 0; k < kWidth; k++) values[k] = kept.at[k];
}

template <int kWidth>
__device__ void load_param(const Place& at, float (&values)[kWidth], uint16_t) {
  const auto kept = load<kWidth, uint16_t>(at.t.param, at.i);
  Vector<uint16_t, kWidth> residue{};
  if (at.t.residue) residue = load<kWidth, uint16_t>(at.t.residue, at.i);
#pragma unroll
  for (int k = 0; k < kWidth; k++) {
    if (at.t.rounding == kExact)
      values[k] = master_join(kept.at[k], int16_t(residue.at[k]));
    else
      values[k] = at.t.rounding == kKahan ? kahan_join(kept.at[k], residue.at[k]) : bf16_to_float(kept.at[k]);
  }
}

template <int kWidth>
__device__ void store_param(const Place& at, const float (&values)[kWidth], float) {
  store_moment(at, at.t.param, 0, values, 0.0f);
}

template <int kWidth>
__device__ void store_param(const Place& at, const float (&values)[kWidth], uint16_t) {
  Vector<uint16_t, kWidth> kept, residue, bits{};
  if (at.t.rounding == kStochastic) bits = at.draw<kWidth>(kStreamParam);
#pragma unroll
  for (int k = 0; k < kWidth; k++) {
    int16_t remainder;
    if (at.t.rounding == kExact) {
      master_split(values[k], &kept.at[k], &remainder);
      residue.at[k] = uint16_t(remainder);
    } else if (at.t.rounding == kKahan) {
      kahan_split(values[k], &kept.at[k], &residue.at[k]);
    } else {
      kept.at[k] = at.t.rounding == kStochastic ? bf16_stochastic(values[k], bits.at[k]) : bf16_nearest(values[k]);
    }
  }
  store(at.t.param, at.i, kept);
  if (at.t.residue) store(at.t.residue, at.i, residue);
}

// Elements [begin, end) of a chunk, kWidth at a time, of a tensor that is kept as P with moments that are kept as M.
template <class P, class M, int kWidth>
__device__ void update(const AdamwTensor& t, const void* grads, int64_t chunk, int begin, int end, float factor,
                       const AdamwHyper& h, const Random& random) {
  for (int k0 = begin + threadIdx.x * kWidth; k0 < end; k0 += kThreads * kWidth) {
    const Place at{t, chunk + k0, random};
    float p[kWidth], m[kWidth], v[kWidth], w[kWidth];
    const auto g = load<kWidth, P>(grads, at.i);
    const auto old_m = load<kWidth, M>(t.exp_avg, at.i), old_v = load<kWidth, M>(t.exp_avg_sq, at.i);
    Vector<M, kWidth> old_w{};
    if (t.max_exp_avg_sq) old_w = load<kWidth, M>(t.max_exp_avg_sq, at.i);
    load_param(at, p, P());
#pragma unroll
    for (int k = 0; k < kWidth; k++) {
      m[k] = widen(old_m.at[k]), v[k] = widen(old_v.at[k]);
      w[k] = t.max_exp_avg_sq ? widen(old_w.at[k]) : -INFINITY;  // below every second moment: as without amsgrad
      p[k] = adamw_element(p[k], widen(g.at[k]), factor, &m[k], &v[k], &w[k], h);
    }
    store_param(at, p, P());
    store_moment(at, t.exp_avg, kStreamExpAvg, m, M());
    store_moment(at, t.exp_avg_sq, kStreamExpAvgSq, v, M());
    if (t.max_exp_avg_sq) store_moment(at, t.max_exp_avg_sq, kStreamMaxExpAvgSq, w, M());
  }
}

template <class P, class M, int kWidth>
__device__ void update_chunk(const AdamwTensor& t, const void* grads, int64_t chunk, int n, float factor,
                             const AdamwHyper& h, const Random& random) {
  const uintptr_t together = uintptr_t(t.param) | uintptr_t(grads) | uintptr_t(t.exp_avg) | uintptr_t(t.exp_avg_sq) |
                             uintptr_t(t.max_exp_avg_sq) | uintptr_t(t.residue);
  const bool aligned = (together & 15) == 0 && t.first % 8 == 0;
  const int vectors = aligned ? n / kWidth * kWidth : 0;
  update<P, M, kWidth>(t, grads, chunk, 0, vectors, factor, h, random);
  update<P, M, 1>(t, grads, chunk, vectors, n, factor, h, random);
}

// A pointer out of a table: the compiler cannot know by itself that it is not one of shared or local memory.
template <class T>
__device__ T* global(T* data) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(data));
#endif
  return data;
}

__global__ void __launch_bounds__(kThreads, 3) adamw_kernel(const __grid_constant__ Step step) {
  int low = 0;  // the last tensor whose first block is not after this one
  for (int high = step.count; high - low > 1;) {
    const int middle = (low + high) / 2;
    (step.first_block[middle] <= blockIdx.x ? low : high) = middle;
  }
  const AdamwTensor& row = step.tensors[low];
  const AdamwTensor t{global(row.param),
                      nullptr,
                      global(row.exp_avg),
                      global(row.exp_avg_sq),
                      global(row.max_exp_avg_sq),
                      global(row.residue),
                      row.numel,
                      row.first,
                      row.row,
                      row.rounding,
                      row.narrow_moments};
  const AdamwHyper h = step.hyper ? step.hyper[t.row] : step.own[t.row];
  if (h.step == 0.0f) return;  // the step is skipped
  const void* grads = global(step.grads[low]);
  const int64_t chunk = int64_t(blockIdx.x - step.first_block[low]) * kChunk;
  const int n = int(t.numel - chunk < kChunk ? t.numel - chunk : kChunk);
  const float factor = ft_mul(h.grad_sign, *step.grad_factor);
  const Random random{step.seed, uint32_t(h.step)};
  if (t.rounding == kFp32) {
    if (t.narrow_moments)
      update_chunk<float, uint16_t, 4>(t, grads, chunk, n, factor, h, random);
    else
      update_chunk<float, float, 4>(t, grads, chunk, n, factor, h, random);
  } else if (t.narrow_moments) {
    update_chunk<uint16_t, uint16_t, 8>(t, grads, chunk, n, factor, h, random);
  } else {
    update_chunk<uint16_t, float, 4>(t, grads, chunk, n, factor, h, random);
  }
}

__global__ void __launch_bounds__(kThreads) upload_kernel(const __grid_constant__ Upload upload) {
  for (int i = threadIdx.x; i < upload.count; i += kThreads) upload.to[i] = upload.words[i];
}

// Copies host memory into device memory without waiting; both in whole words.
void upload(void* to, const void* from, size_t bytes, cudaStream_t stream) {
  Upload piece;
  for (size_t done = 0; done < bytes; done += sizeof piece.words) {
    const size_t size = std::min(sizeof piece.words, bytes - done);
    memcpy(piece.words, static_cast<const char*>(from) + done, size);
    piece.to = reinterpret_cast<uint32_t*>(static_cast<char*>(to) + done);
    piece.count = int32_t(size / sizeof piece.words[0]);
    FASTFT_LAUNCH(upload_kernel, 1, kThreads, 0, stream, piece);
  }
  fastft::check_launch("adamw_");
}

class Bound {
 public:
  fastft::AdamwTensors tensors;

  explicit Bound(fastft::AdamwTensors&& checked)
      : tensors(std::move(checked)),
        memory_(fastft::device_memory(int64_t(bytes(tensors)) + 16, tensors.device_index)) {
    std::vector<uint32_t> first_block;
    for (const AdamwTensor& t : tensors.rows) {
      first_block.push_back(uint32_t(blocks_));
      blocks_ += (t.numel + kChunk - 1) / kChunk;
      FT_CHECK(blocks_ < (int64_t(1) << 31), "adamw_: %zu tensors have too many elements", tensors.rows.size());
    }
    const size_t n = tensors.rows.size();
    step_.count = int32_t(n);
    char* place = static_cast<char*>(memory_.mutable_data());
    step_.tensors = reinterpret_cast<AdamwTensor*>(place);
    step_.grads = reinterpret_cast<const void**>(place += n * sizeof(AdamwTensor));
    step_.first_block = reinterpret_cast<uint32_t*>(place += n * sizeof(void*));
    hyper_ = reinterpret_cast<AdamwHyper*>(place + n * sizeof(uint32_t));
    const fastft::DeviceGuard guard(tensors.device_index);
    const cudaStream_t stream = fastft::current_stream(tensors.device_index);
    upload(const_cast<AdamwTensor*>(step_.tensors), tensors.rows.data(), n * sizeof(AdamwTensor), stream);
    upload(const_cast<uint32_t*>(step_.first_block), first_block.data(), n * sizeof(uint32_t), stream);
  }

  // A graph that has captured a step reads the table at every replay: then nobody may have its memory, ever.
  ~Bound() {
    if (in_graph_) memory_.handle = nullptr;
  }

  // A step with the gradients that `tensors` has taken.
  void run(const fastft::AdamwStep& hyper) {
    if (blocks_ == 0) return;
    FT_CHECK(hyper.grad_factor.device_index() == tensors.device_index, "adamw_: grad_factor is on another device");
    const fastft::DeviceGuard guard(tensors.device_index);
    const cudaStream_t stream = fastft::current_stream(tensors.device_index);
    refresh_grads(stream);
    step_.grad_factor = static_cast<const float*>(hyper.grad_factor.data());
    step_.seed = uint64_t(hyper.seed);
    step_.hyper = nullptr;
    const size_t size = size_t(tensors.hyper_rows) * sizeof(AdamwHyper);
    if (!hyper.hyper.on_cpu()) {
      FT_CHECK(hyper.hyper.device_index() == tensors.device_index, "adamw_: hyper is on another device");
      step_.hyper = hyper.rows();
    } else if (tensors.hyper_rows <= kOwnRows) {
      memcpy(step_.own, hyper.rows(), size);
    } else {
      upload(hyper_, hyper.rows(), size, stream);
      step_.hyper = hyper_;
    }
    FASTFT_LAUNCH(adamw_kernel, unsigned(blocks_), kThreads, 0, stream, step_);
    fastft::check_launch("adamw_");
  }

 private:
  fastft::Tensor memory_;
  Step step_{};
  AdamwHyper* hyper_;
  int64_t blocks_ = 0;
  std::vector<const void*> grads_;  // in the table
  bool in_graph_ = false;

  static size_t bytes(const fastft::AdamwTensors& tensors) {
    const size_t hyper = tensors.hyper_rows > kOwnRows ? size_t(tensors.hyper_rows) * sizeof(AdamwHyper) : 0;
    return tensors.rows.size() * (sizeof(AdamwTensor) + sizeof(void*) + sizeof(uint32_t)) + hyper;
  }

  void refresh_grads(cudaStream_t stream) {
    cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
    cudaStreamIsCapturing(stream, &capturing);
    in_graph_ |= capturing != cudaStreamCaptureStatusNone;
    std::vector<const void*> grads;
    for (const AdamwTensor& t : tensors.rows) grads.push_back(t.grad);
    if (!in_graph_ && grads == grads_) return;  // a replay, which nobody sees here, writes those of its capture
    grads_.swap(grads);
    upload(const_cast<const void**>(step_.grads), grads_.data(), grads_.size() * sizeof(void*), stream);
  }
};

void adamw(StableIValue* stack, uint64_t nargs, uint64_t) {
  fastft::AdamwCall call(stack, nargs);
  Bound(std::move(call.tensors)).run(call.step);
}

// adamw_bind(Tensor(a!)[] params, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs,
//            Tensor(e!)[] residues, Tensor table) -> int
void bind(StableIValue* stack, uint64_t nargs, uint64_t) {
  FT_CHECK(nargs == 6, "adamw_bind: 6 arguments expected, got %d", int(nargs));
  const fastft::TensorList params(stack[0]), exp_avgs(stack[1]), exp_avg_sqs(stack[2]), max_exp_avg_sqs(stack[3]),
      residues(stack[4]);
  const fastft::Tensor table(stack[5]);
  fastft::AdamwTensors tensors(params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, residues, table);
  stack[0] = reinterpret_cast<StableIValue>(new Bound(std::move(tensors)));
}

// adamw_bound_(Tensor[] grads, Tensor hyper, Tensor grad_factor, int seed, int bound) -> int: 0, or with nothing done 1
// where a bound tensor has changed since and 2 where a gradient does not fit its parameter.
void step_bound(StableIValue* stack, uint64_t nargs, uint64_t) {
  FT_CHECK(nargs == 5, "adamw_bound_: 5 arguments expected, got %d", int(nargs));
  const fastft::TensorList grads(stack[0]);
  auto& bound = *reinterpret_cast<Bound*>(stack[4]);
  const fastft::AdamwStep step(stack + 1, bound.tensors);
  const int code = !bound.tensors.unchanged() ? 1 : bound.tensors.take(grads) >= 0 ? 2 : 0;
  if (code == 0) bound.run(step);
  stack[0] = StableIValue(code);
}

fastft::Kernel kernel_adamw("adamw_", adamw), kernel_bind("adamw_bind", bind), kernel_bound("adamw_bound_", step_bound);
}  // namespace

// Lets go of what adamw_bind returned.
FASTFT_EXPORT void fastft_adamw_release(void* bound) { delete static_cast<Bound*>(bound); }
