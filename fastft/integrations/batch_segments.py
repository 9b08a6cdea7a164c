"""Which tokens of a batch are padding, and which belong to one document, padded or packed.

Everything is read on the host: `batch_counts.py` counts without waiting for a device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
from torch import Tensor

from fastft.data.keys import CU_SEQLENS_Q, DECODER_CU_SEQLENS, PADDING_LENGTHS, SEQ_IDX

# what numbers tokens, and which differences of two neighbours begin a document; positions have
# gaps where a mask has
_BOUNDARIES: dict[str, Callable[[Tensor], Tensor]] = {
    SEQ_IDX: lambda difference: difference != 0,
    "attention_mask": lambda difference: difference != 0,
    "position_ids": lambda difference: difference <= 0,
}


def kept_of(batch: Mapping[str, Tensor]) -> Tensor:
    """Which of the flattened tokens are not padding, bool (R * T,)."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape == ids.shape:
        return mask.reshape(-1) > 0
    kept = torch.ones_like(ids, dtype=torch.bool)
    if PADDING_LENGTHS in batch:
        lengths = batch[PADDING_LENGTHS].to(torch.int64)
        kept = torch.arange(ids.shape[-1]) < ids.shape[-1] - lengths[:, None]
    return kept.reshape(-1)


def _numbers(batch: Mapping[str, Tensor], kept: Tensor) -> Tensor:
    """The number of the document of each flattened token, int64 (R * T,); -1 for padding."""
    ids = batch["input_ids"]
    places = kept.nonzero().squeeze(1)
    rows = places // ids.shape[-1]
    begins = rows.diff(prepend=rows.new_full((1,), -1)) != 0
    for key, is_another in _BOUNDARIES.items():
        numbers = batch.get(key)
        if numbers is not None and numbers.shape == ids.shape:
            begins[1:] |= is_another(numbers.reshape(-1)[places].long().diff())
    if CU_SEQLENS_Q in batch:
        begins |= torch.isin(places, batch[CU_SEQLENS_Q].long())
    numbers = torch.full_like(kept, -1, dtype=torch.int64)
    numbers[places] = begins.long().cumsum(0) - 1
    return numbers


def segments_of(batch: Mapping[str, Tensor]) -> list[Tensor]:
    """The places of each document among the flattened tokens, int64 each, in order."""
    if DECODER_CU_SEQLENS in batch:  # padding of the decoder's side alone is an empty one
        return [torch.arange(a, b) for a, b in pairwise(batch[CU_SEQLENS_Q].tolist())]
    numbers = _numbers(batch, kept_of(batch))
    places = (numbers >= 0).nonzero().squeeze(1)
    _, counts = numbers[places].unique_consecutive(return_counts=True)
    return list(places.split(counts.tolist()))
