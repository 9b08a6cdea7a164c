"""Elements of an AdamW tensor as a Triton program reads, draws for, updates and writes them: groups
of eight neighbours, fp32 inside.

The arithmetic is that of csrc/include/adamw_math.h, with its bits: division and square root rounded
to nearest, no fused multiply-add but the two that are written, bf16 values as the integers that
they are. Eight neighbours share a Philox call.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton types what its kernels take when they are launched.
from __future__ import annotations

import triton
import triton.language as tl

from fastft.optim.adamw_update import ROUNDS, STREAMS, Rounding

_ROUNDS = tl.constexpr(ROUNDS)
OF_PARAM, OF_MOMENTS, OF_MAX_EXP_AVG_SQ = map(tl.constexpr, STREAMS.values())
_EXACT, _KAHAN, _STOCHASTIC = (
    tl.constexpr(int(Rounding[name])) for name in ("EXACT", "KAHAN", "STOCHASTIC")
)


@triton.jit
def widen(x):
    """Values as fp32, which are fp32 or bf16 as int16."""
    return (x.to(tl.int32) << 16).to(tl.float32, bitcast=True) if x.dtype == tl.int16 else x


@triton.jit
def _nearest(x):
    """The nearest bf16, ties to even, as int16."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x == x, rounded, 0x7FC0).to(tl.int16)


@triton.jit
def stochastic(x, random):
    """One of the two neighbouring bf16 values, as int16; `random` is in [0, 65535]."""
    rounded = (x.to(tl.int32, bitcast=True) + random) >> 16
    return tl.where(x == x, rounded, 0x7FC0).to(tl.int16)


@triton.jit
def draw(seed, elements, step, STREAM: tl.constexpr, ALIGNED: tl.constexpr):
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
def place(row, COLUMN: tl.constexpr, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    """A tensor's address out of its row of the table; ALIGNED: on 16 bytes."""
    pointer = tl.load(row + COLUMN).to(tl.pointer_type(KIND))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def load(pointer, i, inside, FULL: tl.constexpr):
    """Elements `i`, 0 where they are not `inside`; FULL: all are."""
    return tl.load(pointer + i) if FULL else tl.load(pointer + i, inside, 0)


@triton.jit
def store(pointer, i, inside, value, FULL: tl.constexpr):
    """Stores elements `i` which are `inside`; FULL: all are."""
    tl.store(pointer + i, value, None if FULL else inside)


@triton.jit
def load_param(pointer, residue, i, inside, ROUNDING: tl.constexpr, FULL: tl.constexpr):
    """Parameters in fp32, with what their rounding has kept."""
    kept = load(pointer, i, inside, FULL)
    value = widen(kept)
    if ROUNDING == _EXACT:
        bits = (kept.to(tl.int32) << 16) + load(residue, i, inside, FULL).to(tl.int32)
        master = bits.to(tl.float32, bitcast=True)
        value = tl.where(master == master, master, value)
    elif ROUNDING == _KAHAN:
        value += widen(load(residue, i, inside, FULL))
    return value


@triton.jit
def store_param(
    pointer, residue, i, inside, value, seed, elements, step,
    ROUNDING: tl.constexpr, FULL: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Stores parameters, and beside them what their rounding keeps."""
    if ROUNDING == _EXACT:
        bits = tl.where(value == value, value.to(tl.int32, bitcast=True), 0x7FC00000)
        store(pointer, i, inside, ((bits + 0x8000) >> 16).to(tl.int16), FULL)
        store(residue, i, inside, bits.to(tl.int16), FULL)
    elif ROUNDING == _KAHAN:
        rounded = _nearest(value)
        lost = value - widen(rounded)
        store(pointer, i, inside, rounded, FULL)
        compensation = tl.where(lost - lost == 0.0, _nearest(lost), 0).to(tl.int16)
        store(residue, i, inside, compensation, FULL)
    elif ROUNDING == _STOCHASTIC:
        random = draw(seed, elements, step, OF_PARAM, ALIGNED)
        store(pointer, i, inside, stochastic(value, random), FULL)
    elif ROUNDING == 0:
        store(pointer, i, inside, value, FULL)
    else:
        store(pointer, i, inside, _nearest(value), FULL)


@triton.jit
def swap_bytes(random):
    """The random bits of an element's second moment."""
    return (random & 0xFF) << 8 | random >> 8


@triton.jit
def new_moments(g, m, v, hyper):
    """The moments behind a gradient."""
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
def new_param(p, m, largest, hyper):
    """The parameter behind its moments; `largest`: v, or with amsgrad the largest so far."""
    decay, negative_step = tl.load(hyper), tl.load(hyper + 4)
    correction2_sqrt, eps = tl.load(hyper + 5), tl.load(hyper + 6)
    denominator = _divided_by(tl.sqrt_rn(largest), correction2_sqrt) + eps
    return p * decay + tl.div_rn(m * negative_step, denominator)
