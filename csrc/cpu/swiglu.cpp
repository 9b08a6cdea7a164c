// swiglu(Tensor(a!) out, Tensor gate, Tensor up) -> ()
// swiglu_backward(Tensor(a!) grad_gate, Tensor(b!) grad_up, Tensor grad, Tensor gate, Tensor up)
//     -> ()
//
// Contiguous tensors of float32 or bfloat16, of as many elements each.
#include "swiglu.h"

#include <algorithm>

#include "isa.h"
#include "shim.h"

FASTFT_DECLARE_KERNEL(swiglu, const fastft::SwigluElements*)

namespace {
using fastft::Tensor;
constexpr int64_t kPiece = 4096;  // elements; whole registers of every width

void check(const Tensor& tensor, const Tensor& gate, const char* name) {
  FT_CHECK(tensor.on_cpu() && tensor.contiguous() && tensor.dtype() == gate.dtype() &&
               tensor.numel() == gate.numel(),
           "swiglu: %s must be contiguous, on the CPU, and of gate's size and dtype", name);
}

void compute(fastft::SwigluElements job, const Tensor& gate, const Tensor& up) {
  const bool bfloat16 = gate.dtype() == aoti_torch_dtype_bfloat16();
  FT_CHECK(bfloat16 || gate.dtype() == aoti_torch_dtype_float32(),
           "swiglu: gate must be float32 or bfloat16");
  check(gate, gate, "gate"), check(up, gate, "up");
  job.gate = gate.data(), job.up = up.data(), job.bfloat16 = bfloat16;
  const int64_t elements = gate.numel(), pieces = (elements + kPiece - 1) / kPiece;
  const auto kernel = swiglu_kernel();
  fastft::parallel_for(pieces, 4, [&](int64_t begin, int64_t end) {
    fastft::SwigluElements part = job;
    part.begin = begin * kPiece, part.end = std::min(end * kPiece, elements);
    kernel(&part);
  });
}

void swiglu(StableIValue* stack, uint64_t nargs, uint64_t) {
  FT_CHECK(nargs == 3, "swiglu: 3 arguments expected, got %d", static_cast<int>(nargs));
  const Tensor out(stack[0]), gate(stack[1]), up(stack[2]);
  check(out, gate, "out");
  fastft::SwigluElements job{};
  job.out = out.mutable_data();
  compute(job, gate, up);
}

void swiglu_backward(StableIValue* stack, uint64_t nargs, uint64_t) {
  FT_CHECK(nargs == 5, "swiglu_backward: 5 arguments expected, got %d", static_cast<int>(nargs));
  const Tensor grad_gate(stack[0]), grad_up(stack[1]), grad(stack[2]), gate(stack[3]), up(stack[4]);
  check(grad_gate, gate, "grad_gate"), check(grad_up, gate, "grad_up"), check(grad, gate, "grad");
  fastft::SwigluElements job{};
  job.grad = grad.data();
  job.out = grad_gate.mutable_data(), job.grad_up = grad_up.mutable_data();
  if (gate.numel() > 0) compute(job, gate, up);  // without elements `grad` may have no address
}

fastft::Kernel kernel_swiglu("swiglu", swiglu);
fastft::Kernel kernel_swiglu_backward("swiglu_backward", swiglu_backward);
}  // namespace
