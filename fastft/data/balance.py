"""Packs in groups of nearly equal cost: ranks that work on one at the same time need not wait for
each other.

With n_s the lengths of a pack's sequences, its tokens sum n_s are what its linear layers cost and
sum n_s^2 is what its attention costs. Best-fit packs have nearly equal tokens, but sum n_s^2
differs several times between them. Sorted by both, `group` neighbours are alike in both, whichever
rank takes which of them and whatever the model weighs them with. Where neighbours still differ,
among the longest examples, their examples are exchanged (`even_packs.py`).

The number of packs becomes a multiple of `group`: else accelerate would give some packs out twice
to keep the ranks in step. The packs that are least full and easiest to divide share their examples
with as many new packs as are missing, in the last window that has enough examples and the ones
before it; where there are too few for that, packs stay empty.
"""

from __future__ import annotations

import heapq
import itertools
from bisect import bisect_left, insort
from dataclasses import replace

import torch
from torch import Tensor

from fastft.data.even_packs import even_packs, pack_costs, turned
from fastft.data.plan import PackPlan

# packs whose tokens differ by less than 1 / LEVELS of the capacity count as equal in tokens
LEVELS = 200


def balanced(plan: PackPlan, group: int, max_sequences: int | None = None) -> PackPlan:
    """Makes the packs a multiple of `group`, and orders them so that each group costs nearly equal.

    A group is `group` consecutive packs. Within it the cheapest is followed by the dearest, these
    by the next cheapest and the next dearest: batches of several packs are nearer to each other
    than packs are. Groups stay in the order of their windows. A pack that had to be left empty is
    one of the last. Which examples share a pack changes where groups are more equal for it.
    """
    most = max_sequences or plan.indices.numel()
    plans = [plan, *filter(None, [even_packs(plan, group, most)])]
    made = [_ordered(_multiple(each, group, most), group) for each in plans]
    return min(made, key=lambda plan: _waited_for(plan, group))


def _ordered(plan: PackPlan, group: int) -> PackPlan:
    """Sorts the packs by their costs, and so into groups."""
    tokens, squares = pack_costs(plan)
    # from the capacity down: best fit leaves most packs full, or nearly
    level = (plan.max_tokens - tokens) * LEVELS // plan.max_tokens
    # down and up in turn: a group across two levels, or two windows, has neighbours as well
    turn = torch.where(turned(plan.windows), -1, 1)
    order = (squares * turn * torch.where(level % 2 == 0, -1, 1)).argsort(stable=True)
    order = order[(level * turn)[order].argsort(stable=True)]
    order = order[plan.windows[order].argsort(stable=True)].view(-1, group)
    return plan.reordered(torch.stack([order, order.flip(1)], 2).flatten(1)[:, :group].flatten())


def _waited_for(plan: PackPlan, group: int) -> float:
    """Sums up the dearest packs of the groups, of both costs, as shares of all."""
    shares = [cost.view(-1, group).amax(1).sum() / cost.sum() for cost in pack_costs(plan)]
    return float(sum(shares))


def _multiple(plan: PackPlan, group: int, max_sequences: int) -> PackPlan:
    """Adds the packs that are missing to a multiple of `group`, each of examples of one window."""
    missing, sizes = -len(plan) % group, plan.offsets.diff()
    tokens, _ = pack_costs(plan)
    kept = torch.ones(len(plan), dtype=torch.bool)
    # the entries of a pack that replaces one of `plan`, and its window
    divided: list[tuple[Tensor, int]] = []
    end = len(plan)
    while missing and end:
        window = int(plan.windows[end - 1])
        begin = int(torch.searchsorted(plan.windows[:end], window))
        shared, new = _shared(sizes[begin:end], tokens[begin:end], group, missing)
        if new:
            shared += begin
            entries = torch.cat([torch.arange(*plan.bounds(pack)) for pack in shared.tolist()])
            packs = _shared_out(
                plan.lengths[entries].tolist(), sizes[shared].tolist(), new, max_sequences
            )
            divided += [(entries[pack], window) for pack in packs]
            kept[shared], missing = False, missing - new
        end = begin
    # there are too few examples
    divided += [(_integers([]), int(plan.windows[-1]))] * missing

    windows = torch.cat([plan.windows[kept], _integers([window for _, window in divided])])
    sizes = torch.cat([_integers([0]), sizes[kept], _integers([len(pack) for pack, _ in divided])])
    places = torch.repeat_interleave(kept, plan.offsets.diff()).nonzero().squeeze(1)
    order = torch.cat([places, *[entries for entries, _ in divided]])
    return replace(plan.entries(order), offsets=sizes.cumsum(0), windows=windows)


