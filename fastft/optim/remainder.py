"""The fp32 master of a bf16 parameter, kept as the parameter and the 16 bits that its rounding drops.

The bits of the master are `(parameter << 16) + remainder`. The parameter is the master rounded to nearest; exact ties
go away from zero, for with ties to even two masters would share one (parameter, remainder).
"""

from __future__ import annotations

import torch
from torch import Tensor


def join(param: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 master of a bf16 parameter and its int16 remainder."""
    magnitude = param.view(torch.int16) & 0x7FFF
    # pairs that no split makes: the parameter was overwritten, and the old remainder would turn it into NaN
    stale = ((magnitude == 0) & (remainder < 0)) | ((magnitude == 0x7F80) & (remainder > 0))
    bits = (param.view(torch.int16).int() << 16) + remainder.masked_fill(stale, 0)
    return bits.view(torch.float32)


def split(master: Tensor, param: Tensor, remainder: Tensor) -> None:
    """Writes an fp32 master into a bf16 parameter and its int16 remainder."""
    bits = master.view(torch.int32).masked_fill(master.isnan(), 0x7FC00000)
    param.view(torch.int16).copy_((bits + 0x8000) >> 16)
    remainder.copy_(bits)
