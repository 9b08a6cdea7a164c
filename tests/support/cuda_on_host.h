// Runs CUDA kernels on the CPU, for tests: what a .cu file needs of CUDA, for g++.
//
// Blocks run one after another. The threads of a block are fibers; each runs up to its next barrier or shuffle, in an
// order that FASTFT_EMULATION_SEED shuffles, so that a missing barrier shows as a wrong result for some seed. A barrier
// that not every thread reaches and a shuffle of lanes that do not all take part are errors. Shared memory is full of
// NaN when a block begins. Of launches with more blocks than FASTFT_EMULATION_FIRST_BLOCK only those from it on
// run, to see the end of what is too large to compute. Not modelled: memory order between blocks, PTX, streams.
#pragma once
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) ushort4 {
  uint16_t x, y, z, w;
};
struct alignas(8) short4 {
  int16_t x, y, z, w;
};
struct Index {
  unsigned x;
};

using cudaStream_t = void*;
using cudaError_t = int;
constexpr int cudaSuccess = 0, cudaDevAttrMaxSharedMemoryPerBlockOptin = 232448,
              cudaDevAttrMaxSharedMemoryPerMultiprocessor = 233472, cudaFuncAttributeMaxDynamicSharedMemorySize = 0;
inline int cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(int) { return ""; }
inline int cudaDeviceGetAttribute(int* value, int attribute, int) { return *value = attribute, cudaSuccess; }
using cudaStreamCaptureStatus = int;
constexpr int cudaStreamCaptureStatusNone = 0;
inline int cudaStreamIsCapturing(cudaStream_t, int* status) {
  return *status = std::getenv("FASTFT_EMULATION_CAPTURES") != nullptr, cudaSuccess;
}
template <class Kernel>
int cudaFuncSetAttribute(Kernel, int, int) {
  return cudaSuccess;
}

namespace emulation {
enum class State { kReady, kBarrier, kShuffle, kDone };

struct Fiber {
  ucontext_t context;
  State state;
  unsigned number;
  int site;  // the line of the barrier or shuffle at which it waits
  uint32_t value, received;
  unsigned source;
};

constexpr size_t kStack = 128 << 10;
constexpr unsigned kWarp = 32;

struct Block {
  std::vector<Fiber> fibers;
  std::vector<unsigned char> shared, stacks;
  std::function<void()> body;
  ucontext_t scheduler;
  Fiber* running = nullptr;
  Index block, threads;
};

inline Block& now() {
  static Block block;
  return block;
}

inline void wait(State state, int site) {
  Fiber* fiber = now().running;
  fiber->state = state;
  fiber->site = site;
  swapcontext(&fiber->context, &now().scheduler);
}

inline void run_fiber() {
  now().body();
  now().running->state = State::kDone;
}

inline void begin(Fiber& fiber, unsigned number) {
  Block& block = now();
  fiber.number = number;
  fiber.state = State::kReady;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = block.stacks.data() + number * kStack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = &block.scheduler;
  makecontext(&fiber.context, run_fiber, 0);
}

// Lets the fibers from `first` to `last` go on if all of them wait in `state` at one place.
inline bool release(size_t first, size_t last, State state) {
  std::vector<Fiber>& fibers = now().fibers;
  for (size_t i = first; i < last; i++)
    if (fibers[i].state != state || fibers[i].site != fibers[first].site) return false;
  for (size_t i = first; i < last; i++) fibers[i].received = fibers[first + fibers[i].source].value;
  for (size_t i = first; i < last; i++) fibers[i].state = State::kReady;
  return true;
}

inline void run_block(std::mt19937_64& random, bool shuffled) {
  Block& block = now();
  const size_t threads = block.fibers.size();
  std::fill(block.shared.begin(), block.shared.end(), 0xff);
  std::vector<unsigned> order(threads);
  for (unsigned i = 0; i < threads; i++) begin(block.fibers[order[i] = i], i);
  for (;;) {
    if (shuffled) std::shuffle(order.begin(), order.end(), random);
    bool progress = false, done = true;
    for (unsigned i : order) {
      Fiber& fiber = block.fibers[i];
      if (fiber.state != State::kReady) continue;
      block.running = &fiber;
      swapcontext(&block.scheduler, &fiber.context);
      progress = true;
    }
    for (size_t i = 0; i < threads; i += kWarp) progress |= release(i, std::min(i + kWarp, threads), State::kShuffle);
    progress |= release(0, threads, State::kBarrier);
    for (const Fiber& fiber : block.fibers) done &= fiber.state == State::kDone;
    if (done) return;
    if (!progress) throw std::runtime_error("threads of a block wait at different barriers or shuffles");
  }
}

inline void launch(unsigned blocks, unsigned threads, size_t shared, std::function<void()> body) {
  if (blocks < 1 || threads < 1 || threads > 1024) throw std::runtime_error("invalid launch configuration");
  Block& block = now();
  block.threads.x = threads;
  block.fibers.resize(threads);
  block.stacks.resize(threads * kStack);
  block.shared.resize(shared + 16);
  block.body = std::move(body);
  const char* seed = std::getenv("FASTFT_EMULATION_SEED");
  std::mt19937_64 random(seed ? std::strtoull(seed, nullptr, 10) : 0);
  const bool shuffled = seed && *seed != '0';
  std::vector<unsigned> order(blocks);
  for (unsigned i = 0; i < blocks; i++) order[i] = i;
  if (shuffled) std::shuffle(order.begin(), order.end(), random);
  const char* first = std::getenv("FASTFT_EMULATION_FIRST_BLOCK");
  const unsigned skipped = first ? unsigned(std::strtoul(first, nullptr, 10)) : 0;
  for (unsigned i : order) {
    if (i < skipped && blocks > skipped) continue;
    block.block.x = i;
    run_block(random, shuffled);
  }
}

template <class T>
T shuffle_xor(unsigned mask, T value, unsigned lanes, int site) {
  static_assert(sizeof(T) == 4, "shuffles of 4 bytes");
  if (mask != 0xffffffffu) throw std::runtime_error("a shuffle leaves lanes out");
  Fiber* fiber = now().running;
  std::memcpy(&fiber->value, &value, sizeof value);
  fiber->source = (fiber->number % kWarp) ^ lanes;
  wait(State::kShuffle, site);
  std::memcpy(&value, &fiber->received, sizeof value);
  return value;
}
}  // namespace emulation

#define threadIdx (::Index{::emulation::now().running->number})
#define blockIdx (::emulation::now().block)
#define blockDim (::emulation::now().threads)
#define __syncthreads() ::emulation::wait(::emulation::State::kBarrier, __LINE__)
#define __shfl_xor_sync(mask, value, lanes) ::emulation::shuffle_xor(mask, value, lanes, __LINE__)
#define FASTFT_SHARED(name)                               \
  unsigned char* name = ::emulation::now().shared.data(); \
  name += -reinterpret_cast<uintptr_t>(name) & 15
#define FASTFT_LAUNCH(kernel, blocks, threads, shared_bytes, stream, ...) \
  ((void)(stream), ::emulation::launch(blocks, threads, shared_bytes, [=] { kernel(__VA_ARGS__); }))

inline float __fmul_rn(float a, float b) { return a * b; }
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
using __half = _Float16;
inline float __half2float(__half x) { return static_cast<float>(x); }
inline __half __float2half_rn(float x) { return static_cast<__half>(x); }
