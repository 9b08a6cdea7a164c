// Runs the CPU library without torch, on whatever processor this is compiled for, and prints a
// digest of the bits of each result. Two processors, or two instruction sets, must print the same.
//
// Its own functions stand for those of libtorch's C shim; kernels run on two threads. Its numbers
// come out of integers, and it calls nothing of libm. A NaN counts as one value: its payload is the
// processor's. Handles that nobody has freed are an error, of calls that are refused too.
//
// Sanitizers see all of it, torch's thread pool and Python's memory not being there: make sanitize.
// The argument `race` gives an element to both threads, `leak` frees no handle: what must be
// reported.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#define FASTFT_SHIM_DECLARATIONS_ONLY
#include "shim.h"

extern "C" const char* fastft_register();
extern "C" void fastft_adamw_release(int64_t bound);

namespace {
enum Dtype : int32_t { kFloat, kDouble, kHalf, kBfloat16, kInt8, kUint8, kInt16, kInt32, kInt64, kBool };

size_t item_size(int32_t dtype) {
  switch (dtype) {
    case kDouble:
    case kInt64:
      return 8;
    case kFloat:
    case kInt32:
      return 4;
    case kInt8:
    case kUint8:
    case kBool:
      return 1;
    default:
      return 2;
  }
}

int64_t product(const std::vector<int64_t>& shape) {
  int64_t n = 1;
  for (const int64_t size : shape) n *= size;
  return n;
}

// A contiguous tensor.
struct Array {
  int32_t dtype;
  std::vector<int64_t> shape;
  std::vector<char> memory;  // not a byte more than it needs

  Array(int32_t dtype, std::vector<int64_t> shape)
      : dtype(dtype), shape(shape), memory(product(shape) * item_size(dtype)) {}
  int64_t numel() const { return product(shape); }
  template <class T>
  T* as() {
    return reinterpret_cast<T*>(memory.data());
  }
};

using Arrays = std::vector<Array>;
std::map<std::string, void (*)(StableIValue*, uint64_t, uint64_t)> kernels;
std::atomic<int64_t> handles{0};  // that nobody has freed

const char* fault = "";  // that is planted

bool planted(const char* name) { return !strcmp(fault, name); }
}  // namespace

// What libtorch would hold behind the handles.
struct AtenTensorOpaque {
  Array* array;
  bool owns;
  explicit AtenTensorOpaque(Array* array, bool owns = false) : array(array), owns(owns) {
    handles++;
  }
  ~AtenTensorOpaque() {
    handles--;
    if (owns) delete array;
  }
};
struct StableListOpaque {  // frees no tensor, as libtorch's
  std::vector<AtenTensorHandle> tensors;
};

