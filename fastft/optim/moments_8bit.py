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
from fastft.optim.moment_blocks import Entries

_NAN = -128
_UNITS = 127.0**4


def decode_m(state: Entries, v: Tensor) -> Tensor:
    """The fp32 first moments of codes and scales, which need no v."""
    codes, _, scale, _ = state
    root = codes.float() * (1 / 127)
    m = (root * root.abs()) * (root * root) * blocks.of_elements(scale, v)
    return m.masked_fill_(codes == _NAN, torch.nan)


def encode_m(m: Tensor, spoilt: Tensor, state: Entries, bits: Tensor | int) -> None:
    """Writes finite first moments into codes and scales, rounded by `bits`; NaN where `spoilt`."""
    codes, _, scale, _ = state
    blocks.write_largest(m, scale)
    x = blocks.share(m.abs(), scale) * _UNITS
    low = blocks.root(blocks.root(x)).int().clamp_(max=126)
    below, above = (low * low).float().square(), ((low + 1) * (low + 1)).float().square()
    up = bits * (above - below) < (x - below) * 65536.0
    code = (low + up) * m.sign().int()
    codes.copy_(code.masked_fill_(spoilt, _NAN))
