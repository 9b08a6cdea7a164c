"""Packs that are made a group at a time, with nearly equal sums of squared lengths.

Best fit makes packs one after another, each of the longest examples that are left: those of a group
then differ, by much among the longest examples, of which there are few. Here the packs of a group
begin with the longest examples, one each, and take the next in turn, who lacks the most squares
first. What each may take is bounded by the squares that it lacks: with the capacity C, r tokens of
room, q squares to go, and fillers of f tokens in the rest of the room,

    x^2 + f (r - x) <= q,    x <= r

The squares to reach are those of the shortest beginning, filled with the longest that fit, and at
least those of the longest beginning, filled with fillers.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from fastft.data.plan import PackPlan, plan_packs

# of all squares: groups at the end of a window which lack less, together, stay as they are
TOLERATED = 0.001
FILLER = 0.1  # the quantile of the lengths that fillers have


class _Pool:
    """Entries by their lengths; the longest that fits is found in nearly constant time."""

    def __init__(self, lengths: list[int]) -> None:
        entries = defaultdict(list)
        for entry, length in enumerate(lengths):
            entries[length].append(entry)
        self.lengths = sorted(entries)
        self._entries = [entries[length] for length in self.lengths]
        # a place of shorter entries, all between which are gone
        self._below = list(range(-1, len(self.lengths) - 1))

    def longest(self, most: float) -> int:
        """Finds the place of the longest entries of at most so many tokens; -1 without any."""
        place = found = bisect_right(self.lengths, most) - 1
        while found >= 0 and not self._entries[found]:
            found = self._below[found]
        while place > found:
            self._below[place], place = found, self._below[place]
        return found

    def take(self, place: int) -> int:
        return self._entries[place].pop()

    def left(self) -> list[int]:
        return [entry for entries in self._entries for entry in entries]


@dataclass
class _Pack:
    """A pack that is being made: its entries, tokens of room, and the squares that it lacks."""

    entries: list[int]
    room: int
    lacking: float = 0.0

    def grow(self, pool: _Pool, filler: float, max_sequences: int) -> bool:
        """Takes the longest entry that it may; False if there is none."""
        if self.room == 0 or len(self.entries) == max_sequences:
            return False
        beyond_fillers = max(0.0, self.lacking - filler * self.room)
        most = (filler + math.sqrt(filler**2 + 4 * beyond_fillers)) / 2
        place = pool.longest(min(self.room, most))
        if place < 0:  # all that are left are longer
            place = pool.longest(self.room)
        if place < 0:
            return False
        length = pool.lengths[place]
        self.entries.append(pool.take(place))
        self.room -= length
        self.lacking -= length**2
        return True


def pack_costs(plan: PackPlan) -> tuple[Tensor, Tensor]:
    """Sums up the tokens of each pack, int64, and their sequences' squared lengths, float64."""
    tokens = functional.pad(plan.lengths.cumsum(0), (1, 0))[plan.offsets].diff()
    pack = torch.repeat_interleave(plan.offsets.diff())
    squares = torch.zeros(len(plan), dtype=torch.float64)
    return tokens, squares.index_add_(0, pack, plan.lengths.double().square())


def turned(windows: Tensor) -> Tensor:
    """Tells which windows begin with their cheapest packs: every other, so that a group across two
    has packs that are alike."""
    return windows % 2 == 1


def even_packs(plan: PackPlan, group: int, max_sequences: int) -> PackPlan | None:
    """Makes packs of a window anew where groups of them would differ in their squares.

    Groups are consecutive packs when each window's are sorted by their squares. A window has as
    many packs as before; where it would need another number it stays as it was.

    Returns:
        The plan, or None where nothing changes.
    """
    squares = pack_costs(plan)[1]
    labels, counts = plan.windows.unique_consecutive(return_counts=True)
    begins = [0, *itertools.accumulate(counts.tolist())]
    packs, changed = list[Tensor](), False
    for (begin, end), up in zip(itertools.pairwise(begins), turned(labels).tolist(), strict=True):
        # the dearest that share a group with those of the window beside
        begun = min(end % group if up else -begin % group, end - begin)
        groups = _loose_groups(squares[begin:end], begun, group)
        entries = slice(int(plan.offsets[begin]), int(plan.offsets[end]))
        if groups:
            sizes = [*[begun] * (begun > 0), *[group] * groups]
            made = _made(plan.lengths[entries], plan.max_tokens, sizes, max_sequences)
            if len(made) == end - begin:
                packs += [entries.start + torch.tensor(pack) for pack in made]
                changed = True
                continue
        numbers = torch.arange(entries.start, entries.stop)
        packs += numbers.split(plan.offsets[begin : end + 1].diff().tolist())
    if not changed:
        return None
    offsets = torch.tensor([0, *itertools.accumulate(map(len, packs))])
    return replace(plan.entries(torch.cat(packs)), offsets=offsets)


def _loose_groups(squares: Tensor, begun: int, group: int) -> int:
    """Counts the groups of a window that lack more squares than is tolerated; all but the last."""
    ordered = squares.sort(descending=True).values[begun:]
    groups = ordered[: len(ordered) // group * group].view(-1, group)[:-1]
    lacking = groups[:, :1].sub(groups).sum(1)
    return int((lacking.flip(0).cumsum(0) > TOLERATED * squares.sum()).sum())


def _made(lengths: Tensor, capacity: int, sizes: list[int], max_sequences: int) -> list[list[int]]:
    """Packs entries of these lengths in groups of these sizes, and the rest by best fit."""
    pool = _Pool(lengths.tolist())
    filler = float(lengths.sort().values[int(FILLER * len(lengths))])
    packs = [
        made.entries
        for size in sizes
        for made in _group(pool, size, capacity, filler, max_sequences)
    ]
    rest = torch.tensor(pool.left(), dtype=torch.int64)
    if rest.numel():
        plan = plan_packs(lengths[rest], capacity, max_sequences=max_sequences)
        packs += [rest[pack].tolist() for pack in plan]
    return packs


def _group(pool: _Pool, size: int, capacity: int, filler: float, max_sequences: int) -> list[_Pack]:
    """Makes packs that begin with the longest entries that are left, and takes these out."""
    places = itertools.islice(iter(lambda: pool.longest(capacity), -1), size)
    packs = [_Pack([pool.take(place)], capacity - pool.lengths[place]) for place in places]
    if not packs:
        return packs
    least = (capacity - packs[0].room) ** 2 + filler * packs[0].room
    squares = max(least, _squares_if_filled(pool, capacity, packs[-1].room))
    for pack in packs:
        pack.lacking = squares - (capacity - pack.room) ** 2
    growing = packs
    while growing:
        in_turn = sorted(growing, key=lambda pack: -pack.lacking)
        growing = [pack for pack in in_turn if pack.grow(pool, filler, max_sequences)]
    return packs


def _squares_if_filled(pool: _Pool, capacity: int, room: int) -> float:
    """Estimates the squares of a pack with so much room, where the longest that fit go."""
    squares = float((capacity - room) ** 2)
    while room > 0 and (place := pool.longest(room)) >= 0:
        length = pool.lengths[place]
        squares += room // length * length**2
        room %= length
    return squares