extern "C" {
AOTITorchError aoti_torch_library_init_impl(const char*, const char*, const char*, uint32_t,
                                            TorchLibraryHandle*) {
  return 0;
}
AOTITorchError torch_library_impl(TorchLibraryHandle, const char* name,
                                  void (*function)(StableIValue*, uint64_t, uint64_t), uint64_t) {
  kernels[name] = function;
  return 0;
}
uint64_t aoti_torch_abi_version() { return ~uint64_t(0); }
AOTITorchError torch_list_size(StableListHandle list, size_t* size) {
  *size = list->tensors.size();
  return 0;
}
AOTITorchError torch_list_get_item(StableListHandle list, size_t i, StableIValue* value) {
  *value = reinterpret_cast<StableIValue>(list->tensors[i]);
  return 0;
}
AOTITorchError torch_delete_list(StableListHandle list) {
  delete list;
  return 0;
}
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle tensor) {
  if (!planted("leak")) delete tensor;
  return 0;
}
AOTITorchError torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** data) {
  *data = tensor->array->memory.data();
  return 0;
}
AOTITorchError torch_get_const_data_ptr(AtenTensorHandle tensor, const void** data) {
  *data = tensor->array->memory.data();
  return 0;
}
AOTITorchError aoti_torch_get_numel(AtenTensorHandle tensor, int64_t* numel) {
  *numel = tensor->array->numel();
  return 0;
}
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle tensor, int32_t* dtype) {
  *dtype = tensor->array->dtype;
  return 0;
}
AOTITorchError aoti_torch_get_dim(AtenTensorHandle tensor, int64_t* dim) {
  *dim = int64_t(tensor->array->shape.size());
  return 0;
}
AOTITorchError aoti_torch_get_size(AtenTensorHandle tensor, int64_t d, int64_t* size) {
  *size = tensor->array->shape[size_t(d)];
  return 0;
}
AOTITorchError aoti_torch_get_stride(AtenTensorHandle tensor, int64_t d, int64_t* stride) {
  *stride = 1;
  for (size_t i = size_t(d) + 1; i < tensor->array->shape.size(); i++)
    *stride *= tensor->array->shape[i];
  return 0;
}
AOTITorchError aoti_torch_is_contiguous(AtenTensorHandle, bool* contiguous) {
  *contiguous = true;
  return 0;
}
AOTITorchError aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t*,
                                        int32_t dtype, int32_t, int32_t, AtenTensorHandle* made) {
  *made = new AtenTensorOpaque(new Array(dtype, {sizes, sizes + dims}), true);
  return 0;
}
AOTITorchError torch_get_num_threads(uint32_t* count) {
  *count = 2;
  return 0;
}
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle, int32_t* index) {
  *index = -1;
  return 0;
}
AOTITorchError aoti_torch_get_device_type(AtenTensorHandle, int32_t* type) {
  *type = aoti_torch_device_type_cpu();
  return 0;
}
int32_t aoti_torch_device_type_cpu() { return 0; }
int32_t aoti_torch_device_type_cuda() { return 1; }
int32_t aoti_torch_dtype_float32() { return kFloat; }
int32_t aoti_torch_dtype_float64() { return kDouble; }
int32_t aoti_torch_dtype_float16() { return kHalf; }
int32_t aoti_torch_dtype_bfloat16() { return kBfloat16; }
int32_t aoti_torch_dtype_int8() { return kInt8; }
int32_t aoti_torch_dtype_uint8() { return kUint8; }
int32_t aoti_torch_dtype_int16() { return kInt16; }
int32_t aoti_torch_dtype_int32() { return kInt32; }
int32_t aoti_torch_dtype_int64() { return kInt64; }
int32_t aoti_torch_dtype_bool() { return kBool; }
// Two pieces at the same time, where `grain` allows two.
AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain, ParallelFunc function,
                                  void* context) {
  const int64_t middle = end - begin > grain ? begin + std::max(grain, (end - begin) / 2) : end;
  const int64_t overlap = planted("race");
  std::thread second;
  if (middle < end) second = std::thread(function, middle - overlap, end, context);
  function(begin, middle, context);
  if (second.joinable()) second.join();
  return 0;
}
}

