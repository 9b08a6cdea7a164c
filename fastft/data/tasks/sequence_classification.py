"""Labels of whole examples, for sequence classification and regression."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastft.data.columns import Columns, integers_of
from fastft.data.keys import LABEL_KEYS, LABEL_SEGMENTS
from fastft.data.rows import Layout
from fastft.data.tasks.task import Task


class SequenceClassification(Task):
    """A label for each example, (E,), or C of them, (E, C), in the order in which they came."""

    label_keys = LABEL_KEYS
    sources = ()
    undivided = "task 'sequence_classification' has no label for each"
    _labels: Tensor | None = None

    def take(self, columns: Columns) -> None:
        """Takes the labels, if there are any: int64 (E,) from integers, float32 from others, (E, C)
        from C numbers each.

        Raises:
            ValueError: an example has no label but None or text, or another number of them than the
                first one.
        """
        taken = {key: columns.pop(key) for key in LABEL_KEYS if key in columns}
        if not taken:
            return
        key, values = next(iter(taken.items()))
        rows = list[Tensor]()
        for index, value in enumerate(values):
            try:
                row = torch.as_tensor(value)
                if row.is_meta or row.layout != torch.strided:
                    raise TypeError
            except (TypeError, ValueError, RuntimeError):
                raise ValueError(
                    f"{key} of example {index} must be numbers, got {value!r}"
                ) from None
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
        self._labels = made if made.is_floating_point() else made.long()

    def fill(self, columns: Columns, layout: Layout) -> dict[str, Any]:
        """Lays the columns out; the labels stay as they came."""
        batch = super().fill(columns, layout)
        return batch if self._labels is None else {**batch, "labels": self._labels}

    def finish(self, batch: dict[str, Any], layout: Layout) -> None:
        """Says in which segment each example lies."""
        places = sorted(
            (example, segment)
            for segment, example in enumerate(layout.order)
            if example is not None
        )
        batch[LABEL_SEGMENTS] = integers_of([segment for _, segment in places])
