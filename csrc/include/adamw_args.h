// Reads and checks the tensors of fastft::adamw_ for the CPU and the CUDA launcher.
#pragma once
#include <atomic>
#include <vector>

#include "adamw_math.h"
#include "moments_4bit.h"
#include "shim.h"

namespace fastft {
// Says whether elements at the same memory offset belong together: all contiguous, or all with the
// same dense strides.
inline bool same_layout(const Tensor& a, const Tensor& b) {
  if (a.contiguous() && b.contiguous()) return true;
  const int64_t dim = a.dim();
  int64_t span = 1;
  if (b.dim() != dim) return false;
  for (int64_t d = 0; d < dim; d++) {
    const int64_t size = a.size(d);
    if (size != b.size(d) || (size > 1 && a.stride(d) != b.stride(d))) return false;
    span += (size - 1) * a.stride(d);
  }
  return span == a.numel();
}

// The tensors that an update changes, checked against each other. It owns handles of them, which
// keep them alive and with which `look_and_take` sees that one was given other memory (`p.data =
// ...`) or another shape since.
class AdamwTensors {
 public:
  std::vector<AdamwTensor> rows;
  std::vector<int64_t> starts{0};  // elements before each tensor, and all of them
  int32_t device_index = -1;
  int64_t hyper_rows = 0;
  bool contiguous = true;  // the elements of each lie in memory in their order

  // Tensor[] params, Tensor[] exp_avgs, Tensor[] exp_avg_sqs, Tensor[] max_exp_avg_sqs, Tensor[]
  // residues, Tensor table
  AdamwTensors(TensorList& params, TensorList& exp_avgs, TensorList& exp_avg_sqs,
               TensorList& max_exp_avg_sqs, TensorList& residues, const Tensor& table) {
    const size_t n = params.size;
    FT_CHECK(exp_avgs.size == n && exp_avg_sqs.size == n,
             "adamw_: lists of %zu, %zu and %zu tensors", n, exp_avgs.size, exp_avg_sqs.size);
    FT_CHECK(table.dtype() == aoti_torch_dtype_int64() && table.contiguous() &&
                 table.numel() == int64_t(4 * n),
             "adamw_: table must be contiguous int64 with one row of 4 for each tensor");
    const int64_t* entry = static_cast<const int64_t*>(table.data());
    size_t next_max = 0, next_residue = 0;
    rows.reserve(n), starts.reserve(n + 1), kept_.reserve(n);
    for (size_t i = 0; i < n; i++, entry += 4) {
      const auto rounding = static_cast<AdamwRounding>(entry[1]);
      FT_CHECK(entry[0] >= 0 && entry[0] < kMostRows && rounding >= kFp32 && rounding <= kNearest &&
                   entry[3] >= 0 && entry[3] <= kLastElement,
               "adamw_: bad table row %zu", i);
      const bool amsgrad = entry[2], keeps = rounding == kExact || rounding == kKahan;
      FT_CHECK(!amsgrad || next_max < max_exp_avg_sqs.size,
               "adamw_: tensor %zu has no max_exp_avg_sq", i);
      FT_CHECK(!keeps || next_residue < residues.size, "adamw_: bfloat16 tensor %zu has no residue",
               i);
      Tensor exp_avg = exp_avgs.take(i);
      const bool codes =
          exp_avg.dtype() == aoti_torch_dtype_int8() || exp_avg.dtype() == aoti_torch_dtype_uint8();
      FT_CHECK(!codes || next_residue + keeps + 2 <= residues.size,
               "adamw_: tensor %zu has no scales", i);
      const auto next = [&](bool there, TensorList& list, size_t& index) {
        return there ? list.take(index++) : Tensor(StableIValue(0));
      };
      Kept kept{params.take(i),
                std::move(exp_avg),
                exp_avg_sqs.take(i),
                next(amsgrad, max_exp_avg_sqs, next_max),
                next(keeps, residues, next_residue),
                next(codes, residues, next_residue),
                next(codes, residues, next_residue)};
      rows.push_back(codes ? check_codes(i, kept, rounding) : check_floats(i, kept, rounding));
      rows.back().row = entry[0], rows.back().first = entry[3];
      hyper_rows = entry[0] >= hyper_rows ? entry[0] + 1 : hyper_rows;
      starts.push_back(starts.back() + rows.back().numel);
      contiguous = contiguous && kept.contiguous;
      kept_.push_back(std::move(kept));
    }
    FT_CHECK(next_max == max_exp_avg_sqs.size && next_residue == residues.size,
             "adamw_: tensors are left over");
  }

