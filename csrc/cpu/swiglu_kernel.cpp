// silu(gate) * up and its gradients, by the compiler's vector types at the width of the instruction
// set: every one gives the same bits, but for sign and payload of a NaN.
#include "floats.h"
#include "isa.h"
#include "swiglu.h"

namespace {
// sigmoid(x), and sigmoid(-x), in which 1 - sigmoid(x) would cancel.
struct Sigmoids {
  Floats of, of_opposite;
};
FASTFT_HD Sigmoids sigmoids(Floats x) {
  const Floats e = exp_negative(x < 0.0f ? x : -x), larger = 1.0f / (1.0f + e);
  const Floats smaller = e * larger;
  return {x < 0.0f ? smaller : larger, x < 0.0f ? larger : smaller};
}

FASTFT_HD Floats product(Floats gate, Floats up) { return gate * sigmoids(gate).of * up; }

struct Gradients {
  Floats gate, up;
};
FASTFT_HD Gradients gradients(Floats grad, Floats gate, Floats up) {
  const Sigmoids sigmoid = sigmoids(gate);
  const Floats slope = sigmoid.of * (gate * sigmoid.of_opposite + 1.0f);
  return {grad * up * slope, grad * (gate * sigmoid.of)};
}

template <class T>
void multiply(const fastft::SwigluElements& job) {
  const T *gate = static_cast<const T*>(job.gate), *up = static_cast<const T*>(job.up);
  T* out = static_cast<T*>(job.out);
  int64_t i = job.begin;
  for (; i + kWidth <= job.end; i += kWidth) store(out + i, product(load(gate + i), load(up + i)));
  if (i == job.end) return;
  Rest<T> rest(job.end - i);
  const Floats last = rest.read(gate + i);
  rest.write(out + i, product(last, rest.read(up + i)));
}

template <class T>
void differentiate(const fastft::SwigluElements& job) {
  const T *gate = static_cast<const T*>(job.gate), *up = static_cast<const T*>(job.up);
  const T* grad = static_cast<const T*>(job.grad);
  T *grad_gate = static_cast<T*>(job.out), *grad_up = static_cast<T*>(job.grad_up);
  int64_t i = job.begin;
  for (; i + kWidth <= job.end; i += kWidth) {
    const Gradients found = gradients(load(grad + i), load(gate + i), load(up + i));
    store(grad_gate + i, found.gate), store(grad_up + i, found.up);
  }
  if (i == job.end) return;
  Rest<T> rest(job.end - i);
  const Floats last_grad = rest.read(grad + i), last_gate = rest.read(gate + i);
  const Gradients found = gradients(last_grad, last_gate, rest.read(up + i));
  rest.write(grad_gate + i, found.gate), rest.write(grad_up + i, found.up);
}
}  // namespace

extern "C" void FASTFT_KERNEL(swiglu)(const fastft::SwigluElements* job) {
  if (job->grad)
    job->bfloat16 ? differentiate<uint16_t>(*job) : differentiate<float>(*job);
  else
    job->bfloat16 ? multiply<uint16_t>(*job) : multiply<float>(*job);
}
