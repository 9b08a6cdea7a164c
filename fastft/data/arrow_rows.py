"""Rows of a `datasets.Dataset`, read where they lie.

`datasets` gathers the rows of a batch into a new table, which is copied again to be of one piece. A
collator copies the tokens anyway, so here a row is a view of the table's memory (of the mapped
file): nothing is read but the numbers, and no Python object is made of a token.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from fastft.data.columns import Columns
from fastft.foreign.loaders import chosen_rows

Fetch = Callable[[Sequence[int]], list[Any]]


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
    memory = [_list_memory(chunk) for chunk in column.chunks]
    if None in memory or not memory:
        return lambda rows: [column[row].as_py() for row in rows]
    # the first row of each chunk
    begins = list(itertools.accumulate(map(len, column.chunks), initial=0))[:-1]

    def of_chunk(chunk: int, rows: Any) -> list[Any]:
        numbers, offsets = memory[chunk]  # type: ignore[misc]
        places = rows - begins[chunk]
        bounds = zip(offsets[places].tolist(), offsets[places + 1].tolist(), strict=True)
        return [numbers[begin:end] for begin, end in bounds]

    def fetch(rows: Sequence[int]) -> list[Any]:
        import numpy

        if len(begins) == 1:
            return of_chunk(0, numpy.asarray(rows, numpy.int64))
        chunks = [bisect.bisect_right(begins, row) - 1 for row in rows]
        every = numpy.asarray(rows, numpy.int64)
        views: list[Any] = [None] * len(rows)
        for chunk in set(chunks):
            members = [place for place, one in enumerate(chunks) if one == chunk]
            for place, view in zip(members, of_chunk(chunk, every[members]), strict=True):
                views[place] = view
        return views

    return fetch


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
        rows = examples if self._rows is None else self._rows[list(examples)].tolist()
        return {key: fetch(rows) for key, fetch in self._fetchers.items()}

    def __call__(self, examples: Sequence[int]) -> list[dict[str, Any]]:
        """Reads them one by one."""
        columns = self.columns(examples)
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