namespace {
StableIValue passed(Array& array) {
  return reinterpret_cast<StableIValue>(new AtenTensorOpaque(&array));
}
StableIValue passed(Arrays& arrays) {
  auto* list = new StableListOpaque;
  for (Array& array : arrays) list->tensors.push_back(new AtenTensorOpaque(&array));
  return reinterpret_cast<StableIValue>(list);
}
StableIValue passed(int64_t number) { return StableIValue(number); }
StableIValue passed(double number) {
  StableIValue value;
  memcpy(&value, &number, sizeof value);
  return value;
}

template <class... Arguments>
int64_t call(const char* name, Arguments&&... arguments) {
  StableIValue stack[] = {passed(arguments)...};
  kernels.at(name)(stack, sizeof...(arguments), 0);
  return int64_t(stack[0]);
}

// ---- numbers

struct Numbers {
  uint64_t state;
  uint32_t next() {  // the upper half of a linear congruential generator
    state = state * 6364136223846793005u + 1442695040888963407u;
    return uint32_t(state >> 32);
  }
  float uniform() { return float(int32_t(next()) >> 8) * 0x1p-23f; }  // in [-1, 1), exact
  float wide() {  // of every size from 2^-40 to 2^8
    const uint32_t bits = (next() & 0x807fffffu) | (87u + next() % 48u) << 23;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
  }
};

uint16_t bf16_of(float value) {  // cut off
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return uint16_t(bits >> 16);
}

float bf16_widened(uint16_t bits) {
  const uint32_t word = uint32_t(bits) << 16;
  float value;
  memcpy(&value, &word, sizeof value);
  return value;
}

template <class Draw>
Array filled(int32_t dtype, std::vector<int64_t> shape, Draw draw) {
  Array array(dtype, shape);
  for (int64_t i = 0; i < array.numel(); i++) {
    const float value = draw();
    if (dtype == kFloat)
      array.as<float>()[i] = value;
    else
      array.as<uint16_t>()[i] = bf16_of(value);
  }
  return array;
}

// The bits of a float32, of which bf16 keeps the upper half.
void put(Array& array, int64_t i, uint32_t bits) {
  if (array.dtype == kFloat)
    array.as<uint32_t>()[i] = bits;
  else
    array.as<uint16_t>()[i] = uint16_t(bits >> 16);
}

Array integers(int32_t dtype, const std::vector<int64_t>& values) {
  Array array(dtype, {int64_t(values.size())});
  for (size_t i = 0; i < values.size(); i++)
    if (dtype == kInt64)
      array.as<int64_t>()[i] = values[i];
    else
      array.as<int32_t>()[i] = int32_t(values[i]);
  return array;
}

Array scalar(float value) {
  return filled(kFloat, {}, [=] { return value; });
}

// ---- digests

class Digest {
 public:
  void add(Array& array) {
    for (int64_t i = 0; i < array.numel(); i++) switch (array.dtype) {
        case kFloat: {
          const float value = array.as<float>()[i];
          take(value == value ? array.as<uint32_t>()[i] : 0x7fc00000u);
          break;
        }
        case kDouble: {
          const double value = array.as<double>()[i];
          take(value == value ? array.as<uint64_t>()[i] : 0x7ff8000000000000u);
          break;
        }
        case kBfloat16: {
          const uint16_t bits = array.as<uint16_t>()[i];
          take((bits & 0x7fffu) > 0x7f80u ? 0x7fc0u : bits);
          break;
        }
        case kInt64:
          take(array.as<uint64_t>()[i]);
          break;
        case kInt32:
          take(array.as<uint32_t>()[i]);
          break;
        case kInt16:
          take(array.as<uint16_t>()[i]);
          break;
        default:
          take(array.as<uint8_t>()[i]);
      }
  }
  void add(Arrays& arrays) {
    for (Array& array : arrays) add(array);
  }
  void print(const std::string& name) const {
    std::printf("%s: %016llx\n", name.c_str(), static_cast<unsigned long long>(hash_));
  }

 private:
  uint64_t hash_ = 0xcbf29ce484222325u;  // FNV-1a, of words of 64 bits
  void take(uint64_t word) { hash_ = (hash_ ^ word) * 0x100000001b3u, hash_ ^= hash_ >> 29; }
};

// ---- AdamW

enum Rounding { kFp32, kExact, kKahan, kStochastic, kNearest };
const char* const kRoundings[] = {"fp32", "exact", "kahan", "stochastic", "nearest"};
enum Moments { kFp32Moments, kBf16Moments, k8BitMoments, k4BitMoments };
const char* const kMoments[] = {"fp32", "bf16", "8-bit", "4-bit"};

struct Training {
  Arrays params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, residues;
  Array table{kInt64, {0, 4}}, hyper{kFloat, {1, 9}}, factor = scalar(0.75f);
  int steps = 0;

  Training(Rounding rounding, Moments moments, bool amsgrad) {
    Numbers numbers{uint64_t(1 + rounding + 8 * moments)};
    const std::vector<std::vector<int64_t>> shapes = {{1}, {7}, {3, 131}, {129}, {64, 256}, {40000}};
    const int32_t kept = rounding == kFp32 ? kFloat : kBfloat16;
    const int32_t moment = moments == kBf16Moments ? kBfloat16 : kFloat;
    const auto zero = [] { return 0.0f; };
    table = Array(kInt64, {int64_t(shapes.size()), 4});
    int64_t first = 0, *row = table.as<int64_t>();
    for (const auto& shape : shapes) {
      params.push_back(filled(kept, shape, [&] { return numbers.uniform(); }));
      grads.push_back(Array(kept, shape));
      const int64_t lines = shape.size() == 1 ? 1 : shape[0], columns = product(shape) / lines;
      const bool codes = moments == k8BitMoments || moments == k4BitMoments;
      if (codes) {
        exp_avgs.push_back(moments == k8BitMoments ? Array(kInt8, shape)
                                                   : Array(kUint8, {lines, (columns + 1) / 2}));
        exp_avg_sqs.push_back(Array(kUint8, shape));
      } else {
        exp_avgs.push_back(filled(moment, shape, zero));
        exp_avg_sqs.push_back(filled(moment, shape, zero));
      }
      if (amsgrad) max_exp_avg_sqs.push_back(filled(moment, shape, zero));
      if (rounding == kExact) residues.push_back(Array(kInt16, shape));
      if (rounding == kKahan) residues.push_back(filled(kBfloat16, shape, zero));
      for (int scale = 0; scale < (codes ? 2 : 0); scale++)
        residues.push_back(filled(kFloat, {lines, (columns + 127) / 128}, zero));
      *row++ = 0, *row++ = rounding, *row++ = amsgrad, *row++ = first;
      first += (product(shape) + 511) / 512 * 512;
    }
  }

