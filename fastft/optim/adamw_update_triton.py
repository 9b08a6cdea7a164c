"""The Triton engine of `adamw_`: one launch for each way of keeping values, over all tensors that are kept so.

A program updates 2048 elements of one tensor. A table in device memory has a row of ten int64 for each tensor,

    param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, residue    addresses, 0 for none
    numel, first, hyper row, first program                       first: index of the first element, for the random bits

below a row with the seed and the number of tensors. It is written anew at every call, from pinned memory, so that
nothing waits for the device; a CUDA graph cannot capture that (`impl="cuda"` can be captured).

The arithmetic is that of csrc/include/adamw_math.h, with its bits: division and square root rounded to nearest, no
fused multiply-add but the two that are written, bf16 values as the integers that they are. Eight neighbours share a
Philox call. Accesses are of 16 bytes where all tensors begin on 16 bytes, but for each tensor's last program; where
one does not, all of the launch go by single elements.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton types what its kernels take when they are launched.
from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft.optim.adamw_update import RESIDUES, Rounding

_COLUMNS = tl.constexpr(10)
_HYPER = tl.constexpr(9)
_GROUPS = 256  # of eight elements
_EXACT, _KAHAN, _STOCHASTIC = (tl.constexpr(int(Rounding[name])) for name in ("EXACT", "KAHAN", "STOCHASTIC"))


@triton.jit
def _widen(x):
    """fp32 of fp32, or of bf16 as int16."""
    if x.dtype == tl.int16:
        x = (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x


@triton.jit
def _nearest(x):
    """The nearest bf16, ties to even, as int16."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x == x, rounded, 0x7FC0).to(tl.int16)


@triton.jit
def _stochastic(x, random):
    """One of the two neighbouring bf16 values, as int16; `random` is in [0, 65535]."""
    rounded = (x.to(tl.int32, bitcast=True) + random) >> 16
    return tl.where(x == x, rounded, 0x7FC0).to(tl.int16)


@triton.jit
def _draw(seed, element, step, STREAM: tl.constexpr, ALIGNED: tl.constexpr, GROUPS: tl.constexpr):
    """The random bits of the elements from `element` on, (GROUPS, 8); ALIGNED: it is a multiple of 8."""
    within = tl.arange(0, 8)[None, :]
    if ALIGNED:
        call = element // 8 + tl.arange(0, GROUPS)[:, None]
    else:
        each = element + tl.arange(0, GROUPS)[:, None] * 8 + within
        call, within = each // 8, (each % 8).to(tl.int32)
    c2 = tl.full(call.shape, 0, tl.uint32) + step.to(tl.uint32)
    c3 = tl.full(call.shape, STREAM, tl.uint32)
    low, high = (call & 0xFFFFFFFF).to(tl.uint32), (call >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, high, c2, c3)
    word = tl.where(within < 4, tl.where(within < 2, w0, w1), tl.where(within < 6, w2, w3))
    return tl.where(within % 2 == 0, word & 0xFFFF, word >> 16).to(tl.int32)


