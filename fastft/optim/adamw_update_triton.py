"""The Triton engine of `adamw_`: one launch over all tensors that are kept in one way.

A program updates 2048 elements of one tensor, or 16 blocks of codes, which have fewer
elements where rows are short. A table in device memory has a row of 13 int64 for each tensor,

    param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, residue    addresses, 0 for none
    numel
    first                                       index of the first element, for the random bits
    hyper row, first program
    exp_avg_scale, exp_avg_sq_scale, columns                     of codes, else 0

below a row with the seed and the number of tensors. It is written anew at every call, from pinned
memory, so that nothing waits for the device. A CUDA graph would record these copies and repeat
them, with the numbers and addresses of its capture: that is refused (`impl="cuda"` can be
captured).

Accesses are of 16 bytes (of 8 or 4 to codes) where all tensors begin on 16 bytes, but for each
tensor's last program; where one does not, all of the launch go by single elements, as they do where
rows of codes have another length than a multiple of eight.
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
from fastft.optim import moment_codes
from fastft.optim.adamw_codes_triton import update_coded_tile
from fastft.optim.adamw_elements_triton import (
    OF_MAX_EXP_AVG_SQ,
    OF_MOMENTS,
    draw,
    load,
    load_param,
    new_moments,
    new_param,
    place,
    stochastic,
    store,
    store_param,
    swap_bytes,
    widen,
)
from fastft.optim.adamw_update import RESIDUES, Rounding
from fastft.optim.device_counts import is_capturing
from fastft.optim.moment_blocks import BLOCK
from fastft.optim.moment_codes import Code

_COLUMNS = tl.constexpr(13)
_HYPER = tl.constexpr(9)
_GROUPS = 256  # of eight elements, one a thread
_BLOCK = tl.constexpr(BLOCK)


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
    param, grads = place(row, 0, KIND, ALIGNED), place(row, 1, KIND, ALIGNED)
    exp_avg, exp_avg_sq = place(row, 2, MOMENT, ALIGNED), place(row, 3, MOMENT, ALIGNED)
    residue = place(row, 5, tl.int16, ALIGNED)
    g = widen(load(grads, i, inside, FULL)) * factor
    m, v = widen(load(exp_avg, i, inside, FULL)), widen(load(exp_avg_sq, i, inside, FULL))
    m, v = new_moments(g, m, v, hyper)
    largest = v
    if AMSGRAD:
        max_exp_avg_sq = place(row, 4, MOMENT, ALIGNED)
        old = widen(load(max_exp_avg_sq, i, inside, FULL))
        largest = tl.where((old > v) | (old != old), old, v)  # NaN wins, as in torch.maximum
    p = new_param(load_param(param, residue, i, inside, ROUNDING, FULL), m, largest, hyper)
    if BF16:
        store_param(param, residue, i, inside, p, seed, elements, step, ROUNDING, FULL, ALIGNED)
    random = draw(seed, elements, step, OF_MOMENTS, ALIGNED) if BF16 else 0
    store(exp_avg_sq, i, inside, stochastic(v, swap_bytes(random)) if BF16 else v, FULL)
    store(exp_avg, i, inside, stochastic(m, random) if BF16 else m, FULL)
    if AMSGRAD:
        if BF16:
            largest = stochastic(largest, draw(seed, elements, step, OF_MAX_EXP_AVG_SQ, ALIGNED))
        store(max_exp_avg_sq, i, inside, largest, FULL)
    # behind the moments, whose registers the parameter's random bits need: else sm_90 spills one
    if not BF16:
        store_param(param, residue, i, inside, p, seed, elements, step, ROUNDING, FULL, ALIGNED)


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
    if BITS <= 8:
        update_coded_tile(
            row, hyper, factor, seed, number * (TILE // _BLOCK), numel,
            ROUNDING, BITS, ALIGNED, GROUPS,
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


def _check_codes(
    i: int, param: Tensor, grad: Tensor, entries: Sequence[Tensor], code: Code, amsgrad: bool
) -> None:
    """Raises where codes, or their scales, do not fit their parameter."""
    if param.ndim < 1 or amsgrad or not all(map(Tensor.is_contiguous, (param, grad, *entries))):
        raise RuntimeError(
            f"adamw_: parameter {i}: 8-bit and 4-bit moments are for contiguous tensors without "
            "amsgrad"
        )
    forms = code.forms(param.shape).items()
    for entry, (name, (dtype, shape)) in zip(entries, forms, strict=True):
        if (entry.dtype, entry.shape, entry.device) != (dtype, shape, param.device):
            raise RuntimeError(
                f"adamw_: {name} of parameter {i} must have {dtype}, shape {tuple(shape)}, on "
                f"{param.device}; has {entry.dtype}, shape {tuple(entry.shape)}, on {entry.device}"
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
        code = moment_codes.code_of(exp_avg)
        kept = torch.float32 if rounding == Rounding.FP32 else torch.bfloat16
        largest = [next(next_max)] if amsgrad else []
        residue = [next(next_residue)] if rounding in RESIDUES else []
        scales = [next(next_residue), next(next_residue)] if code else []
        _check(i, param, [param, grad], [kept, kept])
        _check(i, param, residue, [RESIDUES[Rounding(rounding)][1]] if residue else [])
        if code:
            _check_codes(i, param, grad, [exp_avg, exp_avg_sq, *scales], code, bool(amsgrad))
        else:
            moment = torch.bfloat16 if exp_avg.dtype == torch.bfloat16 else torch.float32
            moments = [exp_avg, exp_avg_sq, *largest]
            _check(i, param, moments, [moment] * len(moments))
        if param.numel() == 0:
            continue
        pointers = [tensor.data_ptr() for tensor in (param, grad, exp_avg, exp_avg_sq)]
        pointers += [tensors[0].data_ptr() if tensors else 0 for tensors in (largest, residue)]
        of_blocks = [0, 0, 0]
        if code:
            of_blocks = [*(scale.data_ptr() for scale in scales), param.numel() // len(scales[0])]
        bits = 8 * exp_avg.itemsize // (code.packed if code else 1)
        rows = kinds.setdefault((rounding, bits, bool(amsgrad)), [])
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
            _sent(torch.tensor(lines, dtype=torch.int64, device="cpu"), on), hyper, grad_factor,
            ROUNDING=rounding, BITS=bits, AMSGRAD=amsgrad, ALIGNED=aligned, GROUPS=_GROUPS,
            num_warps=_GROUPS // ops.wave(on), enable_fp_fusion=False,
        )  # fmt: skip


def _programs(row: list[int]) -> int:
    numel, columns, tile = row[6], row[11], 8 * _GROUPS
    if not columns:
        return -(-numel // tile)
    blocks = numel // columns * -(-columns // BLOCK)
    return -(-blocks // (tile // BLOCK))