  // Draws the gradients of a step and its hyper-parameters; a few of the third step are Inf or NaN.
  void prepare() {
    Numbers numbers{uint64_t(100 + steps++)};
    for (Array& grad : grads) {
      grad = filled(grad.dtype, grad.shape, [&] { return numbers.wide(); });
      if (steps != 3 || grad.numel() < 200) continue;
      for (int64_t i = 5; i < grad.numel(); i += 911)
        put(grad, i, i % 2 ? 0xff800000u : 0x7fc00000u);
    }
    const float numbers_of_step[] = {0.9999f, 0.1f, 0.999f, 0.001f, -0.01f, 0.04f, 1e-8f, 1.0f};
    std::copy(std::begin(numbers_of_step), std::end(numbers_of_step), hyper.as<float>());
    hyper.as<float>()[8] = float(steps);
  }

  void add_to(Digest& digest) {
    for (Arrays* arrays : {&params, &exp_avgs, &exp_avg_sqs, &max_exp_avg_sqs, &residues})
      digest.add(*arrays);
  }
};

void adamw(Rounding rounding, Moments moments, bool amsgrad) {
  Training t(rounding, moments, amsgrad);
  Digest digest;
  for (int step = 0; step < 4; step++) {
    t.prepare();
    call("adamw_", t.params, t.grads, t.exp_avgs, t.exp_avg_sqs, t.max_exp_avg_sqs, t.residues,
         t.table, t.hyper, t.factor, int64_t(12345));
    t.add_to(digest);
  }
  digest.print(std::string("AdamW, ") + kRoundings[rounding] + ", moments " + kMoments[moments] +
               (amsgrad ? ", amsgrad" : ""));
}

Digest bound_adamw() {
  Training t(kExact, kFp32Moments, false);
  Digest digest;
  const int64_t bound = call("adamw_bind", t.params, t.exp_avgs, t.exp_avg_sqs, t.max_exp_avg_sqs,
                             t.residues, t.table);
  for (int step = 0; step < 2; step++) {
    t.prepare();
    if (call("adamw_bound_", t.grads, t.hyper, t.factor, int64_t(7), bound) != 0) std::abort();
    t.add_to(digest);
  }
  Array norm(kFloat, {1});
  t.prepare();
  if (call("adamw_clipped_", t.grads, t.hyper, norm, 0.5, int64_t(7), bound) != 0) std::abort();
  t.add_to(digest);
  digest.add(norm);
  Array sums(kInt64, {int64_t(t.params.size())}), sum(kInt64, {1});
  call("adamw_written", sums, bound);
  fastft_adamw_release(bound);
  digest.add(sums);
  call("weight_checksum_", sum, t.params.back(), int64_t(3));
  digest.add(sum);
  return digest;
}

// Two trainings that know nothing of one another.
void two_bound_adamws() {
  Digest other;
  std::thread training([&] { other = bound_adamw(); });
  const Digest digest = bound_adamw();
  training.join();
  digest.print("AdamW, bound, and checksums of weights");
  other.print("AdamW, bound, and checksums of weights, in another thread");
}

// ---- the others

void grad_norm(int32_t dtype) {
  Numbers numbers{9};
  Arrays grads;
  for (const int64_t size : {1, 15, 16, 1001, 40000})
    grads.push_back(filled(dtype, {size}, [&] { return numbers.wide(); }));
  Array total(kDouble, {}), sums(kDouble, {7});
  Digest digest;
  for (const uint32_t bits : {0u, 0x7f800000u, 0x7fc12345u}) {
    if (bits) put(grads[3], 700, bits);
    call("grad_norm_squared_", total, grads);
    call("grad_square_sums_", sums, grads);
    digest.add(total), digest.add(sums);
    call("grad_norm_total_", total, sums);
    digest.add(total);
  }
  digest.print(std::string("norm of gradients, ") + (dtype == kFloat ? "fp32" : "bf16"));
}

void cross_entropy(int32_t dtype, bool options, int64_t classes) {
  Numbers numbers{uint64_t(classes)};
  const int64_t rows = 37;
  Array logits = filled(dtype, {rows, classes}, [&] { return 12.0f * numbers.uniform(); });
  // rows with Inf, with a NaN, and with two whose payloads and signs differ
  const uint32_t odd[] = {0x7f800000u, 0xff800000u, 0x7fc12345u, 0xffd54321u};
  for (int64_t i = 0; i < 16; i++) {
    put(logits, (20 + i) * classes + numbers.next() % classes, odd[i % 4]);
    if (i % 4 == 3) put(logits, (20 + i) * classes + numbers.next() % classes, odd[2]);
  }
  std::vector<int64_t> labels;
  for (int64_t i = 0; i < rows; i++) labels.push_back(i % 9 ? numbers.next() % classes : -100);
  Array target = integers(kInt64, labels), losses(kFloat, {rows}), lse(kFloat, {rows});
  Arrays weight, upstream, statistics, grad;
  grad.emplace_back(dtype, logits.shape);
  if (options) {
    weight.push_back(filled(kFloat, {classes}, [&] { return 1.0f + 0.5f * numbers.uniform(); }));
    for (int i = 0; i < 3; i++)
      upstream.push_back(filled(kFloat, {rows}, [&] { return numbers.uniform(); }));
    statistics.emplace_back(kFloat, std::vector<int64_t>{rows});
    statistics.emplace_back(kBool, std::vector<int64_t>{rows});
  }
  call("cross_entropy_rows", logits, target, weight, upstream, losses, lse, statistics, grad,
       int64_t(-100), options ? 0.1 : 0.0, options ? 1e-3 : 0.0, options ? 20.0 : 0.0,
       options ? 0.5 : 1.0);
  Digest of_rows, of_grad;
  of_rows.add(losses), of_rows.add(lse), of_rows.add(statistics), of_grad.add(grad);
  const std::string name = std::string("cross-entropy, ") + (options ? "all options, " : "plain, ") +
                           (dtype == kFloat ? "fp32, V=" : "bf16, V=") + std::to_string(classes);
  of_rows.print(name + ", rows");
  of_grad.print(name + ", gradient");
}

void boundaries() {
  Numbers numbers{3};
  std::vector<int64_t> lengths, ignored;
  int64_t tokens = 0;
  for (int i = 0; i < 3000; i++) {
    lengths.push_back(i % 7 ? numbers.next() % 100 : 0), tokens += lengths.back();
    ignored.push_back(numbers.next() % 120);
  }
  std::vector<int64_t> ids;
  for (int64_t i = 0; i < tokens; i++) ids.push_back(numbers.next() % 50000);
  Array length = integers(kInt64, lengths), ignore = integers(kInt64, ignored);
  Array source = integers(kInt64, ids), labels(kInt64, {tokens}), positions(kInt64, {tokens});
  Array seq_idx(kInt32, {tokens}), cu_seqlens(kInt32, {int64_t(lengths.size()) + 1});
  call("packed_boundaries", length, ignore, source, int64_t(2), labels, positions, seq_idx,
       cu_seqlens);
  Digest digest;
  for (Array* array : {&labels, &positions, &seq_idx, &cu_seqlens}) digest.add(*array);
  digest.print("boundaries");
}

void plan(int32_t dtype) {
  Numbers numbers{4};
  std::vector<int64_t> lengths;
  for (int i = 0; i < 5000; i++) lengths.push_back(1 + numbers.next() % (i % 3 ? 300 : 2000));
  const int64_t n = int64_t(lengths.size());
  Array length = integers(dtype, lengths), windows = integers(kInt64, {0, 1777, 1777, n});
  Array indices(kInt64, {n}), entries(kInt64, {n}), offsets(kInt64, {n + 1}), counts(kInt64, {3});
  call("plan_packs", length, windows, int64_t(2048), int64_t(12), indices, entries, offsets, counts);
  Digest digest;
  for (Array* array : {&indices, &entries, &counts}) digest.add(*array);
  digest.print(std::string("plan, lengths ") + (dtype == kInt64 ? "int64" : "int32"));
}

// Of small integers, whose sums are exact: FMA or not, and in any order.
void matrix_product(int32_t dtype) {
  Numbers numbers{5};
  const auto integer = [&] { return float(int(numbers.next() % 15) - 7); };
  Array left = filled(dtype, {63, 507}, integer), right = filled(kBfloat16, {507, 1030}, integer);
  Array out(kFloat, {63, 1030});
  Digest digest;
  for (const int64_t add : {0, 1}) call("matrix_product", out, left, right, add), digest.add(out);
  digest.print(std::string("matrix product, ") + (dtype == kFloat ? "fp32" : "bf16"));
}

void swiglu(int32_t dtype) {
  Numbers numbers{7};
  const auto number = [&] { return float(int(numbers.next() % 4001) - 2000) / 16.0f; };
  const std::vector<int64_t> shape{3, 4099};
  Array gate = filled(dtype, shape, number), up = filled(dtype, shape, number);
  Array grad = filled(dtype, shape, number), out(dtype, shape), grad_gate(dtype, shape);
  Array grad_up(dtype, shape);
  call("swiglu", out, gate, up);
  call("swiglu_backward", grad_gate, grad_up, grad, gate, up);
  Digest digest;
  for (Array* array : {&out, &grad_gate, &grad_up}) digest.add(*array);
  digest.print(std::string("swiglu, ") + (dtype == kFloat ? "fp32" : "bf16"));
}

void rms_norm(int32_t dtype, int64_t width) {
  Numbers numbers{8};
  const auto number = [&] { return float(int(numbers.next() % 4001) - 2000) / 16.0f; };
  const std::vector<int64_t> shape{131, width};
  Array x = filled(dtype, shape, number), weight = filled(dtype, {width}, number);
  Array grad = filled(dtype, shape, number), out(dtype, shape), grad_x(dtype, shape);
  Array grad_weight(dtype, {width}), rstd(kFloat, {131});
  call("rms_norm", out, rstd, x, weight, 1e-6, 1.0);
  call("rms_norm_backward", grad_x, grad_weight, grad, x, weight, rstd, 1.0);
  Digest digest;
  for (Array* array : {&out, &rstd, &grad_x, &grad_weight}) digest.add(*array);
  digest.print(std::string("rms_norm, ") + (dtype == kFloat ? "fp32" : "bf16") + ", " +
               std::to_string(width));
}

// All keys are 0: weights are 1 / n, results sums of small integers, divided at the end, and no
// query has a gradient. lse comes of libm, and with it what values get, of which the sum is known.
void attention(int32_t dtype, int64_t size, int64_t window) {
  Numbers numbers{6};
  const auto integer = [&] { return float(int(numbers.next() % 15) - 7); };
  const auto zero = [] { return 0.0f; };
  const int64_t tokens = 333, heads = 4, key_heads = 2;
  Array query = filled(dtype, {1, heads, tokens, size}, integer);
  Array key = filled(dtype, {1, key_heads, tokens, size}, zero);
  Array value = filled(dtype, {1, key_heads, tokens, size}, integer);
  Array d_out = filled(dtype, query.shape, integer), out(dtype, query.shape), d_query(kFloat, query.shape);
  Array d_key(kFloat, key.shape), d_value(kFloat, key.shape), lse(kFloat, {1, heads, tokens});
  Array pieces = integers(kInt64, {0, 0, 200, 0, 200, 0, 200, tokens, 200, tokens});
  pieces.shape = {2, 5};
  call("segment_attention_forward", out, lse, query, key, value, pieces, 0.125, int64_t(1), window,
       0.0);
  call("segment_attention_backward", d_query, d_key, d_value, d_out, query, key, value, out, lse,
       pieces, 0.125, int64_t(1), window, 0.0);
  double given = 0.0, taken = 0.0;
  for (int64_t i = 0; i < d_value.numel(); i++) taken += double(d_value.as<float>()[i]);
  for (int64_t i = 0; i < d_out.numel(); i++)
    if (dtype == kFloat)
      given += double(d_out.as<float>()[i]);
    else
      given += double(bf16_widened(d_out.as<uint16_t>()[i]));
  if (std::abs(given - taken) > 0.05) {
    std::fprintf(stderr, "values got %g of %g\n", taken, given);
    std::exit(1);
  }
  Digest digest;
  digest.add(out), digest.add(d_query);
  digest.print(std::string("attention, ") + (dtype == kFloat ? "fp32" : "bf16") +
               ", D=" + std::to_string(size) + ", window " + std::to_string(window));
}

template <class... Arguments>
void refused(const char* name, Arguments&&... arguments) {
  const int64_t before = handles;
  try {
    call(name, arguments...);
  } catch (const std::runtime_error&) {
    if (handles == before || planted("leak")) return;
    std::fprintf(stderr, "%s keeps what it has refused\n", name);
    std::exit(1);
  }
  std::fprintf(stderr, "%s refuses nothing\n", name);
  std::exit(1);
}

// Of each operator a call with tensors of a dtype that none takes.
void refusals() {
  Array half(kHalf, {2, 2});
  Arrays two(2, half);
  const int64_t n = 0;
  refused("adamw_", two, two, two, two, two, two, half, half, half, n);
  refused("adamw_bind", two, two, two, two, two, half);
  refused("adamw_bound_", two, half, half, n, n);
  refused("adamw_clipped_", two, half, half, 1.0, n, n);
  refused("adamw_written", half, n);
  refused("weight_checksum_", half, half, int64_t(1));
  refused("grad_norm_squared_", half, two);
  refused("grad_square_sums_", half, two);
  refused("grad_norm_total_", half, half);
  refused("cross_entropy_rows", half, half, two, two, half, half, two, two, n, 0.0, 0.0, 0.0, 1.0);
  refused("packed_boundaries", half, half, half, n, half, half, half, half);
  refused("plan_packs", half, half, int64_t(1), n, half, half, half, half);
  refused("matrix_product", half, half, half, n);
  refused("swiglu", half, half, half);
  refused("swiglu_backward", half, half, half, half, half);
  refused("rms_norm", half, half, half, half, 1.0, 1.0);
  refused("rms_norm_backward", half, half, half, half, half, half, 1.0);
  refused("segment_attention_forward", half, half, half, half, half, half, 1.0, n, n, 0.0);
  refused("segment_attention_backward", half, half, half, half, half, half, half, half, half, half,
          1.0, n, n, 0.0);
}
}  // namespace

