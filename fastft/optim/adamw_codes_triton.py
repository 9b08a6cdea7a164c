"""The update of blocks whose moments are codes of 8 or 4 bits, in Triton: the arithmetic of
csrc/include/moments_8bit.h and moments_4bit.h, with its bits.

The second moment's code has 8 bits in both. A first moment of 4 bits is a quotient by the root of
the second one as that is kept: so v's scale is found, v rounded and decoded again, and then the
scale of the quotients found.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton types what its kernels take when they are launched.
from __future__ import annotations

import triton
import triton.language as tl

from fastft.optim.adamw_elements_triton import (
    OF_MOMENTS,
    draw,
    load,
    load_param,
    new_moments,
    new_param,
    place,
    store,
    store_param,
    swap_bytes,
    widen,
)
from fastft.optim.moment_blocks import BLOCK

_BLOCK = tl.constexpr(BLOCK)
_SQ_UNITS = tl.constexpr(2621440.0)  # code 255 in units of code 0
_SMALL_SCALE = tl.constexpr(2.0**-100)
_LARGEST_FLOAT = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _decode_v(code, scale):
    """Second moments of their codes, uint8."""
    above = code.to(tl.float32) + 12.0
    # code / 12, rounded down, behind 1.5 * 2^23: half of a unit less, but for rounding errors, is
    # rounded to nearest
    twelfth, less = tl.zeros_like(above) + 1.0 / 12.0, tl.zeros_like(above) - (1.0 + 11.0 / 24.0)
    octave = tl.fma(above, twelfth, less) + 12582912.0
    of_octave = tl.fma(octave - 12582912.0, tl.zeros_like(above) - 12.0, above)  # 12 to 23
    unit = (of_octave * (1.0 / (12.0 * _SQ_UNITS))).to(tl.int32, bitcast=True)
    return (unit + (octave.to(tl.int32, bitcast=True) << 23)).to(tl.float32, bitcast=True) * scale


@triton.jit
def _decode_m(code, scale):
    """First moments of their 8-bit codes."""
    root = code.to(tl.float32) * (1.0 / 127.0)
    m = (root * tl.abs(root)) * (root * root) * scale
    return tl.where(code == -128, float("nan"), m)


@triton.jit
def _decode_nibbles(packed, shift, scale, v):
    """First moments of their 4-bit codes, which lie `shift` bits up, beside these second ones."""
    code = packed.to(tl.int32) << 28 - shift >> 28
    m = (code.to(tl.float32) * (1.0 / 7.0)) * (scale * tl.sqrt_rn(v))
    return tl.where(code == -8, float("nan"), m)


@triton.jit
def _share(value, divisor):
    """value / divisor by way of the reciprocal, as share_of in moments_8bit.h."""
    up = tl.where(divisor < _SMALL_SCALE, 18446744073709551616.0, 1.0)  # 2^64
    return value * up * tl.div_rn(1.0, divisor * up)


@triton.jit
def _encode_v(v, finite, divisor, random):
    units = tl.where(finite, _share(v, divisor) * _SQ_UNITS, 1.0)
    within = tl.minimum(tl.maximum(units, 1.0), _SQ_UNITS).to(tl.int32, bitcast=True) - 0x3F800000
    return ((within * 12 + (random << 7)) >> 23).to(tl.uint8)


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
def _over_root(m, v_code, v_scale):
    """|m| / the root of the second moment of this code, at most the largest float."""
    root = tl.sqrt_rn(_decode_v(v_code, v_scale))
    # the minimum drops a NaN
    return tl.where(root > 0.0, tl.minimum(tl.div_rn(tl.abs(m), root), _LARGEST_FLOAT), 0.0)


@triton.jit
def _encode_nibbles(ratio, negative, finite, divisor, random):
    """4-bit codes of moments that have these quotients without their signs: int32."""
    y = _share(ratio, divisor) * 7.0
    low = tl.minimum(tl.floor(y), 6.0)
    code = (low + (random.to(tl.float32) < (y - low) * 65536.0).to(tl.float32)).to(tl.int32)
    return tl.where(finite, tl.where(negative, -code, code), -8)


@triton.jit
def _largest_of_blocks(value, finite, BLOCKS: tl.constexpr):
    """The largest finite |value| of each block (BLOCKS,), by its bits."""
    magnitude = tl.where(finite, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    return tl.max(tl.reshape(magnitude, (BLOCKS, _BLOCK)), 1).to(tl.float32, bitcast=True)


@triton.jit
def _of_elements(of_blocks, BLOCKS: tl.constexpr, GROUPS: tl.constexpr):
    """Each element's number (GROUPS, 8) of its block."""
    return tl.reshape(tl.broadcast_to(of_blocks[:, None], (BLOCKS, _BLOCK)), (GROUPS, 8))


