// What the native kernels say of a tensor that is on another device than the
// others, told without a device: the parts of libtorch's shim that reading
// arguments needs, over tensors that are a device and a shape and hold no
// numbers.
#include <initializer_list>
#include <vector>

#include "boundaries_args.h"
#include "cross_entropy_args.h"
#include "scale_gradients_args.h"

enum { kCpu = 0, kCuda = 1 };
enum { kBool = 1, kInt32, kInt64, kFloat32, kFloat64, kBFloat16, kFloat16, kOther };

struct AtenTensorOpaque {
  int32_t dtype;
  std::vector<int64_t> sizes;
  int32_t type = kCuda, index = 0;
  int64_t numel() const {
    int64_t n = 1;
    for (int64_t size : sizes) n *= size;
    return n;
  }
};
struct StableListOpaque {
  std::vector<AtenTensorOpaque*> tensors;
};

extern "C" {
int32_t aoti_torch_device_type_cpu() { return kCpu; }
int32_t aoti_torch_device_type_cuda() { return kCuda; }
int32_t aoti_torch_dtype_float32() { return kFloat32; }
int32_t aoti_torch_dtype_float64() { return kFloat64; }
int32_t aoti_torch_dtype_float16() { return kFloat16; }
int32_t aoti_torch_dtype_bfloat16() { return kBFloat16; }
int32_t aoti_torch_dtype_int32() { return kInt32; }
int32_t aoti_torch_dtype_int64() { return kInt64; }
int32_t aoti_torch_dtype_bool() { return kBool; }
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle) { return 0; }
AOTITorchError torch_delete_list(StableListHandle) { return 0; }
AOTITorchError torch_get_mutable_data_ptr(AtenTensorHandle, void** p) { return *p = nullptr, 0; }
AOTITorchError torch_get_const_data_ptr(AtenTensorHandle, const void** p) { return *p = nullptr, 0; }
AOTITorchError aoti_torch_get_numel(AtenTensorHandle t, int64_t* n) { return *n = t->numel(), 0; }
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle t, int32_t* d) { return *d = t->dtype, 0; }
AOTITorchError aoti_torch_get_dim(AtenTensorHandle t, int64_t* d) {
  return *d = static_cast<int64_t>(t->sizes.size()), 0;
}
AOTITorchError aoti_torch_get_size(AtenTensorHandle t, int64_t d, int64_t* n) { return *n = t->sizes[d], 0; }
AOTITorchError aoti_torch_get_stride(AtenTensorHandle t, int64_t d, int64_t* n) { return *n = d ? 1 : t->sizes[1], 0; }
AOTITorchError aoti_torch_is_contiguous(AtenTensorHandle, bool* b) { return *b = true, 0; }
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle t, int32_t* i) { return *i = t->index, 0; }
AOTITorchError aoti_torch_get_device_type(AtenTensorHandle t, int32_t* d) { return *d = t->type, 0; }
AOTITorchError torch_list_size(StableListHandle list, size_t* n) { return *n = list->tensors.size(), 0; }
AOTITorchError torch_list_get_item(StableListHandle list, size_t i, StableIValue* v) {
  return *v = reinterpret_cast<StableIValue>(list->tensors[i]), 0;
}
}

namespace {
using Tensors = std::vector<AtenTensorOpaque>;
template <class T>
StableIValue value(T& object) {
  return reinterpret_cast<StableIValue>(&object);
}

void read_rows(Tensors& t) {  // logits, target, weight, upstream (3), losses,
                              // lse, entropy, is_top1, grad
  StableListOpaque weight{{&t[2]}}, upstream{{&t[3], &t[4], &t[5]}}, statistics{{&t[8], &t[9]}}, grad{{&t[10]}};
  StableIValue stack[13] = {value(t[0]), value(t[1]), value(weight),     value(upstream),
                            value(t[6]), value(t[7]), value(statistics), value(grad)};
  fastft::CrossEntropyArgs(stack, true);
}

void read_boundaries(Tensors& t) {  // source, lengths, ignored, labels,
                                    // position_ids, seq_idx, cu_seqlens
  StableIValue stack[8] = {value(t[1]), value(t[2]), value(t[0]), 0,
                           value(t[3]), value(t[4]), value(t[5]), value(t[6])};
  fastft::BoundariesArgs arguments(stack);
}

void read_gradients(Tensors& t) {  // scale, gradients (2)
  StableListOpaque gradients{{&t[1], &t[2]}};
  StableIValue stack[2] = {value(gradients), value(t[0])};
  fastft::ScaleGradientsArgs arguments(stack);
}

// Prints what is said where each tensor but the first is elsewhere, one after
// the other.
void each_elsewhere(void (*read)(Tensors&), const Tensors& good) {
  Tensors all_right = good;
  read(all_right);
  for (size_t i = 1; i < good.size(); i++)
    for (auto [type, index] : {std::pair{kCpu, -1}, std::pair{kCuda, 1}}) {
      Tensors tensors = good;
      tensors[i].type = type, tensors[i].index = index;
      try {
        read(tensors);
        std::puts("nothing");
      } catch (const std::exception& error) {
        std::puts(error.what());
      }
    }
}
}  // namespace

int main() {
  each_elsewhere(read_rows, {{kBFloat16, {5, 7}},
                             {kInt64, {5}},
                             {kFloat32, {7}},
                             {kFloat32, {5}},
                             {kFloat32, {5}},
                             {kFloat32, {5}},
                             {kFloat32, {5}},
                             {kFloat32, {5}},
                             {kFloat32, {5}},
                             {kBool, {5}},
                             {kBFloat16, {5, 7}}});
  each_elsewhere(
      read_boundaries,
      {{kInt64, {9}}, {kInt64, {2}}, {kInt64, {2}}, {kInt64, {9}}, {kInt64, {9}}, {kInt32, {9}}, {kInt32, {3}}});
  each_elsewhere(read_gradients, {{kFloat32, {}}, {kBFloat16, {5, 7}}, {kFloat32, {9}}});
}
