// fastft::adamw_ on CUDA: one launch over all tensors of all groups, each block a chunk of one
// tensor.
//
// adamw_bind checks the tensors once; adamw_bound_ is then a step, the first of which lays a table
// of them into device memory, and each of which writes the gradients' pointers into it where they
// are others than before. The hyper-parameters travel as the kernel's parameters, or are already in
// device memory (capturable), whence a CUDA graph's replay reads them anew. Nothing waits for the
// device: what goes there goes by value, as parameters of small kernels.
#include <algorithm>
#include <optional>
#include <vector>

#include "adamw_args.h"
#include "adamw_kernel.cuh"
#include "launch.h"
#include "live_table.h"

namespace {
constexpr int kWords = 1000;  // of an upload

struct Upload {
  uint32_t words[kWords], *to;
  int32_t count;
};
static_assert(sizeof(Upload) <= 4096, "kernel parameters hold 4 KiB on every architecture");

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
    upload_kernel<<<1, kThreads, 0, stream>>>(piece);
  }
  fastft::check_launch("adamw_");
}

// Says whether what is launched on a stream is recorded for a CUDA graph.
bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(stream, &status);
  if (error != cudaSuccess) cudaGetLastError();  // or the next launch would be blamed
  FT_CHECK(error == cudaSuccess, "adamw_: cannot tell whether the stream is captured: %s",
           cudaGetErrorString(error));
  return status != cudaStreamCaptureStatusNone;
}

using Kernel = void (*)(Step);

// Returns the kernel for tensors that are kept like these.
Kernel kernel_for(const std::vector<AdamwTensor>& rows) {
  static constexpr Kernel kAlike[] = {adamw_kernel<kFp32>, adamw_kernel<kExact>,
                                      adamw_kernel<kKahan>, adamw_kernel<kStochastic>,
                                      adamw_kernel<kNearest>};
  bool alike = true, codes = false;
  for (const AdamwTensor& t : rows) {
    if (t.four_bit) return adamw_kernel<kAnyhow>;
    codes |= t.columns > 0;
    alike &= t.rounding == rows[0].rounding && !t.bf16_moments;
  }
  if (codes) return adamw_kernel<kNoFourBit>;
  return alike && !rows.empty() ? kAlike[rows[0].rounding] : adamw_kernel<kNoCodes>;
}

// Tensors, and a table of them in device memory. The table is laid there by the first step, and
// again by one on another stream: memory that goes back to the allocator is free for the stream
// that asked for it, whoever else still reads it.
class Bound {
 public:
  fastft::AdamwTensors tensors;

  explicit Bound(fastft::AdamwTensors&& checked)
      : tensors(std::move(checked)), kernel_(kernel_for(tensors.rows)) {
    for (const AdamwTensor& t : tensors.rows) {
      first_block_.push_back(uint32_t(blocks_));
      blocks_ += t.columns ? (moment_blocks(t) + kMomentBlocks - 1) / kMomentBlocks
                           : (t.numel + kChunk - 1) / kChunk;
      FT_CHECK(blocks_ < (int64_t(1) << 31), "adamw_: %zu tensors have too many elements",
               tensors.rows.size());
    }
  }

  ~Bound() { leave_to_graph(); }

  // Takes a step with the gradients that `tensors` has taken.
  void run(const fastft::AdamwStep& hyper) {
    if (blocks_ == 0) return;
    FT_CHECK(hyper.grad_factor.device_index() == tensors.device_index,
             "adamw_: grad_factor is on another device");
    const fastft::DeviceGuard guard(tensors.device_index);
    const cudaStream_t stream = fastft::current_stream(tensors.device_index);
    const bool capturing = is_capturing(stream);
    // A graph keeps its table for good: there it does not matter whose memory that is.
    if (!memory_ || (stream != stream_ && !capturing)) lay_table(stream);
    in_graph_ |= capturing;
    refresh_grads(stream);
    step_.grad_factor = static_cast<const float*>(hyper.grad_factor.data());
    step_.seed = uint64_t(hyper.seed);
    step_.hyper = nullptr;
    const size_t size = size_t(tensors.hyper_rows) * sizeof(AdamwHyper);
    if (!hyper.hyper.on_cpu()) {
      FT_CHECK(hyper.hyper.device_index() == tensors.device_index,
               "adamw_: hyper is on another device");
      step_.hyper = hyper.rows();
    } else if (tensors.hyper_rows <= kOwnRows) {
      memcpy(step_.own, hyper.rows(), size);
    } else {
      upload(hyper_, hyper.rows(), size, stream);
      step_.hyper = hyper_;
    }
    kernel_<<<unsigned(blocks_), kThreads, 0, stream>>>(step_);
    fastft::check_launch("adamw_");
  }