@triton.jit
def _place(row, COLUMN: tl.constexpr, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(row + COLUMN).to(tl.pointer_type(KIND))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _load(pointer, i, numel, FULL: tl.constexpr):
    if FULL:
        return tl.load(pointer + i)
    else:
        return tl.load(pointer + i, i < numel, 0)


@triton.jit
def _store(pointer, i, numel, value, FULL: tl.constexpr):
    if FULL:
        tl.store(pointer + i, value)
    else:
        tl.store(pointer + i, value, i < numel)


@triton.jit
def _load_param(pointer, residue, i, numel, ROUNDING: tl.constexpr, FULL: tl.constexpr):
    kept = _load(pointer, i, numel, FULL)
    value = _widen(kept)
    if ROUNDING == _EXACT:
        bits = (kept.to(tl.int32) << 16) + _load(residue, i, numel, FULL).to(tl.int32)
        master = bits.to(tl.float32, bitcast=True)
        value = tl.where(master == master, master, value)
    elif ROUNDING == _KAHAN:
        value += _widen(_load(residue, i, numel, FULL))
    return value


@triton.jit
def _store_param(pointer, residue, i, numel, value, seed, element, step, ROUNDING: tl.constexpr, FULL: tl.constexpr,
                 ALIGNED: tl.constexpr, GROUPS: tl.constexpr):  # fmt: skip
    if ROUNDING == _EXACT:
        bits = tl.where(value == value, value.to(tl.int32, bitcast=True), 0x7FC00000)
        _store(pointer, i, numel, ((bits + 0x8000) >> 16).to(tl.int16), FULL)
        _store(residue, i, numel, bits.to(tl.int16), FULL)
    elif ROUNDING == _KAHAN:
        rounded = _nearest(value)
        lost = value - _widen(rounded)
        _store(pointer, i, numel, rounded, FULL)
        _store(residue, i, numel, tl.where(lost - lost == 0.0, _nearest(lost), 0).to(tl.int16), FULL)
    elif ROUNDING == _STOCHASTIC:
        random = _draw(seed, element, step, 0, ALIGNED, GROUPS)
        _store(pointer, i, numel, _stochastic(value, random), FULL)
    elif ROUNDING == 0:
        _store(pointer, i, numel, value, FULL)
    else:
        _store(pointer, i, numel, _nearest(value), FULL)


@triton.jit
def _store_moment(pointer, i, numel, value, seed, element, step, STREAM: tl.constexpr, NARROW: tl.constexpr,
                  FULL: tl.constexpr, ALIGNED: tl.constexpr, GROUPS: tl.constexpr):  # fmt: skip
    if NARROW:
        value = _stochastic(value, _draw(seed, element, step, STREAM, ALIGNED, GROUPS))
    _store(pointer, i, numel, value, FULL)


@triton.jit
def _update_tile(row, hyper, factor, seed, chunk, numel, ROUNDING: tl.constexpr, NARROW: tl.constexpr,
                 AMSGRAD: tl.constexpr, FULL: tl.constexpr, ALIGNED: tl.constexpr, GROUPS: tl.constexpr):  # fmt: skip
    """The elements from `chunk` on of the tensor of `row`; FULL: none of them is past its end."""
    KIND: tl.constexpr = tl.float32 if ROUNDING == 0 else tl.int16
    MOMENT: tl.constexpr = tl.int16 if NARROW else tl.float32
    decay, weight, beta2 = tl.load(hyper), tl.load(hyper + 1), tl.load(hyper + 2)
    one_minus_beta2, negative_step = tl.load(hyper + 3), tl.load(hyper + 4)
    correction2_sqrt, eps, step = tl.load(hyper + 5), tl.load(hyper + 6), tl.load(hyper + 8)
    i = chunk + tl.arange(0, GROUPS)[:, None] * 8 + tl.arange(0, 8)[None, :]
    element = tl.load(row + 7) + chunk
    param, grads = _place(row, 0, KIND, ALIGNED), _place(row, 1, KIND, ALIGNED)
    exp_avg, exp_avg_sq = _place(row, 2, MOMENT, ALIGNED), _place(row, 3, MOMENT, ALIGNED)
    residue = _place(row, 5, tl.int16, ALIGNED)
    g = _widen(_load(grads, i, numel, FULL)) * factor
    m, v = _widen(_load(exp_avg, i, numel, FULL)), _widen(_load(exp_avg_sq, i, numel, FULL))
    near = weight < 0.5  # torch's lerp starts from the nearer end
    m = tl.fma(tl.zeros_like(g) + tl.where(near, weight, weight - 1.0), g - m, tl.where(near, m, g))
    v = tl.fma(g * one_minus_beta2, g, v * beta2)
    largest = v
    if AMSGRAD:
        max_exp_avg_sq = _place(row, 4, MOMENT, ALIGNED)
        old = _widen(_load(max_exp_avg_sq, i, numel, FULL))
        largest = tl.where((old > v) | (old != old), old, v)  # NaN wins, as in torch.maximum
    denominator = tl.div_rn(tl.sqrt_rn(largest), tl.zeros_like(v) + correction2_sqrt) + eps
    p = _load_param(param, residue, i, numel, ROUNDING, FULL) * decay + tl.div_rn(m * negative_step, denominator)
    _store_param(param, residue, i, numel, p, seed, element, step, ROUNDING, FULL, ALIGNED, GROUPS)
    _store_moment(exp_avg, i, numel, m, seed, element, step, 1, NARROW, FULL, ALIGNED, GROUPS)
    _store_moment(exp_avg_sq, i, numel, v, seed, element, step, 2, NARROW, FULL, ALIGNED, GROUPS)
    if AMSGRAD:
        _store_moment(max_exp_avg_sq, i, numel, largest, seed, element, step, 3, NARROW, FULL, ALIGNED, GROUPS)


@triton.jit
def _adamw_kernel(table, hyper, grad_factor, ROUNDING: tl.constexpr, NARROW: tl.constexpr, AMSGRAD: tl.constexpr,
                  ALIGNED: tl.constexpr, GROUPS: tl.constexpr):  # fmt: skip
    TILE: tl.constexpr = 8 * GROUPS
    program = tl.program_id(0)
    low, high = tl.zeros((), tl.int64), tl.load(table + 1)
    while high - low > 1:  # for the last tensor whose first program is not after this one
        middle = (low + high) // 2
        before = tl.load(table + (middle + 1) * _COLUMNS + 9) <= program
        low, high = tl.where(before, middle, low), tl.where(before, high, middle)
    row = table + (low + 1) * _COLUMNS
    hyper += tl.load(row + 8) * _HYPER
    if tl.load(hyper + 8) == 0:  # the step is skipped
        return
    seed, numel = tl.load(table), tl.load(row + 6)
    factor = tl.load(hyper + 7) * tl.load(grad_factor)
    chunk = (program - tl.load(row + 9)) * TILE
    if chunk + TILE <= numel:
        _update_tile(row, hyper, factor, seed, chunk, numel, ROUNDING, NARROW, AMSGRAD, True, ALIGNED, GROUPS)
    else:
        _update_tile(row, hyper, factor, seed, chunk, numel, ROUNDING, NARROW, AMSGRAD, False, ALIGNED, GROUPS)


def _check(i: int, param: Tensor, others: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> None:
    """Raises where a tensor does not fit its parameter: the kernel knows addresses only."""
    for other, dtype in zip(others, dtypes, strict=True):
        if (other.dtype, other.numel(), other.device) != (dtype, param.numel(), param.device):
            needed = f"{dtype}, {param.numel()} elements, on {param.device}"
            found = f"{other.dtype}, {other.numel()} elements, on {other.device}"
            raise RuntimeError(f"adamw_: a tensor of parameter {i} must have {needed}; has {found}")


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor on `device`, without waiting for it."""
    if tensor.device == device or device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    residues: Sequence[Tensor],
    table: Tensor,
    hyper: Tensor,
    grad_factor: Tensor,
    seed: int,
) -> None:
    """The operator's schema (`fastft.optim.adamw_update.OP`).

    Raises:
        RuntimeError: a tensor has not its parameter's size and device, or not the dtype that its rounding asks for.
    """
    kinds: dict[tuple[int, bool, bool], list[list[int]]] = {}
    next_max, next_residue = iter(max_exp_avg_sqs), iter(residues)
    every = zip(params, grads, exp_avgs, exp_avg_sqs, table.tolist(), strict=True)
    for i, (param, grad, exp_avg, exp_avg_sq, (hyper_row, rounding, amsgrad, first)) in enumerate(every):
        moment = torch.bfloat16 if exp_avg.dtype == torch.bfloat16 else torch.float32
        kept = torch.float32 if rounding == Rounding.FP32 else torch.bfloat16
        largest = [next(next_max)] if amsgrad else []
        residue = [next(next_residue)] if rounding in RESIDUES else []
        dtypes = [kept, kept, moment, moment, *[moment] * len(largest)]
        _check(i, param, [param, grad, exp_avg, exp_avg_sq, *largest], dtypes)
        _check(i, param, residue, [RESIDUES[Rounding(rounding)][1]] if residue else [])
        if param.numel() == 0:
            continue
        pointers = [tensor.data_ptr() for tensor in (param, grad, exp_avg, exp_avg_sq)]
        pointers += [tensors[0].data_ptr() if tensors else 0 for tensors in (largest, residue)]
        rows = kinds.setdefault((rounding, moment == torch.bfloat16, bool(amsgrad)), [])
        rows.append([*pointers, param.numel(), first, hyper_row])
    if not kinds:
        return
    device = params[0].device
    hyper = _sent(hyper, device)
    for (rounding, narrow, amsgrad), rows in kinds.items():
        ends = list(accumulate(-(-row[6] // (8 * _GROUPS)) for row in rows))
        header = [seed, len(rows), *[0] * 8]
        lines = [header, *([*row, begin] for row, begin in zip(rows, [0, *ends], strict=False))]
        aligned = all(address % 16 == 0 for row in rows for address in row[:6]) and all(row[7] % 8 == 0 for row in rows)
        with torch.cuda.device_of(params[0]):
            _adamw_kernel[(ends[-1],)](
                _sent(torch.tensor(lines, dtype=torch.int64), device), hyper, grad_factor, ROUNDING=rounding,
                NARROW=narrow, AMSGRAD=bool(amsgrad), ALIGNED=aligned, GROUPS=_GROUPS, num_warps=8,
                enable_fp_fusion=False,
            )  # fmt: skip