  // Takes the pointers of a step's gradients: 0, or 1 where a bound tensor has changed since it was
  // checked and 2 where a gradient does not fit its parameter. All in one pass by all threads: what
  // it reads has left the caches since the last step.
  int64_t look_and_take(TensorList& grads) {
    std::atomic<bool> changed{false}, misfit{false};
    constexpr int64_t kGrain = 128;  // tensors: about 40 microseconds where no cache has them
    check_count(grads);
    parallel_for(int64_t(rows.size()), kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        constexpr int64_t kAhead = 6;
        if (i + kAhead < end) kept_[size_t(i + kAhead)].prefetch();
        if (!matches(kept_[size_t(i)], rows[size_t(i)])) changed = true;
        if (!take(size_t(i), grads.take(size_t(i)))) misfit = true;
      }
    });
    return changed ? 1 : misfit ? 2 : 0;
  }

  // Takes the gradients' pointers; returns the index of the first one which does not fit its
  // parameter, or -1.
  int64_t take(const TensorList& grads) {
    check_count(grads);
    for (size_t i = 0; i < rows.size(); i++)
      if (!take(i, grads[i])) return int64_t(i);
    return -1;
  }

 private:
  struct Kept {
    Tensor param, exp_avg, exp_avg_sq, max_exp_avg_sq, residue, exp_avg_scale, exp_avg_sq_scale;
    int32_t dtype = 0;
    bool contiguous = false;

    // Since the last step the forward and the backward pass have swept the caches. A handle points
    // to an at::Tensor, whose first word points to what `matches` reads; were it another word, this
    // would only be useless.
    void prefetch() const {
      for (const Tensor* tensor : {&param, &exp_avg, &exp_avg_sq})
        for (int line = 0; line < 4; line++)
          __builtin_prefetch(*reinterpret_cast<char* const*>(tensor->handle) + 64 * line);
    }
  };
  std::vector<Kept> kept_;

  void check_count(const TensorList& grads) const {
    FT_CHECK(grads.size == rows.size(), "adamw_: %zu gradients for %zu parameters", grads.size,
             rows.size());
  }

  bool take(size_t i, const Tensor& grad) {
    const Kept& kept = kept_[i];
    if (grad.dtype() != kept.dtype || grad.numel() != rows[i].numel ||
        grad.device_index() != device_index ||
        !(kept.contiguous ? grad.contiguous() : same_layout(kept.param, grad)))
      return false;
    rows[i].grad = grad.data();
    return rows[i].grad || rows[i].numel == 0;
  }

  // Limits with which no sum of what a table says overflows.
  static constexpr int64_t kMostRows = int64_t(1) << 31, kLastElement = int64_t(1) << 62;

  static bool same(const Tensor& tensor, const void* data, int64_t numel) {
    return tensor.numel() == numel && (numel == 0 || tensor.data() == data);
  }

  static bool matches(const Kept& kept, const AdamwTensor& row) {
    return same(kept.param, row.param, row.numel) && kept.param.contiguous() == kept.contiguous &&
           same(kept.exp_avg, row.exp_avg, row.four_bit ? nibble_bytes(row) : row.numel) &&
           same(kept.exp_avg_sq, row.exp_avg_sq, row.numel) &&
           (!row.max_exp_avg_sq || same(kept.max_exp_avg_sq, row.max_exp_avg_sq, row.numel)) &&
           (!row.residue || same(kept.residue, row.residue, row.numel)) &&
           (!row.columns || (kept.exp_avg_scale.data() == row.exp_avg_scale &&
                             kept.exp_avg_sq_scale.data() == row.exp_avg_sq_scale));
  }

  static int64_t nibble_bytes(const AdamwTensor& row) {
    return row.numel ? row.numel / row.columns * nibble_bytes_of_row(row.columns) : 0;
  }

  AdamwTensor check_floats(size_t i, Kept& kept, AdamwRounding rounding) {
    const bool bf16 = kept.exp_avg.dtype() == aoti_torch_dtype_bfloat16();
    const int32_t moment = bf16 ? aoti_torch_dtype_bfloat16() : aoti_torch_dtype_float32();
    AdamwTensor row = check(i, kept, rounding, moment);
    row.exp_avg = checked(i, kept.param, kept.exp_avg, moment, "exp_avg");
    if (kept.max_exp_avg_sq.handle)
      row.max_exp_avg_sq = checked(i, kept.param, kept.max_exp_avg_sq, moment, "max_exp_avg_sq");
    row.bf16_moments = bf16;
    return row;
  }

  AdamwTensor check_codes(size_t i, Kept& kept, AdamwRounding rounding) {
    AdamwTensor row = check(i, kept, rounding, aoti_torch_dtype_uint8());
    FT_CHECK(
        kept.param.dim() > 0 && kept.param.contiguous() && kept.exp_avg.contiguous() &&
            !kept.max_exp_avg_sq.handle,
        "adamw_: tensor %zu: 8-bit and 4-bit moments are for contiguous tensors of a dimension "
        "or more without amsgrad",
        i);
    const int64_t lines = kept.param.dim() == 1 ? 1 : kept.param.size(0);
    row.columns = row.numel ? row.numel / lines : 0;
    row.four_bit = kept.exp_avg.dtype() == aoti_torch_dtype_uint8();
    row.exp_avg = row.four_bit
                      ? checked_nibbles(i, kept.exp_avg, row, lines)
                      : checked(i, kept.param, kept.exp_avg, aoti_torch_dtype_int8(), "exp_avg");
    const int64_t blocks = lines * moment_blocks_of_row(row.columns);
    for (const Tensor* scale : {&kept.exp_avg_scale, &kept.exp_avg_sq_scale})
      FT_CHECK(
          scale->dtype() == aoti_torch_dtype_float32() && scale->contiguous() &&
              scale->device_index() == device_index && (row.numel == 0 || scale->numel() == blocks),
          "adamw_: tensor %zu: scales must be contiguous float32 on its device, one for each block",
          i);
    row.exp_avg_scale = static_cast<float*>(memory(i, kept.exp_avg_scale));
    row.exp_avg_sq_scale = static_cast<float*>(memory(i, kept.exp_avg_sq_scale));
    return row;
  }

  void* checked_nibbles(size_t i, const Tensor& exp_avg, const AdamwTensor& row, int64_t lines) {
    const bool shaped = exp_avg.dim() == 2 && exp_avg.size(0) == lines &&
                        exp_avg.size(1) == nibble_bytes_of_row(row.columns);
    FT_CHECK(exp_avg.device_index() == device_index && exp_avg.numel() == nibble_bytes(row) &&
                 (shaped || row.numel == 0),
             "adamw_: tensor %zu: an exp_avg of uint8 has two codes of 4 bits a byte: (%lld, %lld) "
             "on the parameter's device",
             i, static_cast<long long>(lines),
             static_cast<long long>(nibble_bytes_of_row(row.columns)));
    return memory(i, exp_avg);
  }

  // What all forms of the first moment have in common.
  AdamwTensor check(size_t i, Kept& kept, AdamwRounding rounding, int32_t moment_sq) {
    const Tensor& param = kept.param;
    kept.dtype = param.dtype(), kept.contiguous = param.contiguous();
    const int32_t fp32 = aoti_torch_dtype_float32(), bf16 = aoti_torch_dtype_bfloat16();
    FT_CHECK(kept.dtype == (rounding == kFp32 ? fp32 : bf16),
             "adamw_: tensor %zu: wrong dtype for its rounding", i);
    if (i == 0) device_index = param.device_index();
    FT_CHECK(param.device_index() == device_index, "adamw_: tensor %zu is on another device", i);
    AdamwTensor row{};
    row.param = memory(i, param), row.numel = param.numel(), row.rounding = rounding;
    row.exp_avg_sq = checked(i, param, kept.exp_avg_sq, moment_sq, "exp_avg_sq");
    if (kept.residue.handle)
      row.residue = checked(i, param, kept.residue,
                            rounding == kExact ? aoti_torch_dtype_int16() : bf16, "residue");
    return row;
  }

  static void* checked(size_t i, const Tensor& param, const Tensor& other, int32_t dtype,
                       const char* what) {
    FT_CHECK(other.dtype() == dtype && other.numel() == param.numel() &&
                 other.device_index() == param.device_index() && other.dim() == param.dim() &&
                 same_layout(param, other),
             "adamw_: tensor %zu: the %s does not have the parameter's shape, strides and device "
             "or has a wrong dtype",
             i, what);
    return memory(i, other);
  }

  // A storage that was freed (`untyped_storage().resize_(0)`) leaves shape and strides.
  static void* memory(size_t i, const Tensor& tensor) {
    void* data = tensor.mutable_data();
    FT_CHECK(data || tensor.numel() == 0,
             "adamw_: tensor %zu: the memory of the parameter or of its state has been freed", i);
    return data;
  }
};

