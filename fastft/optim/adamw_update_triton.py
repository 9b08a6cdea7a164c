"""The Triton engine of `adamw_`: one launch over all tensors that are kept in one way.

A program updates 2048 elements of one tensor, or 16 blocks of 8-bit moments, which have fewer
elements where rows are short. A table in device memory has a row of 13 int64 for each tensor,

    param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, residue    addresses, 0 for none
    numel
    first                                       index of the first element, for the random bits
    hyper row, first program
    exp_avg_scale, exp_avg_sq_scale, columns                     of 8-bit moments, else 0

below a row with the seed and the number of tensors. It is written anew at every call, from pinned
memory, so that nothing waits for the device. A CUDA graph would record these copies and repeat
them, with the numbers and addresses of its capture: that is refused (`impl="cuda"` can be
captured).

The arithmetic is that of csrc/include/adamw_math.h and moments_8bit.h, with its bits: division and
square root rounded to nearest, no fused multiply-add but the two that are written, bf16 values as
the integers that they are. Eight neighbours share a Philox call. Accesses are of 16 bytes (of 8 to
codes) where all tensors begin on 16 bytes, but for each tensor's last program; where one does not,
all of the launch go by single elements, as they do where rows of 8-bit moments have another length
than a multiple of eight.
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

from fastft import ops
from fastft.optim.adamw_update import RESIDUES, ROUNDS, STREAMS, Rounding
from fastft.optim.device_counts import is_capturing
from fastft.optim.moment_blocks import BLOCK, scale_shape

_COLUMNS = tl.constexpr(13)
_HYPER = tl.constexpr(9)
_GROUPS = 256  # of eight elements, one a thread
_BLOCK = tl.constexpr(BLOCK)
_SQ_UNITS = tl.constexpr(2621440.0)  # code 255 in units of code 0
_SMALL_SCALE = tl.constexpr(2.0**-100)
_ROUNDS = tl.constexpr(ROUNDS)
_OF_PARAM, _OF_MOMENTS, _OF_MAX_EXP_AVG_SQ = map(tl.constexpr, STREAMS.values())
_EXACT, _KAHAN, _STOCHASTIC = (
    tl.constexpr(int(Rounding[name])) for name in ("EXACT", "KAHAN", "STOCHASTIC")
)


@triton.jit
def _widen(x):
    """Values as fp32, which are fp32 or bf16 as int16."""
    return (x.to(tl.int32) << 16).to(tl.float32, bitcast=True) if x.dtype == tl.int16 else x


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
def _draw(seed, elements, step, STREAM: tl.constexpr, ALIGNED: tl.constexpr):
    """The random bits of eight elements from each of `elements` (GROUPS, 1) on.

    ALIGNED: they are multiples of 8.
    """
    within = tl.arange(0, 8)[None, :]
    if ALIGNED:
        call = elements // 8
    else:
        each = elements + within
        call, within = each // 8, (each % 8).to(tl.int32)
    c2 = tl.full(call.shape, 0, tl.uint32) + step.to(tl.uint32)
    c3 = tl.full(call.shape, STREAM, tl.uint32)
    low, high = (call & 0xFFFFFFFF).to(tl.uint32), (call >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, high, c2, c3, _ROUNDS)
    word = tl.where(within < 4, tl.where(within < 2, w0, w1), tl.where(within < 6, w2, w3))
    return tl.where(within % 2 == 0, word & 0xFFFF, word >> 16).to(tl.int32)


@triton.jit
def _place(row, COLUMN: tl.constexpr, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(row + COLUMN).to(tl.pointer_type(KIND))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _load(pointer, i, inside, FULL: tl.constexpr):
    return tl.load(pointer + i) if FULL else tl.load(pointer + i, inside, 0)


@triton.jit
def _store(pointer, i, inside, value, FULL: tl.constexpr):
    tl.store(pointer + i, value, None if FULL else inside)


@triton.jit
def _load_param(pointer, residue, i, inside, ROUNDING: tl.constexpr, FULL: tl.constexpr):
    kept = _load(pointer, i, inside, FULL)
    value = _widen(kept)
    if ROUNDING == _EXACT:
        bits = (kept.to(tl.int32) << 16) + _load(residue, i, inside, FULL).to(tl.int32)
        master = bits.to(tl.float32, bitcast=True)
        value = tl.where(master == master, master, value)
    elif ROUNDING == _KAHAN:
        value += _widen(_load(residue, i, inside, FULL))
    return value


@triton.jit
def _store_param(
    pointer, residue, i, inside, value, seed, elements, step,
    ROUNDING: tl.constexpr, FULL: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    if ROUNDING == _EXACT:
        bits = tl.where(value == value, value.to(tl.int32, bitcast=True), 0x7FC00000)
        _store(pointer, i, inside, ((bits + 0x8000) >> 16).to(tl.int16), FULL)
        _store(residue, i, inside, bits.to(tl.int16), FULL)
    elif ROUNDING == _KAHAN:
        rounded = _nearest(value)
        lost = value - _widen(rounded)
        _store(pointer, i, inside, rounded, FULL)
        compensation = tl.where(lost - lost == 0.0, _nearest(lost), 0).to(tl.int16)
        _store(residue, i, inside, compensation, FULL)
    elif ROUNDING == _STOCHASTIC:
        random = _draw(seed, elements, step, _OF_PARAM, ALIGNED)
        _store(pointer, i, inside, _stochastic(value, random), FULL)
    elif ROUNDING == 0:
        _store(pointer, i, inside, value, FULL)
    else:
        _store(pointer, i, inside, _nearest(value), FULL)


@triton.jit
def _swap_bytes(random):
    return (random & 0xFF) << 8 | random >> 8


@triton.jit
def _new_moments(g, m, v, hyper):
    weight, beta2, one_minus_beta2 = tl.load(hyper + 1), tl.load(hyper + 2), tl.load(hyper + 3)
    near = weight < 0.5  # torch's lerp starts from the nearer end
    m = tl.fma(tl.zeros_like(g) + tl.where(near, weight, weight - 1.0), g - m, tl.where(near, m, g))
    return m, tl.fma(g * one_minus_beta2, g, v * beta2)


@triton.jit
def _divided_by(value, divisor):
    """value / divisor, a scalar, rounded to nearest: ft_div_by in adamw_math.h."""
    reciprocal = tl.div_rn(tl.zeros_like(divisor) + 1.0, divisor)
    quotient, zeros = value * reciprocal, tl.zeros_like(value)
    error = tl.fma(tl.minimum(quotient, 1e36), zeros - divisor, value)
    return tl.fma(error, zeros + reciprocal, quotient)


@triton.jit
def _new_param(p, m, largest, hyper):
    decay, negative_step = tl.load(hyper), tl.load(hyper + 4)
    correction2_sqrt, eps = tl.load(hyper + 5), tl.load(hyper + 6)
    denominator = _divided_by(tl.sqrt_rn(largest), correction2_sqrt) + eps
    return p * decay + tl.div_rn(m * negative_step, denominator)


@triton.jit
def _update_tile(
    row, hyper, factor, seed, chunk, numel,
    ROUNDING: tl.constexpr, BF16: tl.constexpr, AMSGRAD: tl.constexpr,
    FULL: tl.constexpr, ALIGNED: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Updates the elements from `chunk` on of the tensor of `row`; FULL: all are within it."""
    KIND: tl.constexpr = tl.float32 if ROUNDING == 0 else tl.int16
    MOMENT: tl.constexpr = tl.int16 if BF16 else tl.float32
    step = tl.load(hyper + 8)
    groups = chunk + tl.arange(0, GROUPS)[:, None] * 8
    i, elements = groups + tl.arange(0, 8)[None, :], tl.load(row + 7) + groups
    inside = i < numel
    param, grads = _place(row, 0, KIND, ALIGNED), _place(row, 1, KIND, ALIGNED)
    exp_avg, exp_avg_sq = _place(row, 2, MOMENT, ALIGNED), _place(row, 3, MOMENT, ALIGNED)
    residue = _place(row, 5, tl.int16, ALIGNED)
    g = _widen(_load(grads, i, inside, FULL)) * factor
    m, v = _widen(_load(exp_avg, i, inside, FULL)), _widen(_load(exp_avg_sq, i, inside, FULL))
    m, v = _new_moments(g, m, v, hyper)
    largest = v
    if AMSGRAD:
        max_exp_avg_sq = _place(row, 4, MOMENT, ALIGNED)
        old = _widen(_load(max_exp_avg_sq, i, inside, FULL))
        largest = tl.where((old > v) | (old != old), old, v)  # NaN wins, as in torch.maximum
    p = _new_param(_load_param(param, residue, i, inside, ROUNDING, FULL), m, largest, hyper)
    if BF16:
        _store_param(param, residue, i, inside, p, seed, elements, step, ROUNDING, FULL, ALIGNED)
    random = _draw(seed, elements, step, _OF_MOMENTS, ALIGNED) if BF16 else 0
    _store(exp_avg_sq, i, inside, _stochastic(v, _swap_bytes(random)) if BF16 else v, FULL)
    _store(exp_avg, i, inside, _stochastic(m, random) if BF16 else m, FULL)
    if AMSGRAD:
        if BF16:
            largest = _stochastic(largest, _draw(seed, elements, step, _OF_MAX_EXP_AVG_SQ, ALIGNED))
        _store(max_exp_avg_sq, i, inside, largest, FULL)
    # behind the moments, whose registers the parameter's random bits need: else sm_90 spills one
    if not BF16:
        _store_param(param, residue, i, inside, p, seed, elements, step, ROUNDING, FULL, ALIGNED)


