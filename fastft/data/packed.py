"""A packed view of a dataset: item p is the examples of pack p. Making it reads lengths only and copies no token."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastft.data.arrow_rows import ArrowRows
from fastft.data.columns import Pack
from fastft.data.plan import PackPlan, plan_packs

SCAN_ROWS = 10_000  # rows of an Arrow table whose offsets are read at once


def _is_arrow(dataset: Any) -> bool:
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(dataset, datasets.Dataset)


def _arrow_lengths(dataset: Any) -> Tensor:
    import pyarrow.compute

    table = dataset.select_columns("input_ids").with_format("arrow")
    parts = [
        torch.tensor(pyarrow.compute.list_value_length(rows["input_ids"]).to_numpy())
        for rows in table.iter(batch_size=SCAN_ROWS)
    ]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def _length(dataset: Any, index: int) -> int:
    try:
        return len(dataset[index]["input_ids"])
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"example {index} has no input_ids to pack ({type(error).__name__}: {error})") from None


def scan_lengths(dataset: Any) -> Tensor:
    """The number of tokens of each example, int64 (N,), by the cheapest way that the dataset has.

    A `datasets.Dataset` is asked for its list offsets, or, where a transform makes the tokens, for its `length` column;
    anything else for each example.
    """
    if _is_arrow(dataset):
        if "input_ids" in dataset.column_names and dataset.format["type"] != "custom":
            return _arrow_lengths(dataset).long()
        if "length" in dataset.column_names:
            return torch.tensor(dataset.with_format(None)["length"][:], dtype=torch.int64)
    return torch.tensor([_length(dataset, index) for index in range(len(dataset))], dtype=torch.int64)


class PackedDataset(Dataset[Pack]):
    """What `pack` returns: a map-style dataset of `Pack`s, in `plan`'s order.

    Attributes:
        dataset: the examples.
        plan: which example, and which part of it, is in which pack.
    """

    def __init__(self, dataset: Any, plan: PackPlan) -> None:
        self.dataset, self.plan = dataset, plan

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> Pack:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Pack]:
        """The packs of a batch, with one access to the dataset where that offers `__getitems__` itself."""
        bounds = [self.plan.bounds(index) for index in indices]
        entries = [entry for begin, end in bounds for entry in range(begin, end)]
        chosen = torch.tensor(entries, dtype=torch.int64)
        examples = self.plan.indices[chosen].tolist()
        fetched = self._fetch(examples)
        starts, lengths = self.plan.starts[chosen].tolist(), self.plan.lengths[chosen].tolist()
        parts = iter([_part(*item) for item in zip(fetched, examples, starts, lengths, strict=True)])
        return [Pack([next(parts) for _ in range(begin, end)]) for begin, end in bounds]

    @functools.cached_property
    def _arrow(self) -> ArrowRows:
        return ArrowRows(self.dataset)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_arrow"}  # it can be made again

    def _fetch(self, examples: list[int]) -> list[dict[str, Any]]:
        if _is_arrow(self.dataset) and self.dataset.format["type"] is None:
            return self._arrow(examples)
        fetch = getattr(self.dataset, "__getitems__", None)
        return fetch(examples) if fetch else [self.dataset[example] for example in examples]


def _part(example: dict[str, Any], index: int, start: int, length: int) -> dict[str, Any]:
    """The tokens of an example that the plan wants, of every key that has as many."""
    tokens = len(example["input_ids"])
    if tokens < start + length:
        raise ValueError(f"example {index} has {tokens} tokens, but had {start + length} or more when it was packed")
    if start == 0 and tokens == length:
        return example
    whole = {key for key, value in example.items() if not _has_length(value, tokens)}
    return {key: value if key in whole else value[start : start + length] for key, value in example.items()}


def _has_length(value: Any, tokens: int) -> bool:
    return hasattr(value, "__len__") and not isinstance(value, str | dict) and len(value) == tokens


def pack(
    dataset: Any,
    max_tokens: int,
    *,
    overlong: str = "error",
    max_sequences: int | None = None,
    seed: int | None = None,
) -> PackedDataset:
    """A packed view of `dataset`: examples grouped so that each group has at most `max_tokens` tokens.

    Goes into `Trainer(train_dataset=...)` together with `PackingCollator`, with as many packs per batch as
    `per_device_train_batch_size` says. `len` is exact.

    Args:
        dataset: a list, a map-style torch dataset or a `datasets.Dataset` of dicts with `input_ids`.
        max_tokens: tokens in a pack, at most.
        overlong: what becomes of an example with more, `"error"`, `"truncate"`, `"split"`, `"drop"`; see `plan_packs`.
        max_sequences: examples in a pack, at most; None for no limit.
        seed: shuffles the order of the packs; None leaves those of the longest examples first (Trainer shuffles).

    Raises:
        TypeError: `dataset` has no length or cannot be indexed.
        ValueError: it is empty, input_ids are missing, or an argument is out of its range.
    """
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__") or isinstance(dataset, dict):
        raise TypeError(
            f"pack needs a map-style dataset, with __len__ and __getitem__, got {type(dataset).__name__}; "
            "turn an iterable one into a list or a datasets.Dataset first"
        )
    if len(dataset) == 0:
        raise ValueError("dataset is empty: there is nothing to pack")
    lengths = scan_lengths(dataset)
    return PackedDataset(
        dataset, plan_packs(lengths, max_tokens, overlong=overlong, max_sequences=max_sequences, seed=seed)
    )
