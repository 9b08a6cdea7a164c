"""Rows of a `datasets.Dataset`, read where they lie.

`datasets` gathers the rows of a batch into a new table, which is copied again to be of one piece. A
collator copies the tokens anyway, so here a row is a view of the table's memory (of the mapped
file): nothing is read but the numbers, and no Python object is made of a token.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any

from fastft.data.column_rows import Column, ListColumn
from fastft.data.columns import Columns
from fastft.foreign.loaders import chosen_rows

Fetch = Callable[["array[int]"], Column]


def _list_memory(array: Any) -> tuple[Any, Any] | None:
    """Finds the numbers and the offsets of an Arrow array of number lists.

    Returns:
        Read-only numpy views of both; None for any other array.
    """
    import pyarrow

    types, kind = pyarrow.types, array.type
    if not (types.is_list(kind) or types.is_large_list(kind)):
        return None
    numbers = types.is_integer(kind.value_type) or types.is_floating(kind.value_type)
    if not numbers or array.null_count or array.values.null_count:
        return None
    return array.values.to_numpy(), array.offsets.to_numpy()


def fetcher(column: Any) -> Fetch:
    """Makes the function that gives the values of a column's rows; lists of numbers as views."""
    chunks = [memory for chunk in column.chunks if (memory := _list_memory(chunk)) is not None]
    if len(chunks) < len(column.chunks) or not chunks:
        return lambda rows: [column[row].as_py() for row in rows]
    return ListColumn(chunks).fetch


class ArrowRows:
    """Rows of a `datasets.Dataset` as dicts, whatever its format.

    Lists of numbers are read-only numpy views.

    Args:
        dataset: what it holds is taken as it is now.
    """

    def __init__(self, dataset: Any) -> None:
        every = dataset.format["output_all_columns"]
        chosen = dataset.column_names if every else dataset.format["columns"]
        self._fetchers = {key: fetcher(dataset.data.table.column(key)) for key in chosen}
        self._rows = chosen_rows(dataset)

    def columns(self, examples: Sequence[int]) -> Columns:
        """Reads the examples of the given numbers, key by key."""
        chosen = examples if self._rows is None else self._rows[list(examples)].tolist()
        rows = array("q", chosen)  # once for all columns
        return {key: fetch(rows) for key, fetch in self._fetchers.items()}

    def __call__(self, examples: Sequence[int]) -> list[dict[str, Any]]:
        """Reads them one by one."""
        columns = self.columns(examples)
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
