"""The Triton engine of `cross_entropy_rows`: one program a row, one launch for all results.

Pass 1 keeps, for every lane, a running maximum of the logits without the target's, the sum of their
exponentials below it and what the options ask for beside it; pass 2 writes the gradient. All maths
is fp32; the formulas are those of `fastft.loss.cross_entropy_rows`. exp, log1p and tanh are written
out here, because `tl.exp` errs by |x| roundings, which a confident row would show, and `tl.math`
has neither of the other two.

Bytes moved: the logits are read twice, the second time from the end of the row, which is still in
the L2 cache, and their gradient is written once; class weights are read as often as logits, from
the cache. Without a gradient: one read. Where rows do not start on 16 bytes (an odd number of
classes), the tiles are laid from the 16 bytes before the row, so that all but the first and last
are loaded 16 bytes at a time; those two go by single elements. If logits and gradient are not
equally far from 16 bytes, every access is by single elements: 8 times the load instructions for 16
bits.

The values of the options are run-time numbers and never compile a new kernel; that an option is
used at all does.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton types what its kernels take when they are launched.
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft import ops
from fastft.ops import check_beside

# It is finite: the difference of two of them is 0 and not NaN.
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
_FAR = tl.constexpr(-200.0)  # exp of it is 0 in fp32; products with it stay finite
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _at_least(x, low):
    return tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _exp(x):
    """exp for -200 <= x <= 0; the rounding error of the product with log2(e) is added back."""
    power = x * 1.4426950408889634
    lost = tl.fma(x, 1.4426950216293335, -power)  # log2(e) as fp32 holds it, and the rest of it
    lost = tl.fma(x, 1.925963033500e-8, lost)
    value = tl.exp2(power)
    return tl.fma(value, lost * 0.6931471805599453, value)


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= -1: the series of 2 atanh(f / (2 + f)), where 1 + x = 2^n (1 + f)."""
    bits = (1.0 + x).to(tl.int32, bitcast=True)
    n = tl.where(x < 0.4, 0, (bits - 0x3F3504F3) >> 23)
    f = tl.where(x < 0.4, x, (bits - (n << 23)).to(tl.float32, bitcast=True) - 1.0)
    s = f / (2.0 + f)
    square = s * s
    series = tl.fma(square, 0.18181818, 0.22222222)
    series = tl.fma(series, square, 0.28571429)
    series = tl.fma(series, square, 0.4)
    series = tl.fma(series, square, 0.66666667)
    log = tl.fma(n.to(tl.float32), 0.6931471805599453, tl.fma(s * square, series, 2.0 * s))
    return tl.where(x == -1.0, float("-inf"), log + (x - x))  # NaN stays NaN


@triton.jit
def _tanh(x):
    square = x * x
    series = tl.fma(square, -5.70498872745e-3, 2.06390887954e-2)
    series = tl.fma(series, square, -5.37397155531e-2)
    series = tl.fma(series, square, 1.33314422036e-1)
    series = tl.fma(series, square, -3.33332819422e-1)
    near = tl.fma(series * square, x, x)
    decay = _exp(_at_least(-2.0 * tl.abs(x), _FAR))
    far = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def _load(row, position, tile, end, shift, PEELED: tl.constexpr, TILE: tl.constexpr):
    """Logits at `position`, all within `TILE` from `tile`; -Inf beside the row [shift, end)."""
    if PEELED:
        if (tile >= shift) & (tile + TILE <= end):
            x = tl.load(row + position)
        else:
            x = tl.load(row + position, (position >= shift) & (position < end), float("-inf"))
    else:
        x = tl.load(row + position, position < end, float("-inf"))
    return x.to(tl.float32)


@triton.jit
def _store(row, position, tile, end, shift, x, PEELED: tl.constexpr, TILE: tl.constexpr):
    """Writes where `_load` reads."""
    if PEELED:
        if (tile >= shift) & (tile + TILE <= end):
            tl.store(row + position, x)
        else:
            tl.store(row + position, x, (position >= shift) & (position < end))
    else:
        tl.store(row + position, x, position < end)


