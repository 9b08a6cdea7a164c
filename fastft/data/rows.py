"""Which example goes into which row of a packed batch, and in what order the segments then lie.

All rows have the same number of tokens, so the longest decides. Units (examples, or whole packs)
are taken from the longest to the shortest, each into the row that has the fewest tokens so far: no
row is then longer than 4/3 of the best possible (Graham 1969).
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fastft.data.columns import MAX_TOKENS, padding_like


def balanced_rows(sizes: Sequence[int], rows: int) -> list[list[int]]:
    """Units of the given sizes over at most `rows` rows: for each row its units in order, rows by
    their first unit."""
    if rows == 1:
        return [list(range(len(sizes)))]
    members: list[list[int]] = [[] for _ in range(min(rows, len(sizes)))]
    heap = [(0, row) for row in range(len(members))]
    for unit in sorted(range(len(sizes)), key=lambda unit: -sizes[unit]):
        tokens, row = heap[0]
        members[row].append(unit)
        heapq.heapreplace(heap, (tokens + sizes[unit], row))
    return sorted(map(sorted, members))


@dataclass(frozen=True)
class Layout:
    """The examples of each row, one segment each, and the tokens that fill a row up, one more
    segment if there are any.

    `width` is the tokens of a row, `lengths` those of each segment; `order` has the example of each
    segment, None for padding.
    """

    rows: int
    width: int
    lengths: list[int]
    order: list[int | None]

    @functools.cached_property
    def is_plain(self) -> bool:
        """Whether the examples lie as they came, without padding."""
        return self.order == list(range(len(self.order)))

    @property
    def padding(self) -> list[int]:
        """How many tokens at the end of each row are padding."""
        padding, end = [0] * self.rows, 0
        for example, length in zip(self.order, self.lengths, strict=True):
            end += length
            if example is None and length:
                padding[end // self.width - 1] = length
        return padding

    @property
    def examples(self) -> list[int]:
        """The examples in the order in which they lie."""
        return [example for example in self.order if example is not None]

    def arrange(self, values: list[Any], fill: int) -> list[Any]:
        """The values of a column, one of each example, as the segments lie; padding holds
        `fill`."""
        if self.is_plain:
            return values
        segments = zip(self.order, self.lengths, strict=True)
        first = values[0]
        return [
            padding_like(first, length, fill) if example is None else values[example]
            for example, length in segments
        ]


def width_of(lengths: Sequence[int], rows: Iterable[Iterable[int]], multiple: int) -> int:
    """Tokens of the longest row, rounded up to a multiple."""
    longest = max(sum(lengths[example] for example in row) for row in rows)
    return longest + -longest % multiple


def lay_out(
    lengths: Sequence[int],
    rows: Sequence[Sequence[int]],
    width: int,
    padded: Sequence[bool] | None = None,
) -> Layout:
    """The layout of `rows` of examples of the given lengths, each row filled up to `width` tokens.

    `padded` says which rows end with a segment of padding, be it empty; by default those that are
    not full.

    Raises:
        ValueError: the rows have more tokens than int32 can count.
    """
    if len(rows) * width > MAX_TOKENS:
        raise ValueError(
            f"{len(rows)} rows of {width} tokens are more than int32 boundaries can count"
        )
    segment_lengths: list[int] = []
    order: list[int | None] = []
    for number, row in enumerate(rows):
        chosen = [lengths[example] for example in row]
        segment_lengths += chosen
        order += row
        padding = width - sum(chosen)
        if padding if padded is None else padded[number]:
            segment_lengths.append(padding)
            order.append(None)
    return Layout(len(rows), width, segment_lengths, order)
