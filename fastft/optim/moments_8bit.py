"""The moments of AdamW in 8 bits: codes, scales, and plain torch to go there and back.

A block is up to 128 neighbouring elements of one row (entry of dim 0) of the parameter; the last block of a row may be
shorter. A block has two scales s, fp32: its largest |m| and its largest v. With the code c of an element

    m = s * sign(c) * (|c| / 127)^4                              c: int8, -127 to 127; -128 is NaN
    v = s * 2^(c // 12) * (12 + c % 12) / (15 * 2^21)            c: uint8, 0 to 255: 12 values to an octave, none is 0

Both are rounded stochastically, so that they are right in the mean however little they change in a step. No value of v
is zero: below s / 2.6e6 it becomes that, and updates beside an outlier are too small, never too large. A moment of zero
stays zero: m has a code for it, and a block of zeros has s = 0. An element whose m or v is Inf or NaN has the code NaN
from then on, and does not count for the scales.

Bytes: 1 an element for each moment and 4 a block for each scale: 2.06 an element instead of 8. Codes need no table:
|c| is a fourth root, and the bits of a float32 are an octave and a place in it.

The experiment behind these choices (benchmarks/moments_8bit.py; blocks of 128; the error of an update is relative to
fp32's, root mean square over elements, in the last 50 steps):

@FIGURES@
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK = 128
SCALES = ("exp_avg_scale", "exp_avg_sq_scale")
ENTRIES = ("exp_avg", "exp_avg_sq", *SCALES)  # the moments' part of a state, in the order of `dequantise`
_HALF = 1 << 15
_NAN = -128
_M_UNITS = 127.0**4
_V_OCTAVE = 12
_V_UNITS = 1.25 * 2**21  # code 255 in units of code 0


def scale_shape(shape: torch.Size) -> tuple[int, int]:
    """(rows, blocks of a row) of a parameter of at least two dimensions."""
    return shape[0], -(-shape[1:].numel() // BLOCK)


def new_entries(param: Any) -> dict[str, Tensor]:
    """The moments' part of a state before the first step: codes in the parameter's shape, scales by `scale_shape`.

    Raises:
        ValueError: `param` is a DTensor sharded on another dimension than 0, which would cut blocks.
    """

    def zeros(shape: torch.Size | tuple[int, int], dtype: torch.dtype) -> Tensor:
        if not hasattr(param, "device_mesh"):
            return torch.zeros(shape, dtype=dtype, device=param.device)
        from torch.distributed import tensor as distributed

        if any(placement.is_shard() and not placement.is_shard(0) for placement in param.placements):
            raise ValueError(
                f'moments="8bit" needs parameters sharded on dimension 0, got {param.placements}; set moments="fp32" '
                "in the parameter group of this one"
            )
        mesh, placements = param.device_mesh, param.placements
        return distributed.zeros(*shape, dtype=dtype, device_mesh=mesh, placements=placements)

    codes = {"exp_avg": zeros(param.shape, torch.int8), "exp_avg_sq": zeros(param.shape, torch.uint8)}
    return codes | {name: zeros(scale_shape(param.shape), torch.float32) for name in SCALES}


def dequantise(
    exp_avg: Tensor, exp_avg_sq: Tensor, exp_avg_scale: Tensor, exp_avg_sq_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """The fp32 moments of codes (shape of the parameter) and scales."""
    root = exp_avg.float() * (1 / 127)
    m = (root * root.abs()) * (root * root) * _of_elements(exp_avg_scale, exp_avg)
    code = exp_avg_sq.int()
    octave = code // _V_OCTAVE
    units = (code - octave * _V_OCTAVE + _V_OCTAVE).float() * ((octave + 127) << 23).view(torch.float32)
    v = units * (1 / (_V_OCTAVE * _V_UNITS)) * _of_elements(exp_avg_sq_scale, exp_avg_sq)
    return m.masked_fill_(exp_avg == _NAN, torch.nan), v


def quantise(
    m: Tensor,
    v: Tensor,
    state: tuple[Tensor, Tensor, Tensor, Tensor],
    m_bits: Tensor | int = _HALF,
    v_bits: Tensor | int = _HALF,
) -> None:
    """Writes fp32 moments into codes and scales.

    Args:
        m, v: of the parameter's shape.
        state: codes and scales, in the order of `dequantise`.
        m_bits, v_bits: random bits, int32 in [0, 65535], of the parameter's shape; by default those of nearest.
    """
    codes_m, codes_v, scale_m, scale_v = state
    if m.numel() == 0:
        return
    spoilt = ~(m.isfinite() & v.isfinite())
    m, v = m.masked_fill(spoilt, 0.0), v.masked_fill(spoilt, 0.0)
    for value, scale in ((m, scale_m), (v, scale_v)):
        rows = value.reshape(value.shape[0], -1)
        padded = torch.nn.functional.pad(rows, (0, scale.shape[1] * BLOCK - rows.shape[1]))
        scale.copy_(padded.view(*scale.shape, BLOCK).abs().amax(2))
    x = m.abs() / _divisor(scale_m, m) * _M_UNITS
    low = _root(_root(x)).int().clamp_(max=126)
    below, above = (low * low).float().square(), ((low + 1) * (low + 1)).float().square()
    up = m_bits * (above - below) < (x - below) * 65536.0
    code = (low + up) * m.sign().int()
    codes_m.copy_(code.masked_fill_(spoilt, _NAN))
    u = (v / _divisor(scale_v, v) * _V_UNITS).clamp_(min=1.0).view(torch.int32)
    fraction = (u & 0x7FFFFF) * _V_OCTAVE + (v_bits << 7)
    codes_v.copy_(((u >> 23) - 127) * _V_OCTAVE + (fraction >> 23))


def _root(x: Tensor) -> Tensor:
    return x.double().sqrt().float()  # torch's fp32 sqrt may be off by a last place


def _of_elements(scale: Tensor, elements: Tensor) -> Tensor:
    """Each element's scale."""
    columns = elements.shape[1:].numel()
    return scale.repeat_interleave(BLOCK, 1)[:, :columns].reshape(elements.shape)


def _divisor(scale: Tensor, elements: Tensor) -> Tensor:
    return _of_elements(scale.masked_fill(scale == 0, 1.0), elements)