@triton.jit
def _divisor(scale):
    return tl.where(scale == 0.0, 1.0, scale)


@triton.jit
def update_coded_tile(
    row, hyper, factor, seed, first_block, numel,
    ROUNDING: tl.constexpr, BITS: tl.constexpr, ALIGNED: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Updates the blocks of moments from `first_block` on, each in its part of the tile."""
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
    param, grads = place(row, 0, KIND, ALIGNED), place(row, 1, KIND, ALIGNED)
    exp_avg_sq, residue = place(row, 3, tl.uint8, ALIGNED), place(row, 5, tl.int16, ALIGNED)
    m_scales, v_scales = place(row, 10, tl.float32, False), place(row, 11, tl.float32, False)
    m_scale = tl.load(m_scales + block, there, 0.0)
    v = _decode_v(load(exp_avg_sq, i, inside, False), tl.load(v_scales + block, there, 0.0))
    if BITS == 8:
        exp_avg = place(row, 2, tl.int8, ALIGNED)
        m = _decode_m(load(exp_avg, i, inside, False), m_scale)
    else:  # all eight codes lie in a word, or two in a byte
        PACKED: tl.constexpr = 8 if ALIGNED else 2
        exp_avg = place(row, 2, tl.int32 if ALIGNED else tl.uint8, ALIGNED)
        place_of, shift = tl.arange(0, 8)[None, :] // PACKED, tl.arange(0, 8)[None, :] % PACKED * 4
        words = block // of_row * ((columns + PACKED - 1) // PACKED) + column // PACKED
        packed = load(exp_avg, words if ALIGNED else words + place_of, inside, False)
        m = _decode_nibbles(packed, shift, m_scale, v)
    m, v = new_moments(widen(load(grads, i, inside, False)) * factor, m, v, hyper)
    p = new_param(load_param(param, residue, i, inside, ROUNDING, False), m, v, hyper)
    store_param(param, residue, i, inside, p, seed, elements, step, ROUNDING, False, ALIGNED)
    finite = (tl.abs(m) < float("inf")) & (v < float("inf"))  # no v is below 0
    random = draw(seed, elements, step, OF_MOMENTS, ALIGNED)
    v_scale = _largest_of_blocks(v, finite & inside, BLOCKS)
    v_divisor = _of_elements(_divisor(v_scale), BLOCKS, GROUPS)
    v_code = _encode_v(v, finite, v_divisor, swap_bytes(random))
    store(exp_avg_sq, i, inside, v_code, False)
    kept = m if BITS == 8 else _over_root(m, v_code, _of_elements(v_scale, BLOCKS, GROUPS))
    m_scale = _largest_of_blocks(kept, finite & inside, BLOCKS)
    m_divisor = _of_elements(_divisor(m_scale), BLOCKS, GROUPS)
    tl.debug_barrier()  # every warp has read the old scales
    own = first_block + tl.arange(0, BLOCKS)
    tl.store(m_scales + own, m_scale, own < blocks)
    tl.store(v_scales + own, v_scale, own < blocks)
    if BITS == 8:
        store(exp_avg, i, inside, _encode_m(m, finite, m_divisor, random), False)
    else:
        code = _encode_nibbles(kept, m < 0.0, finite, m_divisor, random)
        code = tl.where(inside, code & 15, 0) << shift
        packed = tl.sum(tl.reshape(code, (GROUPS, 8 // PACKED, PACKED)), 2)
        word = tl.arange(0, 8 // PACKED)[None, :]
        within_row = there & (column + PACKED * word < columns)
        store(exp_avg, words + word, within_row, packed.to(exp_avg.dtype.element_ty), False)
