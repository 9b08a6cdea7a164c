"""The packed batch, and its way to a device: as it is, or as one buffer that is unpacked there.

The batch's integers are the tokens, labels and other columns of the examples, and two numbers a
segment. What follows from them, positions, segment indices and boundaries, is 12 bytes a token
more, 20 where the labels follow from the tokens too: `FlatBatch` leaves these out and has them made
on the device, with one copy there in place of five.

How many labels are not -100 is counted on the host, so that nobody waits for a device. A batch that
moves itself notes the number with its labels there. The note holds as long as nobody writes to
these, and ends with them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastft.data.boundaries import packed_boundaries
from fastft.data.host_boundaries import note, note_copy
from fastft.data.keys import (
    CU_SEQLENS_K,
    CU_SEQLENS_Q,
    DECODER_CU_SEQLENS,
    IGNORE_INDEX,
    SEQ_IDX,
)
from fastft.foreign.tensors import write_stamp

BOUNDARIES_OF_SEGMENTS = {CU_SEQLENS_Q, CU_SEQLENS_K, DECODER_CU_SEQLENS}
_label_counts: Any = WeakTensorKeyDictionary()  # by the labels: their write_stamp, how many count


class _Counted:
    count: Callable[[], int] | None = None

    @property
    def counted(self) -> int | None:
        """Labels that are not -100, counted on the host when asked for: no GPU is waited for.

        It is the divisor of a mean over micro-batches, and what
        `linear_cross_entropy(max_counted=...)` takes; the fused loss of a `FusedLossCallback` knows
        it by itself. None where the batch has no labels, and for a copy of the dict, as `Trainer`
        makes one.
        """
        return None if self.count is None else self.count()


class PackedBatch(_Counted, dict[str, Any]):
    """A batch of `PackingCollator`: a dict for the model, and `counted`."""

    def to(self, device: Any, non_blocking: bool = False) -> PackedBatch:
        """Copies the tensors to `device`; accelerate calls this.

        The host remembers the boundaries, and how many labels count.
        """
        moved = self._with_each(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        for key in BOUNDARIES_OF_SEGMENTS & self.keys():
            note_copy(self[key], moved[key])
        note_count_of_copy(self.get("labels"), moved.get("labels"))
        return moved

    def pin_memory(self) -> PackedBatch:
        """Copies the tensors to pinned memory; a `DataLoader` with `pin_memory=True` calls this."""
        return self._with_each(Tensor.pin_memory)

    def _with_each(self, move: Callable[[Tensor], Tensor]) -> PackedBatch:
        """Moves the tensors; one that stands under two keys still does."""
        tensors = {id(value): value for value in self.values() if isinstance(value, Tensor)}
        places = {key: move(tensor) for key, tensor in tensors.items()}
        moved = PackedBatch((key, places.get(id(value), value)) for key, value in self.items())
        moved.count = self.count
        return moved


@dataclass(frozen=True)
class Expansion:
    """The way from integers to a batch.

    Attributes:
        source: the column that labels a token, or None if there are no labels for tokens.
        position_ids_start: position of a segment's first token.
        impl: the engine of `packed_boundaries`.
    """

    source: str | None
    position_ids_start: int
    impl: str

    def __call__(
        self,
        lengths: Tensor,
        ignored: Tensor,
        columns: Mapping[str, Tensor],
        others: Mapping[str, Any],
    ) -> PackedBatch:
        """Makes the batch.

        Args:
            lengths: int64 (S,), tokens of each segment.
            ignored: int64 (S,), how many of a segment's first labels are ignored.
            columns: int64 (R, T), or of another shape where they are not per token.
            others: what the batch has besides, as it is.
        """
        source = columns["input_ids" if self.source is None else self.source]
        labels = source if self.source == "labels" else torch.empty_like(source)
        position_ids, seq_idx, cu_seqlens = packed_boundaries(
            lengths, ignored, source, self.position_ids_start, labels, self.impl
        )
        batch = PackedBatch(input_ids=columns["input_ids"])
        if self.source is not None:
            batch["labels"] = labels
        batch |= {
            "position_ids": position_ids,
            SEQ_IDX: seq_idx,
            CU_SEQLENS_Q: cu_seqlens,
            CU_SEQLENS_K: cu_seqlens,
            # a task may have made other positions
            **{key: value for key, value in columns.items() if key not in batch},
            **others,
        }
        return batch


@dataclass(eq=False)
class FlatBatch(_Counted):
    """A packed batch before it is unpacked on its device: `.to(device)` gives the `PackedBatch`.

    accelerate, and so `Trainer`, calls that; a `DataLoader` with `pin_memory=True` calls
    `.pin_memory`.

    Attributes:
        integers: int64: the lengths of the segments, their ignored labels, all integer columns one
            after another.
        segments: how many segments there are.
        shapes: names and shapes of the columns, in order.
        others: what is no integer, by key.
        expansion: how they become a batch.
        count: as in `PackedBatch`.
    """

    integers: Tensor
    segments: int
    shapes: dict[str, torch.Size]
    others: dict[str, Any]
    expansion: Expansion
    count: Callable[[], int] | None = None

    @staticmethod
    def of(
        lengths: Tensor,
        ignored: Tensor,
        columns: dict[str, Tensor],
        others: dict[str, Any],
        expansion: Expansion,
    ) -> FlatBatch:
        """Keeps what `expansion(lengths, ignored, columns, others)` will make a batch of."""
        flat = torch.cat([lengths, ignored, *[tensor.reshape(-1) for tensor in columns.values()]])
        shapes = {key: tensor.shape for key, tensor in columns.items()}
        return FlatBatch(flat, lengths.numel(), shapes, others, expansion)

    def pin_memory(self) -> FlatBatch:
        """Copies the tensors to pinned memory, from where copies to a GPU do not wait."""
        others = {
            key: value.pin_memory() if isinstance(value, Tensor) else value
            for key, value in self.others.items()
        }
        return replace(self, integers=self.integers.pin_memory(), others=others)

    def to(self, device: Any, non_blocking: bool = False) -> PackedBatch:
        """Copies the integers to `device` at once, and computes there what follows from them.

        The host remembers the boundaries, and how many labels count.
        """
        moved = self.integers.to(device, non_blocking=non_blocking)
        if moved is self.integers:  # the batch may be written to
            moved = moved.clone()
        lengths, ignored, *parts = moved.split(self._sizes())
        columns = {
            key: part.view(shape)
            for (key, shape), part in zip(self.shapes.items(), parts, strict=True)
        }
        others = {
            key: value.to(device, non_blocking=non_blocking) if isinstance(value, Tensor) else value
            for key, value in self.others.items()
        }
        batch = self.expansion(lengths, ignored, columns, others)
        counted = self._count()
        if counted is not None:
            note_count(batch["labels"], counted)
        for key in BOUNDARIES_OF_SEGMENTS & self.others.keys():
            note_copy(self.others[key], others[key])
        ends = [0, *itertools.accumulate(self.integers[: self.segments].tolist())]
        note(batch[CU_SEQLENS_Q], ends)
        batch.count = self.count
        return batch

    def _count(self) -> int | None:
        """Counts the labels among the integers on the host as they are now; None without any."""
        source = self.expansion.source or "labels"
        if source not in self.shapes or self.integers.device.type != "cpu":
            return None
        lengths, ignored, *columns = self.integers.split(self._sizes())
        firsts = ignored.tolist() if self.expansion.source else []
        # where tokens are labels, padding has tokens too, and is ignored whole
        labels = None if source == "input_ids" else columns[list(self.shapes).index(source)]
        return count_labels(labels, lengths.tolist(), firsts)

    def _sizes(self) -> list[int]:
        return [self.segments, self.segments, *[shape.numel() for shape in self.shapes.values()]]


def count_labels(labels: Tensor | None, lengths: list[int], ignored: list[int]) -> int:
    """Counts the labels that are not -100 after the first `ignored` of each segment are ignored.

    Args:
        labels: int64 (R, T), -100 in padding; None where every token is its own label.
        lengths: tokens of each segment.
        ignored: labels to be ignored of each segment: none, the first, or all of padding.
    """
    if labels is None:
        return sum(lengths) - sum(ignored)
    kept = labels.view(-1) != IGNORE_INDEX
    starts = itertools.accumulate(lengths, initial=0)
    lost = [
        start
        for start, length, first in zip(starts, lengths, ignored, strict=False)
        if length and first
    ]
    places = torch.tensor(lost, dtype=torch.int64)
    return int(kept.count_nonzero()) - int(kept[places].count_nonzero())


def note_count(labels: Tensor, counted: int) -> None:
    """Remembers, as long as nobody writes to `labels`, that `counted` of them are not -100."""
    _label_counts[labels] = write_stamp(labels), counted


def note_count_of_copy(labels: Any, copy: Any) -> None:
    """Counts labels that are on the host, and notes the number with their copy."""
    if (
        isinstance(labels, Tensor)
        and labels.device.type == "cpu"
        and labels.dtype in (torch.int64, torch.int32)
    ):
        note_count(copy, int((labels != IGNORE_INDEX).sum()))


def known_count(labels: Tensor) -> int | None:
    """Finds how many labels are not -100; None where nobody noted it, or somebody has written."""
    stamp, counted = _label_counts.get(labels, (None, None))
    return counted if stamp is not None and stamp == write_stamp(labels) else None
