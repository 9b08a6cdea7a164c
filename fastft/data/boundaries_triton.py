"""The Triton engine of `packed_boundaries`: two launches, and no wait for the device.

The first adds up the lengths in one program; the second finds the segment of each token by
bisection of these sums, which stay in the cache. Bytes moved: those of `fastft.data.boundaries`,
and log2(S) cached reads a token.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton types what its kernels take when they are launched.
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastft.ops import check_beside

_TILE = 1024  # tokens of a program, and lengths added up at once


@triton.jit(do_not_specialize=["segments"])
def _scan_kernel(lengths, cu_seqlens, segments, TILE: tl.constexpr):
    offset = tl.arange(0, TILE)
    tl.store(cu_seqlens + offset, 0, offset < 1)
    before = tl.zeros((), tl.int64)
    for tile in range(0, segments, TILE):
        inside = tile + offset < segments
        length = tl.load(lengths + tile + offset, inside, 0)
        place = cu_seqlens + 1 + tile + offset
        tl.store(place, (before + tl.cumsum(length, 0)).to(tl.int32), inside)
        before += tl.sum(length, 0)


@triton.jit(do_not_specialize=["start", "segments", "tokens", "steps"])
def _fill_kernel(
    cu_seqlens, ignored, source, labels, position_ids, seq_idx,
    start, segments, tokens, steps, TILE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = token < tokens
    segment = tl.zeros((TILE,), tl.int32)  # the last one that begins at or before the token
    end = tl.zeros((TILE,), tl.int32) + segments
    for _ in range(0, steps):
        middle = (segment + end) // 2
        begun = tl.load(cu_seqlens + middle, inside, 0) <= token
        segment = tl.where(begun, middle, segment)
        end = tl.where(begun, end, middle)
    offset = token - tl.load(cu_seqlens + segment, inside, 0)
    label = tl.load(source + token, inside, 0)
    label = tl.where(offset < tl.load(ignored + segment, inside, 0), -100, label)
    tl.store(labels + token, label, inside)
    tl.store(position_ids + token, start + offset, inside)
    tl.store(seq_idx + token, segment, inside)


def packed_boundaries(
    lengths: Tensor,
    ignored: Tensor,
    source: Tensor,
    position_ids_start: int,
    labels: Tensor,
    position_ids: Tensor,
    seq_idx: Tensor,
    cu_seqlens: Tensor,
) -> None:
    """The operator; see `fastft.data.boundaries`."""
    check_beside(
        "packed_boundaries",
        "source",
        source,
        lengths=lengths,
        ignored=ignored,
        labels=labels,
        position_ids=position_ids,
        seq_idx=seq_idx,
        cu_seqlens=cu_seqlens,
    )
    segments, tokens = lengths.numel(), source.numel()
    _scan_kernel[(1,)](lengths, cu_seqlens, segments, TILE=_TILE)
    if tokens == 0 or segments == 0:
        return
    _fill_kernel[(triton.cdiv(tokens, _TILE),)](
        cu_seqlens, ignored, source, labels, position_ids, seq_idx,
        position_ids_start, segments, tokens, segments.bit_length(), TILE=_TILE,
    )  # fmt: skip
