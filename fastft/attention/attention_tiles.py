"""Pieces and tiles of packed rows for `segment_attention`: which queries see which keys.

A *piece* is one segment, or one chunk of a segment where attention is chunked. A *tile* is some
queries of a piece with the keys that causality and the window leave them:

    low  = max(first key, first query - window + 1)
    high = last query + 1 if causal, else last query + window

so that the tiles' scores together are linear in the tokens where a window binds.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastft.attention.segments import Segments


class Piece(NamedTuple):
    """Tokens of one row whose queries read these keys alone."""

    row: int
    q0: int
    q1: int
    k0: int
    k1: int


class Pieces(list[Piece]):
    """The pieces of a batch."""

    @functools.cached_property
    def table(self) -> Tensor:
        """The pieces as a tensor of the host, int64 (pieces, 5)."""
        return torch.tensor(self, dtype=torch.int64, device="cpu").reshape(len(self), 5)


class Tile(NamedTuple):
    """Queries and the keys that they may see; query i of the tile stands at its key `shift + i`."""

    row: int
    queries: slice
    keys: slice
    shift: int

    @property
    def rows(self) -> int:
        """The count of queries."""
        return self.queries.stop - self.queries.start

    @property
    def columns(self) -> int:
        """The count of keys."""
        return self.keys.stop - self.keys.start


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One attention call without its differentiable tensors."""

    segments: Segments
    pieces: Pieces
    length: int  # queries of a row
    causal: bool
    window: int | None
    chunk: int | None
    scale: float
    softcap: float | None
    mask: Tensor | None
    dropout: float
    seed: int

    def tiles(self, block: Callable[[int], int]) -> Iterator[Tile]:
        """The pieces in blocks of `block(keys)` queries, with the keys alone that causality and the
        window leave."""
        for row, q0, q1, k0, k1 in self.pieces:
            rows = block(k1 - k0)
            for start in range(q0, q1, rows):
                stop, low, high = min(start + rows, q1), k0, k1
                if self.window is not None:
                    low = max(low, k0 + start - q0 - self.window + 1)
                    high = min(high, k0 + stop - q0 + self.window - 1)
                if self.causal:
                    high = k0 + stop - q0
                yield Tile(row, slice(start, stop), slice(low, high), start - q0 + k0 - low)

    def visible(self, tile: Tile, device: torch.device) -> Tensor | None:
        """A mask of the keys that each query of a tile sees, bool (queries, keys); None: all."""
        window = (
            self.window
            if self.window is not None and max(tile.rows, tile.columns) > self.window
            else None
        )
        if window is None and (
            not self.causal or (tile.rows == 1 and tile.shift == tile.columns - 1)
        ):
            return None
        return _band(tile.rows, tile.columns, tile.shift, self.causal, window, device)

    def boundaries(self, device: torch.device) -> tuple[Tensor, Tensor, int, int]:
        """cu_seqlens and max_seqlen of queries and keys on `device`, of the chunks where there are
        chunks."""
        segments = self.segments
        ends = segments.on_device(device)
        if self.chunk is None:
            return *ends, *segments.longest
        key = ("ends of chunks", self.chunk, device)
        if key not in segments.made:
            segments.made[key] = _chunk_ends(ends[0], self.chunk, len(self.pieces))
        chunks, longest = segments.made[key], min(self.chunk, segments.longest[0])
        return chunks, chunks, longest, longest

    def new_outputs(self, query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Allocates out (R, T, H, Dv) of the query's dtype and lse (R, H, T), at least float32."""
        rows, heads, length, _ = query.shape
        wide = torch.promote_types(query.dtype, torch.float32)
        return query.new_empty((rows, length, heads, value.shape[3])), query.new_empty(
            (rows, heads, length), dtype=wide
        )

    def generator(self, device: torch.device) -> torch.Generator | None:
        """Makes the source of dropout's random numbers, the same for each forward and backward;
        None without dropout."""
        return torch.Generator(device).manual_seed(self.seed) if self.dropout > 0 else None


def _chunk_ends(ends: Tensor, chunk: int, chunks: int) -> Tensor:
    """Computes cu_seqlens of all chunks, int32 (chunks + 1,), on the device of `ends`: a copy from
    the host would wait."""
    counts = (ends.diff() + (chunk - 1)) // chunk
    segment = torch.repeat_interleave(counts, output_size=chunks)
    place = torch.arange(chunks, device=ends.device) - (counts.cumsum(0) - counts)[segment]
    return torch.cat([(ends[segment] + place * chunk).int(), ends[-1:]])


@functools.lru_cache(maxsize=16)
def _band(
    queries: int, keys: int, shift: int, causal: bool, window: int | None, device: torch.device
) -> Tensor:
    """Returns which keys of a tile each query sees, bool (queries, keys)."""
    behind = (
        torch.arange(queries, device=device)[:, None] + shift - torch.arange(keys, device=device)
    )
    visible = behind >= 0 if causal else behind.new_ones((), dtype=torch.bool).expand_as(behind)
    return visible if window is None else visible & (behind.abs() < window)


def _check(name: str, ends: list[int], rows: int, length: int) -> None:
    """Raises ValueError unless the boundaries cover the tokens of all rows."""
    if (
        ends[0] != 0
        or ends[-1] != rows * length
        or any(after < end for end, after in itertools.pairwise(ends))
    ):
        raise ValueError(
            f"{name} must rise from 0 to {rows * length}, the {rows} x {length} tokens that "
            f"attention got; it goes from {ends[0]} to {ends[-1]}. Does the model add tokens to "
            "the packed ones?"
        )


def pieces_of(
    segments: Segments, rows: int, length_q: int, length_k: int, same: bool, chunk: int | None
) -> Pieces:
    """Finds the segments that have queries, or their chunks, as places in their rows.

    With `same` a segment must have as many keys as queries, as causality, a window and chunks need.
    It is done once a batch: the list is for all who ask, not to be changed.
    """
    key = ("pieces", rows, length_q, length_k, same, chunk)
    if key not in segments.made:
        segments.made[key] = _pieces(segments, rows, length_q, length_k, same, chunk)
    pieces: Pieces = segments.made[key]
    return pieces


def _pieces(
    segments: Segments, rows: int, length_q: int, length_k: int, same: bool, chunk: int | None
) -> Pieces:
    _check("cu_seqlens_q", segments.bounds_q, rows, length_q)
    if not segments.alike or length_k != length_q:
        _check("cu_seqlens_k", segments.bounds_k, rows, length_k)
    pieces = Pieces()
    for (begin_q, end_q), (begin_k, end_k) in zip(
        itertools.pairwise(segments.bounds_q), itertools.pairwise(segments.bounds_k), strict=True
    ):
        if begin_q == end_q:
            continue
        row = begin_q // length_q
        q0, q1, k0, k1 = (
            begin_q - row * length_q,
            end_q - row * length_q,
            begin_k - row * length_k,
            end_k - row * length_k,
        )
        if q1 > length_q or k0 < 0 or k1 > length_k or k0 == k1 or (same and q1 - q0 != k1 - k0):
            raise ValueError(
                "a segment must lie in one row and have keys, as many as queries if attention is "
                f"causal or local: queries {begin_q} to {end_q} in rows of {length_q}, keys "
                f"{begin_k} to {end_k} in rows of {length_k}"
            )
        if chunk is None:
            pieces.append(Piece(row, q0, q1, k0, k1))
        else:
            spans = [(start, min(start + chunk, q1 - q0)) for start in range(0, q1 - q0, chunk)]
            pieces.extend(
                Piece(row, q0 + start, q0 + stop, k0 + start, k0 + stop) for start, stop in spans
            )
    return pieces


def part_of(whole: Tensor, tile: Tile) -> Tensor:
    """The view of a bias or mask (1|R, 1|H, 1|T, 1|U) for a tile: (1|H, 1|queries, 1|keys)."""
    part = whole[tile.row if whole.shape[0] > 1 else 0]
    part = part[:, tile.queries] if part.shape[1] > 1 else part
    return part[:, :, tile.keys] if part.shape[2] > 1 else part


def mask_scores(call: AttentionCall, tile: Tile, scores: Tensor) -> Tensor:
    """Writes minus infinity where a query may not look, adds a floating-point mask; in place."""
    visible = call.visible(tile, scores.device)
    if visible is not None:
        scores.masked_fill_(~visible, -torch.inf)
    if call.mask is not None:
        part = part_of(call.mask, tile)
        scores = (
            scores.masked_fill_(~part, -torch.inf)
            if part.dtype == torch.bool
            else scores.add_(part)
        )
    return scores