@triton.jit
def _transform(x, scale, softcap, softcap_inverse, SCALED: tl.constexpr, CAPPED: tl.constexpr):
    if SCALED:
        x = x * scale
    if CAPPED:
        x = softcap * _tanh(x * softcap_inverse)
    return x


@triton.jit
def _add_up(
    row, offset, weight, shift, end, target_position, z_y, center,
    scale, softcap, softcap_inverse,
    RANKED: tl.constexpr, MOMENTS: tl.constexpr, SMOOTHED: tl.constexpr, SCALED: tl.constexpr,
    CAPPED: tl.constexpr, PEELED: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Pass 1: what each lane knows of its part of the row; its sums are relative to its peak.

    Returns:
        The peak of the logits without the target's; the sums of their exponentials, and of these
        times their distance from the peak (MOMENTS); the weighted sum of their distances from
        `center`, and of the weights (SMOOTHED); whether one beats the target (RANKED).
    """
    TILE: tl.constexpr = LANES * VECTOR
    peak = tl.full((LANES,), _LOWEST, tl.float32)
    total, moment = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
    below, weights = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
    beaten = tl.zeros((LANES,), tl.int32)
    for tile in range(0, end, TILE):
        position = tile + offset
        inside = (position >= shift) & (position < end)
        z = _load(row, position, tile, end, shift, PEELED, TILE)
        z = _transform(z, scale, softcap, softcap_inverse, SCALED, CAPPED)
        if RANKED:
            behind = (z < z_y) | ((z == z_y) & (position >= target_position))
            beaten = tl.maximum(beaten, tl.max((inside & ~behind).to(tl.int32), 1))
        if SMOOTHED:
            distance = center - z
            if weight is not None:
                w = tl.load(weight + (position - shift), inside, 0.0)
                weights += tl.sum(w, 1)
                distance *= w
            below += tl.sum(tl.where(inside, distance, 0.0), 1)
        z = tl.where(inside & (position != target_position), z, float("-inf"))
        higher = tl.maximum(peak, tl.max(z, 1))
        d = _at_least(z - higher[:, None], _FAR)
        e = _exp(d)
        rescaled = _at_least(peak - higher, _FAR)
        keep = _exp(rescaled)
        if MOMENTS:  # the entropy is asked for, or has a gradient
            moment = (moment + total * rescaled) * keep + tl.sum(e * d, 1)
        total = total * keep + tl.sum(e, 1)
        peak = higher
    return peak, total, moment, below, weights, beaten


@triton.jit
def _write_gradient(
    row, grad_row, weight, shift, end, target_position,
    maximum, inverse, slope, g_h, dz_y, unit,
    scale, softcap, softcap_inverse,
    BENT: tl.constexpr, SMOOTHED: tl.constexpr, SCALED: tl.constexpr, CAPPED: tl.constexpr,
    PEELED: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Pass 2, from the end of the row: the gradient of the logits, and for the target dz_y.

    It is softmax * (slope - g_h * (z - maximum)) - unit * w.
    """
    TILE: tl.constexpr = LANES * VECTOR
    offset = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    tiles = tl.cdiv(end, TILE)
    for k in range(0, tiles):
        tile = (tiles - 1 - k) * TILE
        position = tile + offset
        z = _load(row, position, tile, end, shift, PEELED, TILE)
        z = _transform(z, scale, softcap, softcap_inverse, SCALED, CAPPED)
        d = _at_least(z - maximum, _FAR)
        p = _exp(d) * inverse
        if BENT:
            dz = p * (slope - g_h * d)
        else:
            dz = p * slope
        dz = tl.where(position == target_position, dz_y, dz)
        if SMOOTHED:
            if weight is not None:
                place = weight + (position - shift)
                dz -= unit * tl.load(place, (position >= shift) & (position < end), 0.0)
            else:
                dz -= unit
        if CAPPED:
            ratio = z * softcap_inverse
            dz *= (1.0 - ratio) * (1.0 + ratio)
        if SCALED:
            dz *= scale
        _store(grad_row, position, tile, end, shift, dz.to(grad_row.dtype.element_ty), PEELED, TILE)


@triton.jit(do_not_specialize=["ignore_index"])
def _rows_kernel(
    logits, target, weight, g_loss, g_lse, g_entropy,  # read; None where not given
    losses, lses, entropies, is_top1, grads,  # written, as far as they are given
    classes, stride, grad_stride, ignore_index,
    smoothing, z_loss, scale, softcap, softcap_inverse,
    MOMENTS: tl.constexpr, SMOOTHED: tl.constexpr, SCALED: tl.constexpr, CAPPED: tl.constexpr,
    PEELED: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    TILE: tl.constexpr = LANES * VECTOR
    r = tl.program_id(0).to(tl.int64)  # a row times its stride may pass 2^31
    offset = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    row = logits + r * stride
    shift = 0
    if PEELED:
        ITEMSIZE: tl.constexpr = logits.dtype.element_ty.primitive_bitwidth // 8
        shift = (row.to(tl.int64, bitcast=True) % 16).to(tl.int32) // ITEMSIZE
        row = tl.multiple_of(row - shift, 16)
    end = shift + classes
    y = tl.load(target + r)
    if grads is not None:
        grad_row = grads + r * grad_stride - shift
        if PEELED:
            grad_row = tl.multiple_of(grad_row, 16)
    if y == ignore_index:
        tl.store(losses + r, 0.0)
        tl.store(lses + r, 0.0)
        if entropies is not None:
            tl.store(entropies + r, 0.0)
            tl.store(is_top1 + r, False)
        if grads is not None:
            zeros = tl.zeros((LANES, VECTOR), grads.dtype.element_ty)
            for tile in range(0, end, TILE):
                _store(grad_row, tile + offset, tile, end, shift, zeros, PEELED, TILE)
        return
    known = (y >= 0) & (y < classes)
    target_position = y.to(tl.int32) + shift
    z_y = tl.load(row + target_position, known, float("nan")).to(tl.float32)
    z_y = _transform(z_y, scale, softcap, softcap_inverse, SCALED, CAPPED)
    w_y, w_sum = 1.0, classes * 1.0  # Triton makes of a 1 a plain int, which has no .to
    if weight is not None:
        w_y = tl.load(weight + y, known, float("nan"))
    # sum(w (lse - z)) is taken about the target's logit: it must not cancel against w_sum * lse
    center = tl.where(z_y > float("-inf"), z_y, 0.0)

    peak, total, moment, below, weights, beaten = _add_up(
        row, offset, weight, shift, end, target_position, z_y, center,
        scale, softcap, softcap_inverse,
        entropies is not None, MOMENTS, SMOOTHED, SCALED, CAPPED,
        PEELED, LANES, VECTOR,
    )  # fmt: skip
    maximum = tl.maximum(tl.max(peak, 0), z_y)
    rescaled = _at_least(peak - maximum, _FAR)
    keep = _exp(rescaled)
    others = tl.sum(total * keep, 0)
    d_y = _at_least(z_y - maximum, _FAR)
    e_y = _exp(d_y)
    # log of the sum is log1p of the sum without the maximum's class, whose exponential is exactly 1
    log_sum = _log1p(tl.where(z_y == maximum, others, (others - 1.0) + e_y))
    inverse = 1.0 / (others + e_y)
    distance = (maximum - z_y) + log_sum  # lse - z_y
    lse = maximum + log_sum
    entropy, unit = 0.0, 0.0
    loss = (1.0 - smoothing) * w_y * distance
    if SMOOTHED:
        if weight is not None:
            w_sum = tl.sum(weights, 0)
        unit = smoothing / (classes * 1.0)
        loss += unit * (w_sum * tl.where(z_y > float("-inf"), distance, lse) + tl.sum(below, 0))
    tl.store(losses + r, loss + z_loss * lse * lse)
    tl.store(lses + r, lse)
    if MOMENTS:
        entropy = log_sum - (tl.sum((moment + total * rescaled) * keep, 0) + e_y * d_y) * inverse
    if entropies is not None:
        tl.store(entropies + r, entropy)
        tl.store(is_top1 + r, tl.max(beaten, 0) == 0)

    if grads is not None:
        g, g_h = 1.0, 0.0
        if g_loss is not None:
            g = tl.load(g_loss + r)
        onehot = g * (1.0 - smoothing) * w_y
        unit *= g
        spread = unit * w_sum + g * 2.0 * z_loss * lse
        if g_entropy is not None:
            g_h = tl.load(g_entropy + r)
            spread += tl.load(g_lse + r) + g_h * (log_sum - entropy)
        slope = onehot + spread  # what the softmax is multiplied by
        # the target's softmax - 1 is -others / sum
        dz_y = e_y * inverse * (spread - g_h * d_y) - onehot * others * inverse
        _write_gradient(
            row, grad_row, weight, shift, end, target_position,
            maximum, inverse, slope, g_h, dz_y, unit,
            scale, softcap, softcap_inverse,
            g_entropy is not None, SMOOTHED, SCALED, CAPPED,
            PEELED, LANES, VECTOR,
        )  # fmt: skip


def _shape(classes: int, itemsize: int, loads: int, wave: int) -> tuple[int, int, int]:
    """Lanes, elements a lane and warps of a program.

    The longer the rows, the fewer are at once in flight, because they share the L2 cache. A thread
    of a wave of 32 has up to 32 bytes of logits in flight; 16 where the options need the registers.
    One of a wave of 64 has half of that: the mask of each element takes it two scalar registers.
    Not yet tuned on a GPU.
    """
    steps = ((1024, 32), (8192, 128), (65_536, 256))
    threads = max(next((few for most, few in steps if classes <= most), 512), wave)
    return threads * loads, 512 // wave // itemsize, threads // wave


def _peeled(logits: Tensor, grads: Sequence[Tensor]) -> bool:
    """Says whether rows begin or end off 16 bytes, and the gradient's as far off as the logits'."""
    vector = 16 // logits.element_size()
    if (logits.data_ptr() % 16, logits.stride(0) % vector, logits.shape[1] % 16) == (0, 0, 0):
        return False
    return all(
        (grad.data_ptr() - logits.data_ptr()) % 16 == 0
        and (grad.stride(0) - logits.stride(0)) % vector == 0
        for grad in grads
    )


def cross_entropy_rows(
    logits: Tensor,
    target: Tensor,
    weight: Sequence[Tensor],
    upstream: Sequence[Tensor],
    losses: Tensor,
    lse: Tensor,
    statistics: Sequence[Tensor],
    grad: Sequence[Tensor],
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
) -> None:
    """The operator's schema (`fastft.loss.cross_entropy_rows.ROWS`) for fp32, bf16 and fp16 logits.

    Raises:
        TypeError: the logits have another dtype.
        RuntimeError: a tensor is on another device than the logits.
    """
    if logits.dtype not in _DTYPES:
        raise TypeError(
            f"logits must be float32, bfloat16 or float16 for the triton engine, got {logits.dtype}"
        )
    rows, classes = logits.shape
    if rows == 0:
        return
    moments = bool(statistics) or len(upstream) == 3
    simple = not (weight or moments or softcap)
    loads = 2 if simple and classes > 1024 else 1
    lanes, vector, warps = _shape(classes, logits.element_size(), loads, ops.wave(logits.device))
    g_loss, g_lse, g_entropy = (*upstream, None, None, None)[:3]
    entropy, is_top1 = statistics or (None, None)
    named = {"target": target, "losses": losses, "lse": lse, "entropy": entropy, "is_top1": is_top1}
    for name, several in (("weight", weight), ("upstream", upstream), ("grad", grad)):
        named |= {f"{name}[{i}]": tensor for i, tensor in enumerate(several)}
    check_beside("cross_entropy_rows", "logits", logits, **named)
    _rows_kernel[(rows,)](
        logits, target, *(weight or (None,)), g_loss, g_lse, g_entropy,
        losses, lse, entropy, is_top1, *(grad or (None,)),
        classes, logits.stride(0), grad[0].stride(0) if grad else 0, ignore_index,
        float(label_smoothing), float(z_loss), float(logit_scale), float(softcap),
        1.0 / softcap if softcap else 0.0,
        MOMENTS=moments, SMOOTHED=label_smoothing != 0,
        SCALED=logit_scale != 1, CAPPED=softcap != 0,
        PEELED=_peeled(logits, grad), LANES=lanes, VECTOR=vector,
        num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
