"""The moments of AdamW in 8 bits: codes, scales, and plain torch to go there and back.

A block is up to 128 neighbouring elements of one row (entry of dim 0) of the parameter; the last
block of a row may be shorter. A vector is one row, and has 8-bit moments from 4,096 elements on:
libraries that shard (DeepSpeed's ZeRO, FSDP1) hand over their part of many parameters as one long
vector. A block has two scales s, fp32: its largest |m| and its largest v. With an element's code c

    m = s * sign(c) * (|c| / 127)^4                 c: int8, -127 to 127; -128 is NaN
    v = s * 2^(c // 12) * (12 + c % 12) / (15 * 2^21)
                                                    c: uint8, 0 to 255: 12 values an octave, no 0

Both are rounded stochastically, so that they are right in the mean however little they change in a
step. No value of v is zero: below s / 2.6e6 it becomes that, and updates beside an outlier are too
small, never too large. A moment of zero stays zero: m has a code for it, and a block of zeros has s
= 0. An element whose m or v is Inf or NaN has the code NaN from then on, and does not count for the
scales.

Bytes: 1 an element for each moment and 4 a block for each scale: 2.06 an element instead of 8.
Codes need no table: |c| is a fourth root, a float32's bits are an octave and a place in it.

An experiment chose the codes (docs/adamw.md, Figures): the noise of v decides the error over even
gradients, and m's code that beside outliers; 12 values to an octave are the most whose range still
holds an outlier's neighbours (a million times smaller v); rounded to nearest, v is biased by 14 %;
a zero in v is fatal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastft.foreign.tensors import is_dtensor, sharded_like

BLOCK = 128
# elements of a vector from which on it is worth blocks; norms and biases of most models are shorter
LONG = 4096
SCALES = ("exp_avg_scale", "exp_avg_sq_scale")
# the moments' part of a state, in the order of `dequantise`
ENTRIES = ("exp_avg", "exp_avg_sq", *SCALES)
_HALF = 1 << 15
_NAN = -128
_M_UNITS = 127.0**4
_V_OCTAVE = 12
_V_UNITS = 1.25 * 2**21  # code 255 in units of code 0


def has_codes(param: Any) -> bool:
    """Tells whether a parameter's moments are codes where 8 bits are asked for, and not fp32.

    Vectors count by the length that this process holds. One that is a DTensor has none: its shape
    is the model's, not the sharder's (FSDP2 cuts norms and biases, short as they are), and its
    blocks would depend on the number of processes.
    """
    return param.ndim > 1 or (param.ndim == 1 and param.numel() >= LONG and not is_dtensor(param))


def scale_shape(shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
    """(rows, blocks of a row) of a parameter; a vector is one row."""
    rows, columns = (1, shape[0]) if len(shape) == 1 else (shape[0], torch.Size(shape[1:]).numel())
    return rows, -(-columns // BLOCK)


def new_entries(param: Any, where: str | None = None) -> dict[str, Tensor]:
    """The moments of a new state: codes in the parameter's shape, scales by `scale_shape`.

    Args:
        where: the kind of device that they are made on, by default the parameter's.

    Raises:
        ValueError: `param` is a DTensor sharded on another dimension than 0, which would cut
            blocks.
    """

    def zeros(shape: torch.Size | tuple[int, int], dtype: torch.dtype) -> Tensor:
        if not is_dtensor(param):
            return torch.zeros(shape, dtype=dtype, device=where or param.device)
        from torch.distributed import tensor as distributed

        if any(
            placement.is_shard() and not placement.is_shard(0) for placement in param.placements
        ):
            raise ValueError(
                f'moments="8bit" needs parameters sharded on dimension 0, got {param.placements}; '
                'set moments="fp32" in the parameter group of this one'
            )
        if where is not None and shape == param.shape:
            layout = torch.contiguous_format
            return torch.zeros_like(param, dtype=dtype, device=where, memory_format=layout)
        mesh, placements = param.device_mesh, param.placements
        made = distributed.zeros(*shape, dtype=dtype, device_mesh=mesh, placements=placements)
        if where is None:
            return made
        return sharded_like(torch.zeros_like(made.to_local(), device=where), made)

    codes = {
        "exp_avg": zeros(param.shape, torch.int8),
        "exp_avg_sq": zeros(param.shape, torch.uint8),
    }
    return codes | {name: zeros(scale_shape(param.shape), torch.float32) for name in SCALES}


def dequantise(
    exp_avg: Tensor, exp_avg_sq: Tensor, exp_avg_scale: Tensor, exp_avg_sq_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """The fp32 moments of codes (shape of the parameter) and scales."""
    root = exp_avg.float() * (1 / 127)
    m = (root * root.abs()) * (root * root) * _of_elements(exp_avg_scale, exp_avg)
    code = exp_avg_sq.int()
    octave = code // _V_OCTAVE
    units = (code - octave * _V_OCTAVE + _V_OCTAVE).float() * ((octave + 127) << 23).view(
        torch.float32
    )
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
        m_bits, v_bits: random bits, int32 in [0, 65535], of the parameter's shape; by default those
            of nearest.
    """
    codes_m, codes_v, scale_m, scale_v = state
    if m.numel() == 0:
        return
    spoilt = ~(m.isfinite() & v.isfinite())
    m, v = m.masked_fill(spoilt, 0.0), v.masked_fill(spoilt, 0.0)
    for value, scale in ((m, scale_m), (v, scale_v)):
        rows = value.reshape(scale.shape[0], -1)
        padded = torch.nn.functional.pad(rows, (0, scale.shape[1] * BLOCK - rows.shape[1]))
        scale.copy_(padded.view(*scale.shape, BLOCK).abs().amax(2))
    x = _share(m.abs(), scale_m) * _M_UNITS
    low = _root(_root(x)).int().clamp_(max=126)
    below, above = (low * low).float().square(), ((low + 1) * (low + 1)).float().square()
    up = m_bits * (above - below) < (x - below) * 65536.0
    code = (low + up) * m.sign().int()
    codes_m.copy_(code.masked_fill_(spoilt, _NAN))
    u = (_share(v, scale_v) * _V_UNITS).clamp_(1.0, _V_UNITS).view(torch.int32)
    fraction = (u & 0x7FFFFF) * _V_OCTAVE + (v_bits << 7)
    codes_v.copy_(((u >> 23) - 127) * _V_OCTAVE + (fraction >> 23))


def _root(x: Tensor) -> Tensor:
    return x.double().sqrt().float()  # torch's fp32 sqrt may be off by a last place


def _of_elements(scale: Tensor, elements: Tensor) -> Tensor:
    """Each element's scale."""
    columns = elements.numel() // max(1, scale.shape[0])
    return scale.repeat_interleave(BLOCK, 1)[:, :columns].reshape(elements.shape)


def _share(value: Tensor, scale: Tensor) -> Tensor:
    """Value / scale by way of reciprocals; where these overflow, 2^64 times larger ones."""
    divisor = scale.masked_fill(scale == 0, 1.0)
    up = torch.where(divisor < 2.0**-100, 2.0**64, 1.0)
    return value * _of_elements(up, value) * _of_elements((divisor * up).reciprocal(), value)
