"""Rows of an Arrow column of number lists: views of its memory, or joined by the native library.

A batch needs of its rows how long they are and their numbers one after another. Where the native
library can read both, no object is made of a row: the rows are their numbers in the column until
somebody asks for one.
"""

from __future__ import annotations

import bisect
import ctypes
import functools
import itertools
import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from fastft import _native


@functools.cache
def _joiner() -> Callable[[int, int, int, int, int], int] | None:
    """Finds the function of `csrc/cpu/column_rows.cpp`; None without the native library."""
    loaded = _native.library("cpu")
    if isinstance(loaded, str):
        return None
    address, number = ctypes.c_void_p, ctypes.c_int64
    # Python's lock is let go of meanwhile: of a mapped file the disk may have to be read
    made = ctypes.CFUNCTYPE(number, address, address, number, address, number)
    return made(("fastft_join_rows", loaded))


class ListColumn:
    """The memory of an Arrow column of number lists.

    Args:
        chunks: the numbers of each chunk, and the offsets of its rows in them, one more than there
            are rows: read-only numpy arrays, int32 or int64 offsets.

    Attributes:
        join: the native function that joins rows, or None where there is none for such numbers.
        address: of what it is told of the column.
    """

    def __init__(self, chunks: Sequence[tuple[Any, Any]]) -> None:
        self._numbers = [numbers for numbers, _ in chunks]
        self._offsets = [memoryview(offsets) for _, offsets in chunks]
        rows = [max(len(offsets) - 1, 0) for offsets in self._offsets]
        self._firsts = [*itertools.accumulate(rows, initial=0)][:-1]
        (numbers, offsets), kind = chunks[0], chunks[0][0].dtype.kind
        # int64 has no room for all of uint64
        is_read = kind == "i" or (kind == "u" and numbers.itemsize < 8)
        # Arrow asks for it, but who makes a buffer by hand need not
        is_aligned = all(one.flags.aligned for chunk in chunks for one in chunk)
        self.join = _joiner() if is_read and is_aligned else None
        # as csrc/cpu/column_rows.cpp has its structs
        self._table = array("q")
        for (of_rows, places), first, count in zip(chunks, self._firsts, rows, strict=True):
            addresses = places.ctypes.data, of_rows.ctypes.data
            self._table.extend((first, count, *addresses, len(of_rows)))
        width = numbers.itemsize if kind == "i" else -numbers.itemsize
        table = self._table.buffer_info()[0]
        self._head = array("q", (table, len(chunks), offsets.itemsize, width))
        self.address = self._head.buffer_info()[0]

    def fetch(self, rows: array[int]) -> Column:
        """Gives the values of rows: views, or what makes views when asked for one."""
        return ColumnRows(self, rows) if self.join else self.views(rows)

    def views(self, rows: Sequence[int]) -> list[Any]:
        """Gives a read-only numpy view of each row's numbers."""
        return [*map(self.view, rows)]

    def view(self, row: int) -> Any:
        """Gives that of one."""
        chunk, begin, end = self._find(row)
        return self._numbers[chunk][begin:end]

    def _find(self, row: int) -> tuple[int, int, int]:
        """Finds the chunk of a row, and where the row begins and ends in its numbers."""
        chunk = bisect.bisect_right(self._firsts, row) - 1
        offsets, place = self._offsets[chunk], row - self._firsts[chunk]
        return chunk, offsets[place], offsets[place + 1]

    def lengths(self, rows: Sequence[int]) -> list[int]:
        """Counts the numbers of each row, by its offsets."""
        if len(self._offsets) == 1:
            (offsets,) = self._offsets
            return [offsets[row + 1] - offsets[row] for row in rows]
        return [end - begin for _, begin, end in map(self._find, rows)]


class ColumnRows:
    """Some rows of a column that the native library can read: as the list of their views would be,
    but nobody can write to it.

    Args:
        column: whose rows they are.
        rows: their numbers there.
    """

    __slots__ = ("_lengths", "column", "rows")

    def __init__(self, column: ListColumn, rows: array[int]) -> None:
        self.column, self.rows = column, rows
        self._lengths: list[int] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.column.views(self.rows))

    @overload
    def __getitem__(self, place: int) -> Any: ...
    @overload
    def __getitem__(self, place: slice) -> ColumnRows: ...
    def __getitem__(self, place: int | slice) -> Any:
        rows = self.rows[place]
        return self.column.view(rows) if isinstance(rows, int) else ColumnRows(self.column, rows)

    def __reduce__(self) -> Any:
        # addresses mean nothing in another process
        return list, ([*self],)

    @property
    def lengths(self) -> list[int]:
        """How long each row is."""
        if self._lengths is None:
            self._lengths = self.column.lengths(self.rows)
        return self._lengths

    def joined(self, *shape: int) -> Tensor:
        """Joins their T numbers in a new CPU tensor, int64.

        Args:
            shape: of T numbers in all; (T,) if none is given.

        Raises:
            ValueError: the offsets of the column lead out of its memory.
        """
        shape = shape or (max(sum(self.lengths), 0),)
        tensor, room, join = (
            torch.empty(shape, dtype=torch.int64),
            math.prod(shape),
            self.column.join,
        )
        assert join is not None
        rows, count = self.rows.buffer_info()
        if join(self.column.address, rows, count, tensor.data_ptr(), room) != room:
            raise ValueError(
                "rows of a column lie outside of the column's memory: the file that it comes from "
                "is damaged"
            )
        return tensor


Column = list[Any] | ColumnRows  # the values of a key, one of each example


def lengths_in(values: Sequence[Any] | ColumnRows) -> list[int]:
    """How long each of some values is."""
    return values.lengths if isinstance(values, ColumnRows) else [*map(len, values)]


def chained(parts: Sequence[Column]) -> Column:
    """Puts parts of a column one after another."""
    column: Any = getattr(parts[0], "column", None)
    rows = array("q")
    for part in parts:
        if not isinstance(part, ColumnRows) or part.column is not column:
            return [*itertools.chain(*parts)]
        rows.extend(part.rows)
    return ColumnRows(column, rows)
