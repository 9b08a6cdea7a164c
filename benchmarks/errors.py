"""How exact a function and its gradients are, and how much memory they take, beside their time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from support.numerics import assert_no_worse
from torch import Tensor

# of tensors, of which those that require a gradient get one
Function = Callable[..., Tensor]


def check(
    functions: dict[str, Function],
    truth: Function,
    leaves: Sequence[Tensor],
    names: Sequence[str],
    *,
    plain: str,
    terms: int,
    upstream: Tensor | None = None,
) -> dict[str, dict[str, float]]:
    """Errors of each function's value and gradients against `truth` in float64, as norms; raises if
    ours are larger than the tests' one tolerance allows.

    Args:
        functions, truth: of `leaves`.
        names: of the value and of the gradients.
        plain: which function is plain torch, whose own error the tolerance goes by.
        terms: of the sums that lie one behind another.
        upstream: the gradient of a value that is no scalar.
    """

    def results(function: Function, dtype: torch.dtype) -> list[Tensor]:
        mine = [leaf.detach().to(dtype).requires_grad_(leaf.requires_grad) for leaf in leaves]
        value = function(*mine)
        given = None if upstream is None else upstream.to(value.dtype)
        wanted = [leaf for leaf in mine if leaf.requires_grad]
        return [value.detach(), *torch.autograd.grad(value, wanted, given)]

    exact = results(truth, torch.float64)
    found = {name: results(each, leaves[0].dtype) for name, each in functions.items()}
    for what, ours, theirs, best in zip(names, found["ours"], found[plain], exact, strict=False):
        assert_no_worse(ours, theirs, best, what, terms=terms)
    return {
        name: {
            what: float(f"{(mine.double() - best).norm() / best.norm():.2g}")
            for what, mine, best in zip(names, tensors, exact, strict=False)
        }
        for name, tensors in found.items()
    }


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
