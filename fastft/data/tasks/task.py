"""A task as the collator sees it: the simplest, whose labels are those of the examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastft.data.columns import Columns
from fastft.data.keys import IGNORE_INDEX
from fastft.data.rows import Layout

if TYPE_CHECKING:
    from fastft.data.collator import PackingCollator


class Task:
    """The labels of one batch: a number for each token, if the examples have any.

    The collator makes a task for each batch, and calls

        take(columns)           before it looks at the columns itself
        fill(columns, layout)   when it knows where each example lies
        finish(batch, layout)   of packed batches alone, not of padded examples

    A new task is a class that overrides what is different, and its name in the collator's `TASKS`.

    Args:
        collator: its options are the task's.

    Attributes:
        label_keys: columns that are taken from the examples whatever they hold.
        sources: columns that may label tokens; the first of them that a batch has does so.
        ignored: labels at the beginning of each example that nothing predicts.
        undivided: why no example may be several documents, part of a sentence; empty where it may.
        beside: tokens of each example that stand beside its own, as a decoder's; empty without.
        fills: what padding holds, by column; 0 in others.
    """

    label_keys: tuple[str, ...] = ("labels",)
    sources: tuple[str, ...] = ("labels",)
    ignored = 0
    undivided = ""
    beside: Sequence[int] = ()

    def __init__(self, collator: PackingCollator) -> None:
        self.collator = collator
        self.fills = {"input_ids": collator.pad_token_id, "labels": IGNORE_INDEX}

    def source(self, batch: Mapping[str, Any]) -> str | None:
        """Names the column of `batch` that labels tokens; None without any."""
        return next(filter(batch.__contains__, self.sources), None)

    def take(self, columns: Columns) -> None:
        """Takes the columns out that have not one number for each token of `input_ids`.

        Args:
            columns: the values by key, one of each example.

        Raises:
            ValueError: labels that the task needs are missing, or are none.
        """

    def fill(self, columns: Columns, layout: Layout) -> dict[str, Any]:
        """Lays the columns out, (R, T) each, and the labels as the task has them.

        Args:
            columns: one number for each token of each example.
            layout: where the examples lie.
        """
        return layout.tensors(columns, self.fills)

    def finish(self, batch: dict[str, Any], layout: Layout) -> None:
        """Adds what only a packed batch has to what `fill` made."""