// The hyper-parameters of a step.
struct AdamwStep {
  Tensor hyper, grad_factor;
  int64_t seed;

  AdamwStep(StableIValue hyper, StableIValue grad_factor, StableIValue seed)
      : hyper(hyper), grad_factor(grad_factor), seed(as_int(seed)) {}
  explicit AdamwStep(const StableIValue* stack) : AdamwStep(stack[0], stack[1], stack[2]) {}

  void check(const AdamwTensors& tensors) const {
    FT_CHECK(hyper.dtype() == aoti_torch_dtype_float32() && hyper.contiguous() &&
                 hyper.dim() == 2 && hyper.size(1) * sizeof(float) == sizeof(AdamwHyper) &&
                 hyper.size(0) >= tensors.hyper_rows,
             "adamw_: hyper must be a contiguous float32 table with %zu columns and a row for each "
             "index in table",
             sizeof(AdamwHyper) / sizeof(float));
    FT_CHECK(grad_factor.dtype() == aoti_torch_dtype_float32() && grad_factor.numel() == 1,
             "adamw_: grad_factor must be one float32");
  }
  const AdamwHyper* rows() const { return static_cast<const AdamwHyper*>(hyper.data()); }
  float factor() const { return *static_cast<const float*>(grad_factor.data()); }  // on a CPU
};

// adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,
//        Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] residues, Tensor table, Tensor hyper,
//        Tensor grad_factor, int seed)
struct AdamwCall {
  TensorList params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, residues;
  Tensor table;
  AdamwStep step;
  AdamwTensors tensors;

  AdamwCall(const StableIValue* stack, uint64_t nargs)
      : params(stack[0]),
        grads(stack[1]),
        exp_avgs(stack[2]),
        exp_avg_sqs(stack[3]),
        max_exp_avg_sqs(stack[4]),
        residues(stack[5]),
        table(stack[6]),
        step(stack + 7),
        tensors(params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, residues, table) {
    step.check(tensors);
    FT_CHECK(nargs == 10, "adamw_: 10 arguments expected, got %d", int(nargs));
    const int64_t misfit = tensors.take(grads);
    FT_CHECK(
        misfit < 0,
        "adamw_: gradient %d does not have its parameter's dtype, shape, strides and device, or "
        "its memory has been freed",
        int(misfit));
  }
};
}  // namespace fastft
