"""What a batch holds: its documents, tokens and labels, counted without waiting for a device.

    lengths     cu_seq_lens_q of packed rows; else where position_ids begin anew, and the
                attention_mask; else whole rows
    supervised  labels that are not -100; where the loss shifts them, but for each row's first, as
                Trainer counts them

What the host knows it counts itself. The rest are sums on the device, added to sums on the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastft.data.batch import known_count
from fastft.data.host_boundaries import known
from fastft.data.keys import (
    CU_SEQLENS_Q,
    DECODER_CU_SEQLENS,
    IGNORE_INDEX,
    PADDING_LENGTHS,
    SHIFT_LABELS,
    SOUNDS,
)


@dataclass
class BatchCounts:
    """The documents of a batch.

    Attributes:
        tokens: length of each document, int64 (S,), on the host or on a device; 0 is padding.
        outputs: the same on the decoder's side, where there is one beside an encoder.
        places: tokens and padding together.
        supervised: labels that count, a number or an integer tensor (); None where labels are not
            of tokens.
    """

    tokens: Tensor
    outputs: Tensor | None
    places: int
    supervised: Tensor | int | None


def count_batch(inputs: Mapping[str, Any], beside: bool, shifts: bool) -> BatchCounts | None:
    """Counts what the arguments of a model's forward pass hold; None where they hold no tokens.

    Args:
        inputs: padded, or packed by `PackingCollator` or others.
        beside: the model has a decoder beside an encoder.
        shifts: the model's loss compares each label with the logits of the token before it.
    """
    ids, embeddings = _tensor(inputs, "input_ids"), _tensor(inputs, "inputs_embeds")
    if ids is None:
        if embeddings is None:
            return _of_sounds(inputs) if beside else None
        shape = embeddings.shape[:-1]
    else:
        shape = ids.shape
    labels = _tensor(inputs, "labels")
    of_tokens = labels is not None and (
        labels.dim() == len(shape) if beside else labels.shape == shape
    )
    outputs = _outputs(inputs) if beside else None
    return BatchCounts(
        _tokens(inputs, shape),
        outputs,
        shape.numel() + (0 if outputs is None else _output_places(inputs)),
        _supervised(inputs, shifts) if of_tokens or SHIFT_LABELS in inputs else None,
    )


def _of_sounds(inputs: Mapping[str, Any]) -> BatchCounts | None:
    """Counts what sounds say: all of it is labels, be it padded or packed."""
    labels = _tensor(inputs, "labels")
    if labels is None or not any(key in inputs for key in SOUNDS):
        return None
    supervised = (labels != IGNORE_INDEX).sum()
    return BatchCounts(torch.zeros(0).long(), supervised[None], labels.numel(), supervised)


def _tensor(inputs: Mapping[str, Any], key: str, shape: torch.Size | None = None) -> Tensor | None:
    """What stands under `key`; None where that is no tensor, or one of another shape."""
    value = inputs.get(key)
    fits = isinstance(value, Tensor) and shape in (None, value.shape)
    return value if fits else None


def _tokens(inputs: Mapping[str, Any], shape: torch.Size) -> Tensor:
    boundaries = _tensor(inputs, CU_SEQLENS_Q)
    if boundaries is not None:
        return _without_padding(boundaries, _tensor(inputs, PADDING_LENGTHS), shape[-1])
    mask = _tensor(inputs, "attention_mask", shape)
    positions = _tensor(inputs, "position_ids", shape)
    if positions is not None:
        return _between_beginnings(positions, mask)
    if mask is not None:
        return (mask != 0).sum(-1).flatten()
    return torch.full((shape[:-1].numel(),), shape[-1])


def _without_padding(boundaries: Tensor, padding: Tensor | None, width: int) -> Tensor:
    """Lengths of segments in rows of `width` tokens; 0 of a row's last one where that is
    padding."""
    if padding is None:
        return _lengths(boundaries)
    ends = boundaries[1:]
    row = ((ends - 1) // width).clamp(min=0).long()
    return torch.where((ends % width == 0) & (padding[row] > 0), 0, boundaries.diff())


def _lengths(boundaries: Tensor) -> Tensor:
    noted = known(boundaries)
    return boundaries.diff() if noted is None else torch.tensor(noted.ends).diff()


def _between_beginnings(positions: Tensor, mask: Tensor | None) -> Tensor:
    """Lengths of documents that begin where positions do not go on; as many as there are tokens,
    most of them 0, so that nobody has to know how many documents there are."""
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[..., 1:] = positions.diff() != 1
    document = begins.flatten().cumsum(0) - 1
    ones = torch.ones_like(document) if mask is None else (mask != 0).flatten().long()
    return torch.zeros_like(document).scatter_add_(0, document, ones)


def _outputs(inputs: Mapping[str, Any]) -> Tensor:
    boundaries = _tensor(inputs, DECODER_CU_SEQLENS)
    if boundaries is not None:
        return _lengths(boundaries)
    mask, labels = _tensor(inputs, "decoder_attention_mask"), _tensor(inputs, "labels")
    if mask is not None:
        return (mask != 0).sum(-1)
    if labels is not None:
        return (labels != IGNORE_INDEX).sum(-1)
    given: Tensor = inputs["decoder_input_ids"]
    return torch.full((given.shape[0],), given.shape[-1])


def _output_places(inputs: Mapping[str, Any]) -> int:
    return int(inputs["labels" if "labels" in inputs else "decoder_input_ids"].numel())


def _supervised(inputs: Mapping[str, Any], shifts: bool) -> Tensor | int:
    labels = _tensor(inputs, "labels")
    counted = None if labels is None or CU_SEQLENS_Q not in inputs else known_count(labels)
    if counted is not None:
        return counted
    shifted: Tensor = inputs.get(SHIFT_LABELS, labels)
    if shifts and SHIFT_LABELS not in inputs:
        shifted = shifted[..., 1:]
    return (shifted != IGNORE_INDEX).sum()


class Totals:
    """Sums of what many batches hold, by name: of the host's numbers, and of a device's there."""

    def __init__(self) -> None:
        self._host: dict[str, float] = {}
        self._device: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor | float) -> None:
        """Adds a number, or a tensor (); waits for nothing."""
        if isinstance(value, Tensor) and value.device.type != "cpu":
            before = self._device.get(name)
            self._device[name] = value if before is None else before + value
        else:
            self._host[name] = self._host.get(name, 0.0) + float(value)

    def read(self) -> dict[str, float]:
        """All sums since the last time, in one wait."""
        totals, self._host = self._host, {}
        if self._device:
            values = torch.stack([*self._device.values()]).tolist()
            for name, value in zip(self._device, values, strict=True):
                totals[name] = totals.get(name, 0.0) + value
            self._device = {}
        return totals
