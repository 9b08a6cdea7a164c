"""Rows of a packed batch: which example goes into which, and in what order the segments lie.

All rows have the same number of tokens, so the longest decides. Units (examples, or whole packs)
are taken from the longest to the shortest, each into the row that has the fewest tokens so far: no
row is then longer than 4/3 of the best possible (Graham 1969).
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fastft.data.column_rows import Column, ColumnRows
from fastft.data.columns import MAX_TOKENS, Columns, flatten_column, padding_like


def balanced_rows(sizes: Sequence[int], rows: int) -> list[list[int]]:
    """Shares units of the given sizes out over at most `rows` rows.

    Returns:
        The units of each row, in order; the rows by their first unit.
    """
    members: list[list[int]] = [[] for _ in range(min(rows, len(sizes)))]
    heap = [(0, row) for row in range(len(members))]
    for unit in sorted(range(len(sizes)), key=lambda unit: -sizes[unit]):
        tokens, row = heap[0]
        members[row].append(unit)
        heapq.heapreplace(heap, (tokens + sizes[unit], row))
    return sorted(map(sorted, members))


@dataclass(eq=False)
class Layout:
    """The places of examples: each row has a segment for each, and one of padding if it needs it.

    Attributes:
        members: the examples of each row.
        width: tokens of a row.
        lengths: tokens of each segment.
        order: the example of each segment, None for padding.
        padding: tokens of padding at the end of each row.
    """

    members: Sequence[Sequence[int]]
    width: int
    lengths: list[int]
    order: list[int | None]
    padding: list[int]

    @property
    def is_plain(self) -> bool:
        """True where the examples lie as they came, without padding."""
        every = range(len(self.order))
        return [*self.members] == [every] or self.order == [*every]

    def tensors(self, columns: Columns, fills: Mapping[str, int]) -> dict[str, Tensor]:
        """Lays columns out, (R, T) each; padding holds `fills`, or 0 where they have no number."""
        return {
            key: self._tensor(key, self._arranged(values, fills.get(key, 0)))
            for key, values in columns.items()
        }

    def _tensor(self, key: str, arranged: Column) -> Tensor:
        shape = len(self.members), self.width
        if isinstance(arranged, ColumnRows):
            return arranged.joined(*shape)
        return flatten_column(key, arranged).view(shape)

    def _arranged(self, values: Column, fill: int) -> Column:
        """Sorts the values of a column as the segments lie."""
        if self.is_plain:
            return values
        return [
            padding_like(values[0], length, fill) if example is None else values[example]
            for example, length in zip(self.order, self.lengths, strict=True)
        ]

    def beside(self, lengths: Sequence[int], multiple: int) -> Layout:
        """Lays the examples' tokens on another side, `lengths` of each, in the same segments.

        A segment of padding may be empty on either side.
        """
        padded = [padding > 0 for padding in self.padding]
        return _laid_out(lengths, self.members, _width(lengths, self.members, multiple), padded)


def _of_row(lengths: Sequence[int], row: Sequence[int]) -> Sequence[int]:
    # one row of all examples, as a rule
    if row == range(len(lengths)):
        return lengths
    return [lengths[example] for example in row]


def _width(lengths: Sequence[int], rows: Sequence[Sequence[int]], multiple: int) -> int:
    """Counts the tokens of the longest row, rounded up to a multiple."""
    longest = max([sum(_of_row(lengths, row)) for row in rows])
    return longest + -longest % multiple


def lay_out(
    lengths: Sequence[int],
    rows: Sequence[Sequence[int]],
    multiple: int,
    beside: Sequence[int] = (),
) -> Layout:
    """Lays examples out in rows that are all as long as the longest.

    Args:
        lengths: tokens of each example.
        rows: the examples of each row.
        multiple: of what the rows' tokens are rounded up to.
        beside: tokens of each example on another side, whose padding needs padding here.

    Raises:
        ValueError: the rows have more tokens than int32 can count.
    """
    width = _width(lengths, rows, multiple)
    if beside:
        other = _width(beside, rows, multiple)
        ends = [[sum(side[one] for one in row) for side in (lengths, beside)] for row in rows]
        width += multiple if any(end == width and needs < other for end, needs in ends) else 0
    return _laid_out(lengths, rows, width, [False] * len(rows))


def _laid_out(
    lengths: Sequence[int], rows: Sequence[Sequence[int]], width: int, padded: Sequence[bool]
) -> Layout:
    """Fills rows up to `width` tokens; those of `padded` get a segment of padding be it empty."""
    if len(rows) * width > MAX_TOKENS:
        raise ValueError(
            f"{len(rows)} rows of {width} tokens are more than int32 boundaries can count"
        )
    padding: list[int] = []
    segment_lengths: list[int] = []
    order: list[int | None] = []
    for row, ends_with_padding in zip(rows, padded, strict=True):
        of_row = _of_row(lengths, row)
        rest = width - sum(of_row)
        padding.append(rest)
        segment_lengths += of_row
        order += row
        if rest or ends_with_padding:
            segment_lengths.append(rest)
            order.append(None)
    return Layout(rows, width, segment_lengths, order, padding)
