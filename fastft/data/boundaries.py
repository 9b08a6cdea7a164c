"""Boundaries of a packed batch, for attention kernels and losses: positions, segments, labels.

T tokens lie one after another in S segments of the given lengths:

    cu_seqlens[s]   = lengths[0] + ... + lengths[s - 1]       where s begins; cu_seqlens[S] = T
    seq_idx[t]      = s                                       cu_seqlens[s] <= t < cu_seqlens[s + 1]
    position_ids[t] = position_ids_start + t - cu_seqlens[s]
    labels[t]       = -100 if t - cu_seqlens[s] < ignored[s] else source[t]

`ignored` is 1 for an example of a causal model, which predicts token t from the one before: the
first has none. It is 0 where every label counts, and the length of a segment that is padding.

Bytes moved per token: 8 read, 20 written. On a GPU the inputs are one buffer, and the rest never
crosses the bus.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastft import ops
from fastft.data.keys import IGNORE_INDEX


def boundaries_reference(
    lengths: Tensor,
    ignored: Tensor,
    source: Tensor,
    position_ids_start: int,
    labels: Tensor,
    position_ids: Tensor,
    seq_idx: Tensor,
    cu_seqlens: Tensor,
) -> None:
    """Computes the boundaries in plain torch, into the same outputs as the kernels."""
    source, labels, position_ids, seq_idx = (
        tensor.view(-1) for tensor in (source, labels, position_ids, seq_idx)
    )
    cu_seqlens[0] = 0
    cu_seqlens[1:] = lengths.cumsum(0)
    tokens = source.numel()
    segment = torch.repeat_interleave(lengths, output_size=tokens)
    offset = torch.arange(tokens, device=source.device) - cu_seqlens[segment]
    labels.copy_(source.masked_fill(offset < ignored[segment], IGNORE_INDEX))
    position_ids.copy_(offset + position_ids_start)
    seq_idx.copy_(segment)


BOUNDARIES = ops.Operator(
    "packed_boundaries(Tensor lengths, Tensor ignored, Tensor source, int position_ids_start, "
    "Tensor(a!) labels, Tensor(b!) position_ids, Tensor(c!) seq_idx, Tensor(d!) cu_seqlens) -> ()",
    boundaries_reference,
    engines=dict.fromkeys(("cpp", "cuda", "triton")),
)


def packed_boundaries(
    lengths: Tensor,
    ignored: Tensor,
    source: Tensor,
    position_ids_start: int,
    labels: Tensor,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Writes `labels`, which may be `source`, and computes the others; see the module.

    Args:
        lengths: int64 (S,), tokens of each segment, 0 or more; they must add up to T.
        ignored: int64 (S,), how many of a segment's first labels are ignored.
        source: int64, T of them in any shape, the labels.
        position_ids_start: position of a segment's first token.
        labels: int64 in the shape of `source`, written.
        impl: the engine; see `fastft.ops`.

    Returns:
        position_ids, int64, and seq_idx, int32, in the shape of `source`; cu_seqlens, int32
        (S + 1,).
    """
    shape, device = source.shape, source.device
    position_ids = torch.empty(shape, dtype=torch.int64, device=device)
    seq_idx = torch.empty(shape, dtype=torch.int32, device=device)
    cu_seqlens = torch.empty(lengths.numel() + 1, dtype=torch.int32, device=device)
    fill = BOUNDARIES.implementation(impl, device)
    fill(lengths, ignored, source, position_ids_start, labels, position_ids, seq_idx, cu_seqlens)
    return position_ids, seq_idx, cu_seqlens
