"""The moments of AdamW in 8 bits each, in plain torch.

Blocks, their scales s and the code of v: moment_blocks.py. With an element's code c

    m = s * sign(c) * (|c| / 127)^4                 c: int8, -127 to 127; -128 is NaN

where s is the block's largest |m|. It is rounded stochastically, so that it is right in the mean
however little it changes in a step; a moment of zero stays zero. An element whose m or v is Inf or
NaN has the code NaN from then on, and does not count for the scales.

Bytes: 1 an element for each moment and 4 a block for each scale: 2.06 an element instead of 8.
The code needs no table: |c| is a fourth root.

An experiment chose the codes (docs/adamw.md, Figures): the noise of v decides the error over even
gradients, and m's code that beside outliers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastft.optim import moment_blocks as blocks
from fastft.optim.moment_blocks import NEAREST, Entries

_NAN = -128
_UNITS = 127.0**4


def dequantise(
    exp_avg: Tensor, exp_avg_sq: Tensor, exp_avg_scale: Tensor, exp_avg_sq_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """The fp32 moments of codes (shape of the parameter) and scales."""
    root = exp_avg.float() * (1 / 127)
    m = (root * root.abs()) * (root * root) * blocks.of_elements(exp_avg_scale, exp_avg)
    return m.masked_fill_(exp_avg == _NAN, torch.nan), blocks.decode_v(exp_avg_sq, exp_avg_sq_scale)


def quantise(
    m: Tensor,
    v: Tensor,
    state: Entries,
    m_bits: Tensor | int = NEAREST,
    v_bits: Tensor | int = NEAREST,
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
    spoilt, m, v = blocks.without_spoilt(m, v)
    blocks.encode_v(v, codes_v, scale_v, v_bits)
    blocks.write_largest(m, scale_m)
    x = blocks.share(m.abs(), scale_m) * _UNITS
    low = blocks.root(blocks.root(x)).int().clamp_(max=126)
    below, above = (low * low).float().square(), ((low + 1) * (low + 1)).float().square()
    up = m_bits * (above - below) < (x - below) * 65536.0
    code = (low + up) * m.sign().int()
    codes_m.copy_(code.masked_fill_(spoilt, _NAN))
