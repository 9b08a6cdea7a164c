"""The moments of AdamW in 4 bits (m) and 8 bits (v), in plain torch.

Blocks, their scales s and the code of v: moment_blocks.py. With an element's code c, and v as its
own code keeps it,

    m = c / 7 * s * sqrt(v)                         c: -7 to 7; -8 is NaN

where s is the block's largest |m| / sqrt(v). It is rounded stochastically, so that it is right in
the mean; a moment of zero stays zero, and becomes it where v is kept as 0. An element whose m or v
is Inf or NaN has the code NaN from then on, and does not count for the scales; a ratio above the
largest float32 counts as that.

`exp_avg` is uint8, (rows, ceil(columns / 2)): a byte has the codes of an even column, in its low
half, and of the next, in two's complement each; the last half of a row of odd length is 0.

Bytes: 0.5 an element for m, 1 for v and 4 a block for each scale: 1.56 an element instead of 8.

An experiment chose the code (docs/adamw.md, 4-bit moments): no spacing of 16 values is right for m
itself, whose neighbours beside an outlier are a thousand times smaller. m / sqrt(v) knows no
outliers, and even spacing errs least there.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastft.optim import moment_blocks as blocks
from fastft.optim.moment_blocks import Entries

_NAN = -8
_LARGEST = torch.finfo(torch.float32).max


def codes_shape(shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
    """(rows, bytes of a row) of the first moments' codes."""
    rows, columns = blocks.lines(shape)
    return rows, -(-columns // 2)


def decode_m(state: Entries, v: Tensor) -> Tensor:
    """The fp32 first moments of codes and scales, beside the second ones as they are kept."""
    code = _unpacked(state[0], v)
    m = (code.float() * (1 / 7)) * (blocks.of_elements(state[2], v) * blocks.root(v))
    return m.masked_fill_(code == _NAN, torch.nan)


def encode_m(m: Tensor, spoilt: Tensor, state: Entries, bits: Tensor | int) -> None:
    """Writes finite first moments into codes and scales, rounded by `bits`; NaN where `spoilt`. The
    codes of v are there already."""
    codes, codes_v, scale, scale_v = state
    root = blocks.root(blocks.decode_v(codes_v, scale_v))
    x = (m.abs() / root).clamp_(max=_LARGEST).masked_fill_((root == 0) | spoilt, 0.0)
    blocks.write_largest(x, scale)
    y = blocks.share(x, scale) * 7.0
    low = y.int().clamp_(max=6)
    up = bits < (y - low) * 65536.0
    code = (low + up) * m.sign().int()
    _pack(code.masked_fill_(spoilt, _NAN), codes)


def _unpacked(packed: Tensor, like: Tensor) -> Tensor:
    """The codes of all elements: int32, in the shape of `like`."""
    halves = torch.stack([packed & 15, packed >> 4], 2).flatten(1)
    codes = halves[:, : like.numel() // max(1, len(packed))].int().reshape(like.shape)
    return (codes ^ 8) - 8


def _pack(codes: Tensor, packed: Tensor) -> None:
    rows = codes.reshape(len(packed), -1) & 15
    even, odd = F.pad(rows, (0, rows.shape[1] % 2)).view(*packed.shape, 2).unbind(2)
    packed.copy_(even | odd << 4)
