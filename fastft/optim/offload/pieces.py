"""How a step over states on the host is cut: into pieces of which each fills a staging buffer.

A piece has many small parameters, or a part of a large one. No cut changes a bit: random bits go by
the element's index, and a cut lies where the kernels begin a block of it; 8-bit moments are cut
between rows, or, where a row is longer than a piece, between blocks of 128 of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastft.optim.moments_8bit import BLOCK

# Bytes of one of the two buffers. PCIe 4 needs 2.6 ms for so many, tens of times what it takes to
# launch the copies and the kernel of a piece; more would only take memory from the model.
BUFFER = 64 * 2**20
ALIGNMENT = 128  # bytes: whatever lies in a buffer begins at a cache line of the device
_UNIT = 512  # elements between cuts: whole blocks of the kernels
_ROWS = 8  # between cuts of 8-bit moments, so that cuts are at whole 16 bytes and random blocks


class Form(NamedTuple):
    """What a cut has to know of a parameter.

    Attributes:
        numel: its elements.
        element: bytes of an element of everything that is staged for it, but for scales.
        tensors: how many tensors are staged for it.
        columns: the length of its rows if it has 8-bit moments, else 0.
    """

    numel: int
    element: int
    tensors: int
    columns: int = 0

    def blocks(self, count: int) -> int:
        """The blocks of 8-bit moments of whole rows, or of a part of a row, of `count` elements."""
        if not self.columns:
            return 0
        rows, rest = divmod(count, self.columns)
        return rows * -(-self.columns // BLOCK) + -(-rest // BLOCK)

    def size(self, count: int) -> int:
        """Bytes in a buffer of `count` elements, at most."""
        scales = 2 * 4 * self.blocks(count)
        return count * self.element + scales + self.tensors * ALIGNMENT

    def next_cut(self, begin: int) -> int:
        """The elements from `begin` on to the end, or to the end of the row that was begun."""
        within = begin % self.columns if self.columns else 0
        return self.columns - within if within else self.numel - begin

    def most(self, begin: int, room: int) -> int:
        """The most elements from `begin` on that fit into `room` bytes; at least what is not
        cut."""
        room -= self.tensors * ALIGNMENT
        if not self.columns:
            return max(1, room // self.element // _UNIT) * _UNIT
        rows = room // (self.columns * self.element + 2 * 4 * self.blocks(self.columns))
        if rows and begin % self.columns == 0:
            return (rows if rows < _ROWS else rows - rows % _ROWS) * self.columns
        blocks = max(1, room // (BLOCK * self.element + 2 * 4))
        return min(blocks * BLOCK, self.columns - begin % self.columns)


def form(param: Tensor, entries: Sequence[Tensor], held: bool) -> Form:
    """The form of a parameter with these entries of its state, in the operator's order.

    Args:
        held: whether its gradient may be staged as well.
    """
    eight_bit = entries[0].dtype == torch.int8
    staged = [*(entries[:-2] if eight_bit else entries), *([param] if held else [])]
    rows = len(param) if param.ndim > 1 else 1
    return Form(
        param.numel(),
        sum(tensor.itemsize for tensor in staged),
        len(entries) + held,
        param.numel() // max(1, rows) if eight_bit else 0,
    )


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


def elements(tensor: Tensor, span: Span, form: Form) -> Tensor:
    """The span's elements of a dense tensor that lies as its state: flat, or in whole rows or a
    part of one where moments are of 8 bits."""
    count = span.end - span.begin
    return tensor.as_strided(*_lines(count, form.columns), tensor.storage_offset() + span.begin)


def scales(tensor: Tensor, span: Span, form: Form) -> Tensor:
    """The scales of the span's blocks."""
    count = form.blocks(span.end - span.begin)
    of_row = -(-form.columns // BLOCK)
    row, column = divmod(span.begin, form.columns)
    first = tensor.storage_offset() + row * of_row + column // BLOCK
    return tensor.as_strided(*_lines(count, of_row), first)


def _lines(count: int, columns: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of so many neighbours: lines of whole rows, or of a part of one; flat where
    there are no columns."""
    if not columns:
        return (count,), (1,)
    rows = max(1, count // columns)
    return (rows, count // rows), (count // rows, 1)
