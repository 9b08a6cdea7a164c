"""How a step over states on the host is cut: into pieces of which each fills a staging buffer.

A piece has many small parameters, or a part of a large one. No cut changes a bit: random bits go by
the element's index, and a cut lies where the kernels begin a block of it; moments that are codes
are cut between rows, or, where a row is longer than a piece, between blocks of 128 of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fastft.optim.moment_blocks import BLOCK, lines
from fastft.optim.moment_codes import code_of

# Bytes of one of the two buffers. PCIe 4 needs 2.6 ms for so many, tens of times what it takes to
# launch the copies and the kernel of a piece; more would only take memory from the model.
BUFFER = 64 * 2**20
ALIGNMENT = 128  # bytes: whatever lies in a buffer begins at a cache line of the device
_UNIT = 512  # elements between cuts: whole blocks of the kernels
_ROWS = 8  # between cuts of codes, so that cuts are at whole 16 bytes and random blocks


class Form(NamedTuple):
    """What a cut has to know of a parameter.

    Attributes:
        numel: its elements.
        staged: of each tensor that is staged for it, the bytes of an entry, and for how many
            neighbours of a row that stands: 1, or more for scales and packed codes.
        columns: the length of its rows if its moments are codes, else 0.
    """

    numel: int
    staged: tuple[tuple[int, int], ...]
    columns: int = 0

    def entries(self, count: int, each: int) -> int:
        """How many entries, each for so many neighbours or for what is left of a row, stand for the
        `count` elements of whole rows or of a part of one."""
        if each == 1:
            return count
        rows, rest = divmod(count, self.columns)
        return rows * -(-self.columns // each) + -(-rest // each)

    def content(self, count: int) -> int:
        """Bytes of `count` elements."""
        return sum(size * self.entries(count, each) for size, each in self.staged)

    def size(self, count: int) -> int:
        """Bytes in a buffer of `count` elements, at most."""
        return self.content(count) + len(self.staged) * ALIGNMENT

    def next_cut(self, begin: int) -> int:
        """The elements from `begin` on to the end, or to the end of the row that was begun."""
        within = begin % self.columns if self.columns else 0
        return self.columns - within if within else self.numel - begin

    def most(self, begin: int, room: int) -> int:
        """The most elements from `begin` on that fit into `room` bytes; at least what is not
        cut."""
        room -= len(self.staged) * ALIGNMENT
        if not self.columns:
            return max(1, room // self.content(_UNIT)) * _UNIT
        rows = room // self.content(self.columns)
        if rows and begin % self.columns == 0:
            return (rows if rows < _ROWS else rows - rows % _ROWS) * self.columns
        blocks = max(1, room // self.content(BLOCK))
        return min(blocks * BLOCK, self.columns - begin % self.columns)


def form(param: Tensor, entries: Sequence[Tensor], held: bool) -> Form:
    """The form of a parameter with these entries of its state, in the operator's order.

    Args:
        held: whether its gradient may be staged as well.
    """
    code, sizes = code_of(entries[0]), [entry.itemsize for entry in entries]
    each = [1] * len(sizes)
    if code is not None:
        each = [code.packed, *each[1:-2], BLOCK, BLOCK]
    staged = (*zip(sizes, each, strict=True), *([(param.itemsize, 1)] if held else []))
    return Form(param.numel(), staged, 0 if code is None else lines(param.shape)[1])


class Span(NamedTuple):
    """Elements of the parameter at a place of a list, in the order of memory."""

    place: int
    begin: int
    end: int


def cut(forms: Sequence[Form], room: int) -> list[list[Span]]:
    """The pieces of all parameters, in their order, each of at most `room` bytes.

    A parameter that fits into a buffer is not cut; empty ones are in no piece.
    """
    pieces: list[list[Span]] = []
    left = -1
    for place, form in enumerate(forms):
        begin = 0
        while begin < form.numel:
            count = form.next_cut(begin)
            if form.size(count) > left:
                pieces.append([])
                left = room
                if form.size(count) > room:
                    count = min(count, form.most(begin, room))
            pieces[-1].append(Span(place, begin, begin + count))
            left -= form.size(count)
            begin += count
    return pieces


def buffers(forms: Sequence[Form], pieces: list[list[Span]]) -> list[int]:
    """Bytes of each staging buffer for these pieces: two, or one for one."""
    sizes = [
        sum(forms[span.place].size(span.end - span.begin) for span in spans) for spans in pieces
    ]
    return [max(sizes, default=0)] * len(sizes[:2])


def part(tensor: Tensor, span: Span, form: Form, each: int = 1) -> Tensor:
    """The span's part of a dense tensor that lies as its state, and of which an entry stands for so
    many neighbours: flat, or in whole rows or a part of one where moments are codes."""
    count, offset = form.entries(span.end - span.begin, each), tensor.storage_offset()
    if not form.columns:
        return tensor.as_strided((count,), (1,), offset + span.begin)
    row, column = divmod(span.begin, form.columns)
    of_row = -(-form.columns // each)
    rows = max(1, count // of_row)
    shape = rows, count // rows
    return tensor.as_strided(shape, (shape[1], 1), offset + row * of_row + column // each)
