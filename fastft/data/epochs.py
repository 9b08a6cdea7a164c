"""What changes from one epoch to the next: the order of the packs, and which of equally long
examples is in which.

All of it follows from the plan, the seed and the number of the epoch. Every rank draws the same
without asking the others, a run that resumes draws what it drew before, and number, lengths and
costs of the packs never change.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastft.data.plan import PackPlan, generator_for, shuffled_order


def epoch_plan(plan: PackPlan, seed: int, epoch: int, group: int = 1) -> PackPlan:
    """The plan of an epoch: groups of `group` packs in a random order, each within its window, with
    mates redrawn."""
    generator = generator_for(seed, epoch)
    entries = _exchanged(plan, generator)
    drawn = PackPlan(
        plan.indices[entries],
        plan.offsets,
        plan.starts[entries],
        plan.lengths,
        plan.windows,
        plan.max_tokens,
    )
    return drawn.reordered(shuffled_order(plan.windows, generator, group))


def _exchanged(plan: PackPlan, generator: torch.Generator) -> Tensor:
    """For each entry the one that takes its place: a random permutation of those of its window and
    length."""
    kinds = plan.lengths + (plan.max_tokens + 1) * torch.repeat_interleave(
        plan.windows, plan.offsets.diff()
    )
    lots = torch.randperm(kinds.numel(), generator=generator)
    exchanged = torch.empty_like(lots)
    exchanged[kinds.argsort(stable=True)] = lots[kinds[lots].argsort(stable=True)]
    return exchanged
