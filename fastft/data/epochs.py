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
    """Draws the plan of an epoch: other mates, and groups of `group` packs in a random order.

    Each group stays within its window.
    """
    generator = generator_for(seed, epoch)
    drawn = plan.entries(_exchanged(plan, generator))
    return drawn.reordered(shuffled_order(plan.windows, generator, group))


def _exchanged(plan: PackPlan, generator: torch.Generator) -> Tensor:
    """Draws the entry that takes each one's place, of the same window and length."""
    kinds = plan.lengths + (plan.max_tokens + 1) * torch.repeat_interleave(
        plan.windows, plan.offsets.diff()
    )
    lots = torch.randperm(kinds.numel(), generator=generator)
    exchanged = torch.empty_like(lots)
    exchanged[kinds.argsort(stable=True)] = lots[kinds[lots].argsort(stable=True)]
    return exchanged
