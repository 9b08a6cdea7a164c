"""Packs in groups of nearly equal cost: ranks that work on one at the same time need not wait for each other.

With n_s the lengths of a pack's sequences, its tokens sum n_s are what its linear layers cost and sum n_s^2 is what its
attention costs. Best-fit packs have nearly equal tokens, but sum n_s^2 differs several times between them. Sorted by
both, `group` neighbours are alike in both, whichever rank takes which of them and whatever the model weighs them with.

The number of packs becomes a multiple of `group`: else accelerate would give some packs out twice to keep the ranks in
step. The packs that are least full and easiest to divide share their examples with as many new packs as are missing;
where these are too few for that, packs stay empty.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastft.data.plan import PackPlan

LEVELS = 200  # packs whose tokens differ by less than 1 / LEVELS of the capacity count as equal in tokens


def pack_costs(plan: PackPlan) -> tuple[Tensor, Tensor]:
    """The tokens of each pack, int64 (packs,), and the sum of its sequences' squared lengths, float64 (packs,)."""
    pack = torch.repeat_interleave(plan.offsets.diff())
    tokens = torch.zeros(len(plan), dtype=torch.int64).index_add_(0, pack, plan.lengths)
    squares = torch.zeros(len(plan), dtype=torch.float64).index_add_(0, pack, plan.lengths.double().square())
    return tokens, squares


def balanced(plan: PackPlan, group: int, max_sequences: int | None = None) -> PackPlan:
    """The plan with a multiple of `group` packs, in an order in which each `group` consecutive ones cost nearly equal.

    Within a group the cheapest is followed by the dearest, these by the next cheapest and the next dearest: batches of
    several packs are nearer to each other than packs are. Groups stay in the order of their windows. A pack that had to
    be left empty is one of the last.
    """
    plan = _multiple(plan, group, max_sequences or plan.indices.numel())
    tokens, squares = pack_costs(plan)
    level = tokens * LEVELS // plan.max_tokens
    # up and down in turn: a group across two levels has neighbours in the squares as well
    order = torch.where(level % 2 == 0, squares, -squares).argsort(stable=True)
    order = order[level[order].argsort(stable=True, descending=True)]
    order = order[plan.windows[order].argsort(stable=True)].view(-1, group)
    return plan.reordered(torch.stack([order, order.flip(1)], 2).flatten(1)[:, :group].flatten())


def _multiple(plan: PackPlan, group: int, max_sequences: int) -> PackPlan:
    missing = -len(plan) % group
    sizes, (tokens, _) = plan.offsets.diff(), pack_costs(plan)
    # out of the last windows the emptiest pack, and those with most sequences, which can be shared out most evenly
    last = plan.windows[max(0, len(plan) - (group - missing))]
    candidates = (plan.windows >= last).nonzero().squeeze(1)
    choice = sizes[candidates]
    choice[tokens[candidates].argmin()] = plan.indices.numel()
    shared = candidates[choice.argsort(descending=True, stable=True)[: group - missing]]
    entries = torch.cat([torch.arange(*plan.bounds(pack)) for pack in shared.tolist()])
    packs = _shared_out(plan.lengths[entries].tolist(), sizes[shared].tolist(), missing, max_sequences)

    kept = torch.ones(len(plan), dtype=torch.bool)
    kept[shared] = False
    order = torch.cat([torch.repeat_interleave(kept, sizes).nonzero().squeeze(1), *[entries[pack] for pack in packs]])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes[kept], torch.tensor([len(pack) for pack in packs])])
    windows = torch.cat([plan.windows[kept], plan.windows[-1:].expand(group)])
    columns = (plan.indices[order], offsets.cumsum(0), plan.starts[order], plan.lengths[order])
    return PackPlan(*columns, windows, plan.max_tokens)


def _shared_out(lengths: list[int], sizes: list[int], missing: int, max_sequences: int) -> list[Tensor]:
    """The entries of some packs, which have `sizes` of them, over `missing` packs more, with nearly equal tokens.

    A pack with many tokens gives to the one with fewest the entry that brings the two closest together, until none
    does. No pack gets fuller than the fullest was, and none stays empty while another has two entries.
    """
    numbers = iter(range(len(lengths)))
    packs = [[next(numbers) for _ in range(size)] for size in sizes] + [[] for _ in range(missing)]
    tokens = [sum(lengths[entry] for entry in pack) for pack in packs]
    while move := _best_move(lengths, packs, tokens, max_sequences):
        giver, taker, entry = move
        packs[giver].remove(entry)
        packs[taker].append(entry)
        tokens[giver] -= lengths[entry]
        tokens[taker] += lengths[entry]
    return [torch.tensor(pack, dtype=torch.int64) for pack in packs]


def _best_move(
    lengths: list[int], packs: list[list[int]], tokens: list[int], max_sequences: int
) -> tuple[int, int, int] | None:
    takers = [pack for pack in range(len(packs)) if len(packs[pack]) < max_sequences]
    taker = min(takers, key=tokens.__getitem__, default=None)
    if taker is None:
        return None
    for giver in sorted(range(len(packs)), key=tokens.__getitem__, reverse=True):
        gap = tokens[giver] - tokens[taker]
        closer = [entry for entry in packs[giver] if lengths[entry] < gap]
        if closer:
            return giver, taker, min(closer, key=lambda entry: abs(2 * lengths[entry] - gap))
    return None