def _integers(numbers: list[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


def _shared(sizes: Tensor, tokens: Tensor, group: int, missing: int) -> tuple[Tensor, int]:
    """Chooses packs of a window, of these sizes, that share their examples with new ones.

    Returns:
        The packs, and how many new ones there will be.
    """
    new = min(missing, int((sizes - 1).sum()))
    # the emptiest pack, and those with most sequences, which can be shared out most evenly
    choice = sizes.clone()
    choice[tokens.argmin()] = sizes.sum()
    order = choice.argsort(descending=True, stable=True)
    enough = int((sizes[order] - 1).cumsum(0).ge(new).nonzero()[0]) + 1 if new else 0
    return order[: max(group - missing, enough)], new


def _shared_out(
    lengths: list[int], sizes: list[int], missing: int, max_sequences: int
) -> list[Tensor]:
    """Shares the entries of packs, which have `sizes` of them, with `missing` new packs.

    A pack with many tokens gives to the one with fewest the entry that brings the two closest
    together, until none does. No pack gets fuller than the fullest was, and none stays empty while
    another has two entries.
    """
    numbers = iter(range(len(lengths)))
    packs = [
        sorted((lengths[entry], entry) for entry in itertools.islice(numbers, size))
        for size in sizes
    ]
    packs += [[] for _ in range(missing)]
    tokens = [sum(length for length, _ in pack) for pack in packs]
    # both heaps keep what a pack had before: such items are known by their tokens, and left out
    # when they come up
    fewest, most = ([(sign * count, pack) for pack, count in enumerate(tokens)] for sign in (1, -1))
    heapq.heapify(fewest)
    heapq.heapify(most)
    while fewest:
        count, taker = fewest[0]
        if count != tokens[taker] or len(packs[taker]) >= max_sequences:
            heapq.heappop(fewest)
            continue
        giver, place = _giver(most, packs, tokens, count)
        if giver is None:
            break
        length, entry = packs[giver].pop(place)
        insort(packs[taker], (length, entry))
        for pack, change in ((giver, -length), (taker, length)):
            tokens[pack] += change
            heapq.heappush(fewest, (tokens[pack], pack))
            heapq.heappush(most, (-tokens[pack], pack))
    return [_integers([entry for _, entry in pack]) for pack in packs]


def _giver(
    most: list[tuple[int, int]], packs: list[list[tuple[int, int]]], tokens: list[int], fewest: int
) -> tuple[int | None, int]:
    """Finds the fullest pack with an entry whose move to one of `fewest` tokens brings the two
    closer, and its place there; None without one."""
    unfit = []
    found: tuple[int | None, int] = None, 0
    while most:
        item = heapq.heappop(most)
        pack, gap = item[1], -item[0] - fewest
        if -item[0] != tokens[pack]:
            continue
        unfit.append(item)
        if gap <= 1:
            break
        place = bisect_left(packs[pack], (gap / 2, -1))
        near = [
            at
            for at in (place - 1, place)
            if 0 <= at < len(packs[pack]) and packs[pack][at][0] < gap
        ]
        if near:
            found = pack, min(near, key=lambda at: abs(2 * packs[pack][at][0] - gap))
            break
    for item in unfit:
        heapq.heappush(most, item)
    return found