@triton.jit
def _decode(m_code, v_code, m_scale, v_scale):
    """The moments of their codes, int8 and uint8."""
    root = m_code.to(tl.float32) * (1.0 / 127.0)
    m = (root * tl.abs(root)) * (root * root) * m_scale
    above = v_code.to(tl.float32) + 12.0
    # code / 12, rounded down, behind 1.5 * 2^23: half of a unit less, but for rounding errors, is
    # rounded to nearest
    twelfth, less = tl.zeros_like(above) + 1.0 / 12.0, tl.zeros_like(above) - (1.0 + 11.0 / 24.0)
    octave = tl.fma(above, twelfth, less) + 12582912.0
    place = tl.fma(octave - 12582912.0, tl.zeros_like(above) - 12.0, above)  # 12 to 23
    unit = (place * (1.0 / (12.0 * _SQ_UNITS))).to(tl.int32, bitcast=True)
    v = (unit + (octave.to(tl.int32, bitcast=True) << 23)).to(tl.float32, bitcast=True) * v_scale
    return tl.where(m_code == -128, float("nan"), m), v


@triton.jit
def _share(value, divisor):
    """value / divisor by way of the reciprocal, as share_of in moments_8bit.h."""
    up = tl.where(divisor < _SMALL_SCALE, 18446744073709551616.0, 1.0)  # 2^64
    return value * up * tl.div_rn(1.0, divisor * up)


