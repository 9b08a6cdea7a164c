"""Counts of labels that are not -100: on the host, so that nobody waits for a device.

A batch that moves itself notes the number with its labels on the device. The note holds as long as
nobody writes to these, and ends with them.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastft.data.keys import IGNORE_INDEX
from fastft.foreign import write_stamp

_notes: Any = WeakTensorKeyDictionary()  # by the labels: their write_stamp, how many count


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
    _notes[labels] = write_stamp(labels), counted


def note_count_of_copy(labels: Any, copy: Any) -> None:
    """Counts labels that are on the host, and notes the number with their copy."""
    integers = (torch.int64, torch.int32)
    if isinstance(labels, Tensor) and labels.device.type == "cpu" and labels.dtype in integers:
        note_count(copy, int((labels != IGNORE_INDEX).sum()))


def known_count(labels: Tensor) -> int | None:
    """Finds how many labels are not -100; None where nobody noted it, or somebody has written."""
    stamp, counted = _notes.get(labels, (None, None))
    known: int | None = None if stamp is None or stamp != write_stamp(labels) else counted
    return known
