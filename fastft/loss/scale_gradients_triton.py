"""The Triton engine of `scale_gradients_`: one launch a gradient, which does nothing by 1.

A program has several tiles, all of them whole but for the gradient's last: only that one asks which
of its elements are there. Bytes moved: those of `fastft.loss.scale_gradients`.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton types what its kernels take when they are launched.
from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastft.ops import check_beside

# Elements of a tile, tiles of a program. With larger tiles the masked one takes a hundred registers
# and more, and an SM holds too few warps for as many loads to be in flight.
_TILE, _TILES, _WARPS = 2048, 32, 8


@triton.jit(do_not_specialize=["elements"])
def _scale_kernel(gradient, scale, elements, TILE: tl.constexpr, TILES: tl.constexpr):
    factor = tl.load(scale).to(tl.float32)
    if factor != 1.0:
        offset = tl.arange(0, TILE)
        for tile in range(TILES):
            begin = (tl.program_id(0).to(tl.int64) * TILES + tile) * TILE
            place = gradient + begin + offset
            if begin + TILE <= elements:
                value = tl.load(place, eviction_policy="evict_first")
                value = (value.to(tl.float32) * factor).to(value.dtype)
                tl.store(place, value, eviction_policy="evict_first")
            elif begin < elements:
                inside = begin + offset < elements
                value = tl.load(place, inside)
                tl.store(place, (value.to(tl.float32) * factor).to(value.dtype), inside)


def scale_gradients_(gradients: Sequence[Tensor], scale: Tensor) -> None:
    """The operator; see `fastft.loss.scale_gradients`."""
    named = {f"gradients[{i}]": gradient for i, gradient in enumerate(gradients)}
    check_beside("scale_gradients_", "scale", scale, **named)
    for gradient in gradients:
        programs = triton.cdiv(gradient.numel(), _TILE * _TILES)
        if programs:
            _scale_kernel[(programs,)](
                gradient, scale, gradient.numel(), TILE=_TILE, TILES=_TILES, num_warps=_WARPS
            )