int main(int count, char** arguments) {
  if (count > 1) fault = arguments[1];
  if (const char* failed = fastft_register()) {
    std::fprintf(stderr, "%s could not be registered\n", failed);
    return 1;
  }
  for (const Rounding rounding : {kFp32, kExact, kKahan, kStochastic, kNearest})
    for (const Moments moments : {kFp32Moments, kBf16Moments, k8BitMoments, k4BitMoments})
      for (const bool amsgrad : {false, true})
        if (!amsgrad || moments <= kBf16Moments) adamw(rounding, moments, amsgrad);
  two_bound_adamws();
  for (const int32_t dtype : {kFloat, kBfloat16}) {
    grad_norm(dtype);
    for (const bool options : {false, true})
      for (const int64_t classes : {1, 13, 5003}) cross_entropy(dtype, options, classes);
  }
  boundaries();
  plan(kInt64), plan(kInt32);
  for (const int32_t dtype : {kFloat, kBfloat16}) matrix_product(dtype), swiglu(dtype);
  for (const int32_t dtype : {kFloat, kBfloat16})
    for (const int64_t width : {7, 64, 515}) rms_norm(dtype, width);
  for (const int32_t dtype : {kFloat, kBfloat16})
    for (const int64_t size : {1, 40, 64})
      for (const int64_t window : {0, 70}) attention(dtype, size, window);
  refusals();
  if (handles) std::fprintf(stderr, "%lld handles are left\n", static_cast<long long>(handles));
  return handles != 0;
}
