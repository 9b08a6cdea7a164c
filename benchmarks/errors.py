"""How exact a loss is and how much memory it takes, beside its time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of hidden states, head and targets


def relative_errors(
    losses: dict[str, Loss], truth: Loss, x: Tensor, weight: Tensor, target: Tensor
) -> dict:
    """Of each loss, and of its gradients as norms, against `truth` in float64."""

    def results(loss: Loss, dtype: torch.dtype) -> list[Tensor]:
        leaves = [
            tensor.detach().to(dtype).requires_grad_(tensor.requires_grad) for tensor in (x, weight)
        ]
        value = loss(*leaves, target)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        return [
            value.detach().double(),
            *(grad.double() for grad in torch.autograd.grad(value.sum(), wanted)),
        ]

    exact = results(truth, torch.float64)
    errors = {}
    for name, loss in losses.items():
        found = (
            float((mine - best).norm() / best.norm())
            for mine, best in zip(results(loss, x.dtype), exact, strict=True)
        )
        errors[name] = {
            what: float(f"{e:.2g}")
            for what, e in zip(("loss", "d_input", "d_weight"), found, strict=False)
        }
    return errors


def peaks_mib(runs: dict[str, Callable[[], object]], *leaves: Tensor) -> dict[str, float]:
    """What each run allocates at its peak above what was held before; the gradients of `leaves` are
    made by each."""
    peaks = {}
    for name, run in runs.items():
        for leaf in leaves:  # what a run frees of the one before must not count for it
            leaf.grad = None
        peaks[name] = round(_peak_bytes(run) / 2**20, 1)
    return peaks


def _peak_bytes(run: Callable[[], object]) -> int:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    changes: Sequence[int] = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(itertools.accumulate(changes), default=0)
