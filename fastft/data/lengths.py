"""Lengths of examples in tokens, by the cheapest way that their dataset has.

A `datasets.Dataset` keeps lists as offsets into one buffer: their differences are the lengths, and
no token is read. What `select` or `shuffle` left out or moved is taken from these, not from the
rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastft.data.processed import token_count
from fastft.foreign.loaders import chosen_rows, is_dataset, is_transformed


def scan_lengths(dataset: Any, length_column: str | None = None) -> Tensor:
    """Counts the tokens of each example, integers (N,).

    Args:
        dataset: a list, a map-style torch dataset or a `datasets.Dataset`.
        length_column: where an example says how many tokens it has. None: a `datasets.Dataset` is
            asked for the offsets of its `input_ids` or, where a transform makes the tokens, for its
            column `length` if it has one; anything else for each example.

    Raises:
        ValueError: an example has no `input_ids`, or no `length_column`.
    """
    if is_dataset(dataset):
        stored = dataset.column_names
        shown = dataset.format["columns"]
        transformed = is_transformed(dataset)
        if length_column is not None and length_column not in stored:
            raise ValueError(
                f"length_column={length_column!r} is none of the dataset's columns {stored}"
            )
        if length_column is None and not transformed and "input_ids" in shown:
            return _list_lengths(dataset)
        if length_column is not None or "length" in stored:
            return _taken(dataset, dataset.data.column(length_column or "length"))
        if not transformed:
            raise ValueError(f"example 0 has no input_ids to pack, only {shown}")
    read = _tokens if length_column is None else _stated
    lengths = [read(dataset, index, length_column) for index in range(len(dataset))]
    try:
        return torch.tensor(lengths, dtype=torch.int64)
    except (OverflowError, RuntimeError):
        raise ValueError(
            f"length_column={length_column!r} holds a number that does not fit into int64"
        ) from None


def _list_lengths(dataset: Any) -> Tensor:
    import pyarrow.compute

    column = dataset.data.column("input_ids")
    if _holds_lists(column.type):
        inner = pyarrow.compute.list_flatten(column)
        if len(inner) == len(column):  # (1, n) each, as processors give them
            column = inner
    try:
        return _taken(dataset, pyarrow.compute.list_value_length(column))
    except pyarrow.ArrowNotImplementedError:
        raise ValueError(
            f"input_ids must be lists of tokens, the dataset's are {column.type}"
        ) from None


def _holds_lists(kind: Any) -> bool:
    """Recognises the Arrow type of lists of lists."""
    import pyarrow

    lists = (pyarrow.types.is_list, pyarrow.types.is_large_list)
    outer = any(is_list(kind) for is_list in lists)
    return outer and any(is_list(kind.value_type) for is_list in lists)


def _taken(dataset: Any, lengths: Any) -> Tensor:
    """Turns an Arrow column of lengths into a tensor, in the order of the dataset's rows."""
    import pyarrow.compute

    # a row without a list has no tokens, and is reported as such
    array = torch.tensor(pyarrow.compute.fill_null(lengths, 0).to_numpy())
    rows = chosen_rows(dataset)
    return array if rows is None else array[torch.tensor(rows.astype("int64", copy=False))]


def _tokens(dataset: Any, index: int, _: str | None) -> int:
    try:
        return token_count(dataset[index]["input_ids"])
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"example {index} has no input_ids to pack ({type(error).__name__}: {error})"
        ) from None


def _stated(dataset: Any, index: int, column: str | None) -> int:
    try:
        return int(dataset[index][column])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(
            f"example {index} has no {column!r} ({type(error).__name__}: {error})"
        ) from None