 private:
  Kernel kernel_;
  int64_t blocks_ = 0;
  std::vector<uint32_t> first_block_;
  std::optional<fastft::Tensor> memory_;  // the table
  cudaStream_t stream_ = nullptr;         // whose memory it is
  bool in_graph_ = false;
  Step step_{};
  AdamwHyper* hyper_ = nullptr;
  std::vector<const void*> grads_;  // in the table

  void lay_table(cudaStream_t stream) {
    const size_t n = tensors.rows.size();
    const size_t of_tensor = sizeof(AdamwTensor) + sizeof(void*) + sizeof(uint32_t);
    const size_t hyper =
        tensors.hyper_rows > kOwnRows ? size_t(tensors.hyper_rows) * sizeof(AdamwHyper) : 0;
    fastft::Tensor memory =
        fastft::device_memory(int64_t(n * of_tensor + hyper) + 16, tensors.device_index);
    char* place = static_cast<char*>(memory.mutable_data());
    auto* rows = reinterpret_cast<AdamwTensor*>(place);
    auto* grads = reinterpret_cast<const void**>(place += n * sizeof(AdamwTensor));
    auto* first_block = reinterpret_cast<uint32_t*>(place += n * sizeof(void*));
    upload(rows, tensors.rows.data(), n * sizeof(AdamwTensor), stream);
    upload(first_block, first_block_.data(), n * sizeof(uint32_t), stream);
    leave_to_graph();
    memory_.emplace(std::move(memory));
    stream_ = stream, in_graph_ = false;
    step_.count = int32_t(n), step_.tensors = rows, step_.grads = grads,
    step_.first_block = first_block;
    hyper_ = reinterpret_cast<AdamwHyper*>(place + n * sizeof(uint32_t));
    grads_.clear();
  }

  // A graph that has captured a step reads the table at every replay: then nobody may have its
  // memory, ever.
  void leave_to_graph() {
    if (memory_ && in_graph_) memory_->handle = nullptr;
  }

  void refresh_grads(cudaStream_t stream) {
    std::vector<const void*> grads;
    for (const AdamwTensor& t : tensors.rows) grads.push_back(t.grad);
    // a replay, which nobody sees here, writes those of its capture
    if (!in_graph_ && grads == grads_) return;
    grads_.swap(grads);
    upload(const_cast<const void**>(step_.grads), grads_.data(), grads_.size() * sizeof(void*),
           stream);
  }
};

void adamw(StableIValue* stack, uint64_t nargs, uint64_t) {
  fastft::AdamwCall call(stack, nargs);
  Bound(std::move(call.tensors)).run(call.step);
}

fastft::LiveTable<Bound>& bindings() {
  // outlives whatever is released at exit
  static auto& table = *new fastft::LiveTable<Bound>(int64_t(1) << 62);
  return table;
}

// adamw_bind(Tensor(a!)[] params, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,
//            Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] residues, Tensor table) -> int
void bind(StableIValue* stack, uint64_t nargs, uint64_t) {
  FT_CHECK(nargs == 6, "adamw_bind: 6 arguments expected, got %d", int(nargs));
  fastft::TensorList params(stack[0]), exp_avgs(stack[1]), exp_avg_sqs(stack[2]),
      max_exp_avg_sqs(stack[3]), residues(stack[4]);
  const fastft::Tensor table(stack[5]);
  fastft::AdamwTensors tensors(params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, residues, table);
  stack[0] = StableIValue(bindings().add(std::make_unique<Bound>(std::move(tensors))));
}

// adamw_bound_(Tensor[] grads, Tensor hyper, Tensor grad_factor, int seed, int bound) -> int: 0, or
// with nothing done 1 where a bound tensor has changed since and 2 where a gradient does not fit
// its parameter. `bound` is what adamw_bind returned.
void step_bound(StableIValue* stack, uint64_t nargs, uint64_t) {
  FT_CHECK(nargs == 5, "adamw_bound_: 5 arguments expected, got %d", int(nargs));
  fastft::TensorList grads(stack[0]);
  const fastft::AdamwStep step(stack + 1);
  const auto held = bindings().get(fastft::as_int(stack[4]), "adamw_bound_");
  Bound& bound = *held;
  step.check(bound.tensors);
  const int64_t code = bound.tensors.look_and_take(grads);
  if (code == 0) bound.run(step);
  stack[0] = StableIValue(code);
}

fastft::Kernel kernel_adamw("adamw_", adamw), kernel_bind("adamw_bind", bind),
    kernel_bound("adamw_bound_", step_bound);
}  // namespace

// Lets go of what adamw_bind returned.
FASTFT_EXPORT void fastft_adamw_release(int64_t bound) { bindings().remove(bound); }
