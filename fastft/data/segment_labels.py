"""Labels of whole examples, for sequence classification and regression."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastft.data.rows import Layout

LABEL_KEYS = ("labels", "label", "label_ids")  # as transformers' collators take them


@dataclass(frozen=True, eq=False)
class SegmentLabels:
    """`values` has one row for each example, in the order in which they came; None where they have no labels."""

    values: Tensor | None

    def arranged(self, layout: Layout) -> dict[str, Tensor]:
        """Labels in the order in which the examples lie, and the segment of each."""
        segments = [segment for segment, example in enumerate(layout.order) if example is not None]
        batch = {"label_segments": torch.tensor(segments)}
        if self.values is not None:
            batch["labels"] = self.values[torch.tensor(layout.examples)]
        return batch


def take_labels(examples: list[dict[str, Any]], columns: dict[str, list[Any]]) -> SegmentLabels:
    """The labels of the examples: int64 (E,) from integers, float32 from other numbers, (E, C) from C numbers each.

    Raises:
        ValueError: an example has no label but None or text, or another number of them than the first one.
    """
    for key in LABEL_KEYS:
        columns.pop(key, None)
    given = [key for key in LABEL_KEYS if key in examples[0]]
    if not given:
        return SegmentLabels(None)
    key, rows = given[0], list[Tensor]()
    for index, example in enumerate(examples):
        try:
            row = torch.as_tensor(example[key])
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"{key} of example {index} must be numbers, got {example[key]!r}") from None
        if row.ndim > 1 or row.numel() == 0:
            raise ValueError(f"{key} of example {index} must be one number or a vector, got shape {tuple(row.shape)}")
        if rows and row.shape != rows[0].shape:
            raise ValueError(
                f"{key} of example {index} has shape {tuple(row.shape)}, of example 0 {tuple(rows[0].shape)}"
            )
        rows.append(row)
    values = torch.stack([row.float() if row.is_floating_point() else row for row in rows]).cpu()
    return SegmentLabels(values if values.is_floating_point() else values.long())
