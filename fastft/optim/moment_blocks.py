"""Blocks of moments that are codes: their scales, and the 8-bit code of v.

A block is up to 128 neighbouring elements of one row (entry of dim 0) of the parameter; the last
block of a row may be shorter. A vector is one row, and has codes from 4,096 elements on: libraries
that shard (DeepSpeed's ZeRO, FSDP1) hand over their part of many parameters as one long vector.

A block has two scales s, fp32: of m, and its largest v. With an element's code c

    v = s * 2^(c // 12) * (12 + c % 12) / (15 * 2^21)
                                                    c: uint8, 0 to 255: 12 values an octave, no 0

It is rounded stochastically, so that it is right in the mean however little it changes in a step.
No value of v is zero: below s / 2.6e6 it becomes that, and updates beside an outlier are too small,
never too large. A block of zeros has s = 0.

The code needs no table: a float32's bits are an octave and a place in it. 12 values to an octave
are the most whose range still holds an outlier's neighbours (a million times smaller v); rounded to
nearest, v is biased by 14 %; a zero in v is fatal (docs/adamw.md, Figures).

Codes of m: moments_8bit.py, moments_4bit.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastft.foreign.tensors import is_dtensor

BLOCK = 128
# elements of a vector from which on it is worth blocks; norms and biases of most models are shorter
LONG = 4096
SCALES = ("exp_avg_scale", "exp_avg_sq_scale")
# the moments' part of a state, in the order of `dequantise`
ENTRIES = ("exp_avg", "exp_avg_sq", *SCALES)
Entries = tuple[Tensor, Tensor, Tensor, Tensor]
NEAREST = 1 << 15  # the random bits with which values are rounded to nearest
_OCTAVE = 12
_UNITS = 1.25 * 2**21  # code 255 in units of code 0


def has_codes(param: Any) -> bool:
    """Tells whether a parameter's moments are codes where these are asked for, and not fp32.

    Vectors count by the length that this process holds. One that is a DTensor has none: its shape
    is the model's, not the sharder's (FSDP2 cuts norms and biases, short as they are), and its
    blocks would depend on the number of processes.
    """
    return param.ndim > 1 or (param.ndim == 1 and param.numel() >= LONG and not is_dtensor(param))


def lines(shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of a parameter; a vector is one row."""
    rows = shape[0] if len(shape) > 1 else 1
    return rows, torch.Size(shape[1:] if len(shape) > 1 else shape).numel()


def scale_shape(shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
    """(rows, blocks of a row) of a parameter."""
    rows, columns = lines(shape)
    return rows, -(-columns // BLOCK)


def without_spoilt(m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which elements' moments are Inf or NaN, of either, and both moments with zeros there."""
    spoilt = ~(m.isfinite() & v.isfinite())
    return spoilt, m.masked_fill(spoilt, 0.0), v.masked_fill(spoilt, 0.0)


def write_largest(value: Tensor, scale: Tensor) -> None:
    """Writes the largest magnitude of each block."""
    rows = value.reshape(scale.shape[0], -1)
    padded = F.pad(rows, (0, scale.shape[1] * BLOCK - rows.shape[1]))
    scale.copy_(padded.view(*scale.shape, BLOCK).abs().amax(2))


def of_elements(scale: Tensor, elements: Tensor) -> Tensor:
    """Each element's scale; `elements` has the parameter's shape."""
    columns = elements.numel() // max(1, scale.shape[0])
    return scale.repeat_interleave(BLOCK, 1)[:, :columns].reshape(elements.shape)


def share(value: Tensor, scale: Tensor) -> Tensor:
    """Value / scale by way of reciprocals; where these overflow, 2^64 times larger ones."""
    divisor = scale.masked_fill(scale == 0, 1.0)
    up = torch.where(divisor < 2.0**-100, 2.0**64, 1.0)
    return value * of_elements(up, value) * of_elements((divisor * up).reciprocal(), value)


def root(x: Tensor) -> Tensor:
    """The square root, rounded once: torch's of fp32 may be off by a last place."""
    return x.double().sqrt().float()


def decode_v(codes: Tensor, scale: Tensor) -> Tensor:
    """The fp32 second moments of codes (shape of the parameter) and scales."""
    code = codes.int()
    octave = code // _OCTAVE
    units = (code - octave * _OCTAVE + _OCTAVE).float() * ((octave + 127) << 23).view(torch.float32)
    return units * (1 / (_OCTAVE * _UNITS)) * of_elements(scale, codes)


def encode_v(v: Tensor, codes: Tensor, scale: Tensor, bits: Tensor | int) -> None:
    """Writes finite second moments into codes and scales, rounded by `bits`."""
    write_largest(v, scale)
    u = (share(v, scale) * _UNITS).clamp_(1.0, _UNITS).view(torch.int32)
    fraction = (u & 0x7FFFFF) * _OCTAVE + (bits << 7)
    codes.copy_(((u >> 23) - 127) * _OCTAVE + (fraction >> 23))
