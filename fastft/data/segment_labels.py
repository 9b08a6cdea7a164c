"""Labels of whole examples, for sequence classification and regression."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastft.data.keys import LABEL_KEYS
from fastft.data.rows import Layout


@dataclass(frozen=True, eq=False)
class SegmentLabels:
    """`values` has one row for each example, in the order in which they came; None where they have
    no labels."""

    values: Tensor | None

    def arranged(self, layout: Layout) -> dict[str, Tensor]:
        """Labels, and the segment of each example, both in the order in which the examples came."""
        segments = torch.empty(len(layout.examples), dtype=torch.int64)
        for segment, example in enumerate(layout.order):
            if example is not None:
                segments[example] = segment
        batch = {"label_segments": segments}
        return batch if self.values is None else batch | {"labels": self.values}


def take_labels(columns: dict[str, list[Any]]) -> SegmentLabels:
    """Takes the labels out of the columns: int64 (E,) from integers, float32 from others, (E, C)
    from C numbers each.

    Raises:
        ValueError: an example has no label but None or text, or another number of them than the
            first one.
    """
    taken = {key: columns.pop(key) for key in LABEL_KEYS if key in columns}
    if not taken:
        return SegmentLabels(None)
    key, values = next(iter(taken.items()))
    rows = list[Tensor]()
    for index, value in enumerate(values):
        try:
            row = torch.as_tensor(value)
            if row.is_meta or row.layout != torch.strided:
                raise TypeError
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"{key} of example {index} must be numbers, got {value!r}") from None
        if row.ndim > 1 or row.numel() == 0:
            raise ValueError(
                f"{key} of example {index} must be one number or a vector, got shape "
                f"{tuple(row.shape)}"
            )
        if rows and row.shape != rows[0].shape:
            raise ValueError(
                f"{key} of example {index} has shape {tuple(row.shape)}, of example 0 "
                f"{tuple(rows[0].shape)}"
            )
        rows.append(row)
    made = torch.stack([row.float() if row.is_floating_point() else row for row in rows]).cpu()
    return SegmentLabels(made if made.is_floating_point() else made.long())