@triton.jit
def _encode_m(m, finite, divisor, random):
    # 127^4; the minimum drops a NaN
    x = tl.minimum(_share(tl.abs(m), divisor) * 260144641.0, 260144641.0 - 64.0)
    low = tl.sqrt_rn(tl.sqrt_rn(x)).to(tl.int32)
    root = low.to(tl.float32)
    next = root + 1.0
    root, next = root * root, next * next
    below, above = root * root, next * next
    code = low + (random.to(tl.float32) * (above - below) < (x - below) * 65536.0).to(tl.int32)
    return tl.where(finite, tl.where(m < 0.0, -code, code), -128).to(tl.int8)


@triton.jit
def _encode_v(v, finite, divisor, random):
    units = tl.where(finite, _share(v, divisor) * _SQ_UNITS, 1.0)
    place = tl.minimum(tl.maximum(units, 1.0), _SQ_UNITS).to(tl.int32, bitcast=True) - 0x3F800000
    return ((place * 12 + (random << 7)) >> 23).to(tl.uint8)


@triton.jit
def _largest_of_blocks(value, finite, BLOCKS: tl.constexpr):
    """The largest finite |value| of each block (BLOCKS,), by its bits."""
    magnitude = tl.where(finite, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    return tl.max(tl.reshape(magnitude, (BLOCKS, _BLOCK)), 1).to(tl.float32, bitcast=True)


@triton.jit
def _divisor(scale, BLOCKS: tl.constexpr, GROUPS: tl.constexpr):
    """The divisor of each element (GROUPS, 8): its block's scale, or 1 where that is 0."""
    divisor = tl.where(scale == 0.0, 1.0, scale)[:, None]
    return tl.reshape(tl.broadcast_to(divisor, (BLOCKS, _BLOCK)), (GROUPS, 8))


@triton.jit
def _update_8bit_tile(
    row, hyper, factor, seed, first_block, numel,
    ROUNDING: tl.constexpr, ALIGNED: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Updates the blocks of 8-bit moments from `first_block` on, each in its part of the tile."""
    KIND: tl.constexpr = tl.float32 if ROUNDING == 0 else tl.int16
    OF_BLOCK: tl.constexpr = _BLOCK // 8
    BLOCKS: tl.constexpr = GROUPS // OF_BLOCK
    step, columns = tl.load(hyper + 8), tl.load(row + 12)
    of_row = (columns + _BLOCK - 1) // _BLOCK
    blocks = numel // columns * of_row
    group = tl.arange(0, GROUPS)[:, None]
    block, within = first_block + group // OF_BLOCK, group % OF_BLOCK * 8
    column = block % of_row * _BLOCK + within
    groups = block // of_row * columns + column
    if ALIGNED:
        groups = tl.multiple_of(groups, (8, 8))
    i, elements = groups + tl.arange(0, 8)[None, :], tl.load(row + 7) + groups
    there = block < blocks
    inside = there & (column < columns)  # of eight neighbours all or none, if rows are aligned
    if not ALIGNED:
        inside = there & (column + tl.arange(0, 8)[None, :] < columns)
    param, grads = _place(row, 0, KIND, ALIGNED), _place(row, 1, KIND, ALIGNED)
    exp_avg, exp_avg_sq = _place(row, 2, tl.int8, ALIGNED), _place(row, 3, tl.uint8, ALIGNED)
    residue = _place(row, 5, tl.int16, ALIGNED)
    m_scales, v_scales = _place(row, 10, tl.float32, False), _place(row, 11, tl.float32, False)
    m, v = _decode(
        _load(exp_avg, i, inside, False),
        _load(exp_avg_sq, i, inside, False),
        tl.load(m_scales + block, there, 0.0),
        tl.load(v_scales + block, there, 0.0),
    )
    m, v = _new_moments(_widen(_load(grads, i, inside, False)) * factor, m, v, hyper)
    p = _new_param(_load_param(param, residue, i, inside, ROUNDING, False), m, v, hyper)
    _store_param(param, residue, i, inside, p, seed, elements, step, ROUNDING, False, ALIGNED)
    finite = (tl.abs(m) < float("inf")) & (v < float("inf"))  # no v is below 0
    m_scale = _largest_of_blocks(m, finite & inside, BLOCKS)
    v_scale = _largest_of_blocks(v, finite & inside, BLOCKS)
    tl.debug_barrier()  # every warp has read the old scales
    own = first_block + tl.arange(0, BLOCKS)
    tl.store(m_scales + own, m_scale, own < blocks)
    tl.store(v_scales + own, v_scale, own < blocks)
    random = _draw(seed, elements, step, _OF_MOMENTS, ALIGNED)
    m_code = _encode_m(m, finite, _divisor(m_scale, BLOCKS, GROUPS), random)
    v_code = _encode_v(v, finite, _divisor(v_scale, BLOCKS, GROUPS), _swap_bytes(random))
    _store(exp_avg, i, inside, m_code, False)
    _store(exp_avg_sq, i, inside, v_code, False)


@triton.jit
def _adamw_kernel(
    table, hyper, grad_factor,
    ROUNDING: tl.constexpr, BITS: tl.constexpr, AMSGRAD: tl.constexpr,
    ALIGNED: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    TILE: tl.constexpr = 8 * GROUPS
    BF16: tl.constexpr = BITS == 16
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
    number = program - tl.load(row + 9)
    chunk = number * TILE
    if BITS == 8:
        _update_8bit_tile(
            row, hyper, factor, seed, number * (TILE // _BLOCK), numel,
            ROUNDING, ALIGNED, GROUPS,
        )  # fmt: skip
    elif chunk + TILE <= numel:
        _update_tile(
            row, hyper, factor, seed, chunk, numel,
            ROUNDING, BF16, AMSGRAD, True, ALIGNED, GROUPS,
        )  # fmt: skip
    else:
        _update_tile(
            row, hyper, factor, seed, chunk, numel,
            ROUNDING, BF16, AMSGRAD, False, ALIGNED, GROUPS,
        )  # fmt: skip


def _check(i: int, param: Tensor, others: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> None:
    """Raises where a tensor does not fit its parameter: the kernel knows addresses only."""
    for other, dtype in zip(others, dtypes, strict=True):
        if (other.dtype, other.numel(), other.device) != (dtype, param.numel(), param.device):
            needed = f"{dtype}, {param.numel()} elements, on {param.device}"
            found = f"{other.dtype}, {other.numel()} elements, on {other.device}"
            raise RuntimeError(f"adamw_: a tensor of parameter {i} must have {needed}; has {found}")


def _check_8bit(
    i: int, param: Tensor, tensors: Sequence[Tensor], scales: Sequence[Tensor], amsgrad: bool
) -> None:
    """Raises where 8-bit moments, or their scales, do not fit their parameter."""
    contiguous = all(tensor.is_contiguous() for tensor in (*tensors, *scales))
    if param.ndim < 1 or amsgrad or not contiguous:
        raise RuntimeError(
            f"adamw_: parameter {i}: 8-bit moments are for contiguous tensors without amsgrad"
        )
    shape = scale_shape(param.shape)
    for scale in scales:
        if (scale.dtype, scale.shape, scale.device) != (torch.float32, shape, param.device):
            raise RuntimeError(
                f"adamw_: a scale of parameter {i} must have torch.float32, shape {shape}"
            )


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a small tensor to `device`, without waiting for it."""
    if tensor.device == device or device.type not in ops.ENGINES["triton"].devices:
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
    """The operator's schema (`fastft.optim.adamw_update.ADAMW`).

    Raises:
        RuntimeError: a tensor has not its parameter's size and device, or not the dtype that its
            rounding asks for; or a CUDA graph is capturing.
    """
    if is_capturing():
        raise RuntimeError(
            "adamw_: a CUDA graph cannot capture the Triton engine, its replays would repeat the "
            "step count, learning rate and addresses of the capture: use impl='cuda' with "
            "capturable=True (python -m fastft says what that lacks here), or leave the step out "
            "of the graph"
        )
    kinds: dict[tuple[int, int, bool], list[list[int]]] = {}
    next_max, next_residue = iter(max_exp_avg_sqs), iter(residues)
    every = zip(params, grads, exp_avgs, exp_avg_sqs, table.tolist(), strict=True)
    for i, (param, grad, exp_avg, exp_avg_sq, entry) in enumerate(every):
        hyper_row, rounding, amsgrad, first = entry
        eight_bit = exp_avg.dtype == torch.int8
        moment = torch.bfloat16 if exp_avg.dtype == torch.bfloat16 else torch.float32
        moments = [torch.int8, torch.uint8] if eight_bit else [moment, moment]
        kept = torch.float32 if rounding == Rounding.FP32 else torch.bfloat16
        largest = [next(next_max)] if amsgrad else []
        residue = [next(next_residue)] if rounding in RESIDUES else []
        scales = [next(next_residue), next(next_residue)] if eight_bit else []
        dtypes = [kept, kept, *moments, *[moment] * len(largest)]
        _check(i, param, [param, grad, exp_avg, exp_avg_sq, *largest], dtypes)
        _check(i, param, residue, [RESIDUES[Rounding(rounding)][1]] if residue else [])
        if eight_bit:
            _check_8bit(i, param, [param, grad, exp_avg, exp_avg_sq], scales, bool(amsgrad))
        if param.numel() == 0:
            continue
        pointers = [tensor.data_ptr() for tensor in (param, grad, exp_avg, exp_avg_sq)]
        pointers += [tensors[0].data_ptr() if tensors else 0 for tensors in (largest, residue)]
        of_blocks = [0, 0, 0]
        if eight_bit:
            of_blocks = [*(scale.data_ptr() for scale in scales), param.numel() // len(scales[0])]
        rows = kinds.setdefault((rounding, 8 * exp_avg.itemsize, bool(amsgrad)), [])
        rows.append([*pointers, param.numel(), first, hyper_row, *of_blocks])
    if kinds:
        _launch(kinds, _sent(hyper, params[0].device), grad_factor, seed, params[0].device)


def _launch(
    kinds: dict[tuple[int, int, bool], list[list[int]]],
    hyper: Tensor,
    grad_factor: Tensor,
    seed: int,
    on: torch.device,
) -> None:
    """Launches once for each kind, over rows of the table that lack the first program."""
    for (rounding, bits, amsgrad), rows in kinds.items():
        ends = list(accumulate(map(_programs, rows)))
        lines = [[seed, len(rows), *[0] * 11]]
        lines += [[*row[:9], begin, *row[9:]] for row, begin in zip(rows, [0, *ends], strict=False)]
        aligned = all(address % 16 == 0 for row in rows for address in row[:6])
        aligned &= all(row[7] % 8 == 0 and row[11] % 8 == 0 for row in rows)
        _adamw_kernel[(ends[-1],)](
            _sent(torch.tensor(lines, dtype=torch.int64), on), hyper, grad_factor,
            ROUNDING=rounding, BITS=bits, AMSGRAD=amsgrad, ALIGNED=aligned, GROUPS=_GROUPS,
            num_warps=_GROUPS // ops.wave(on), enable_fp_fusion=False,
        )  # fmt: skip


def _programs(row: list[int]) -> int:
    numel, columns, tile = row[6], row[11], 8 * _GROUPS
    if not columns:
        return -(-numel // tile)
    blocks = numel // columns * -(-columns // BLOCK)
    return -(-blocks // (tile // BLOCK))
