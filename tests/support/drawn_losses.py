"""What the rooms of `make fuzz` for losses draw alike, and what it means in plain torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from hypothesis import strategies as st
from torch import Tensor

from support import oracle
from support.numerics import assert_no_worse

IGNORED = -100
Computed = Callable[..., list[Tensor]]
SHAPES = {
    "rows": st.sampled_from([0, 1, 2, 7, 63, 64, 65]),
    "hidden": st.sampled_from([1, 2, 7, 33]),
    "classes": st.sampled_from([1, 2, 3, 15, 16, 17, 63, 127, 130]),
    "spread": st.sampled_from([0.0, 0.1, 1.0, 30.0]),
    "ignored": st.sampled_from([0.0, 0.3, 0.9, 1.0]),
}
OF_LOGITS = {
    "softcap": st.none() | st.sampled_from([0.5, 5.0, 50.0]),
    "logit_scale": st.sampled_from([1.0, 0.1, 3.0]),
    "ignore_index": st.sampled_from([IGNORED, IGNORED, -1, 0]),
}
# what a matrix has in one place: mostly a number
UNUSUAL = st.sampled_from([None, None, None, None, math.nan, math.inf, -math.inf])
DTYPES = st.sampled_from(["float32", "bfloat16", "float16", "float64"])
OPTIONS = OF_LOGITS | {
    "label_smoothing": st.sampled_from([0.0, 0.1, 1.0]),
    "z_loss": st.sampled_from([0.0, 1e-4, 0.1]),
    "weight": st.booleans(),
    "reduction": st.sampled_from(["mean", "sum", "none"]),
    "num_items": st.none() | st.sampled_from([1.0, 7.0, 1000.0]),
}
SEED = st.integers(0, 2**32 - 1)


class Loss(Protocol):
    """A case that has what `OPTIONS` draws."""

    @property
    def ignore_index(self) -> int: ...
    @property
    def reduction(self) -> str: ...
    @property
    def num_items(self) -> float | None: ...
    @property
    def logit_scale(self) -> float: ...
    @property
    def z_loss(self) -> float: ...


def options_of(case: Loss) -> dict[str, Any]:
    """The options of a row, which the oracle knows by the same names."""
    names = ("softcap", "logit_scale", "label_smoothing", "z_loss", "ignore_index")
    return {name: getattr(case, name) for name in names}


def asked(case: Loss) -> dict[str, Any]:
    """How the rows are reduced."""
    is_mean = case.reduction == "mean"
    return {"reduction": case.reduction, "num_items": case.num_items if is_mean else None}


def plain(case: Loss, target: Tensor, weight: Tensor | None) -> Computed:
    """The loss of logits (T, V) in plain torch, kept in fp32 at least."""
    # torch's own mean is by the weights of the rows
    weighted = case.reduction == "mean" and weight is not None and not case.num_items
    reduction = "mean" if weighted and bool((target != case.ignore_index).any()) else "none"

    def compute(logits: Tensor) -> list[Tensor]:
        # a row that is ignored has no gradient, whatever it holds; torch's may be NaN
        logits = logits.masked_fill((target == case.ignore_index)[:, None], 0.0)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        given = options_of(case) | {"weight": weight, "reduction": reduction}
        losses = oracle.cross_entropy(logits, target, **given)
        return [losses if reduction == "mean" else _reduced(losses, case, target)]

    return compute


def _reduced(losses: Tensor, case: Loss, target: Tensor) -> Tensor:
    """As `num_items`, and the mean over no row at all, are documented."""
    if case.reduction == "none":
        return losses
    total = losses.sum()
    if case.reduction == "sum":
        return total
    return total / _divisor(case, target)


def _divisor(case: Loss, target: Tensor) -> float:
    return case.num_items or max(1, int((target != case.ignore_index).sum()))


def targets(
    rows: int, classes: int, ignored: float, generator: torch.Generator, ignore_index: int
) -> Tensor:
    """Class indices, this part of which is `ignore_index`, which may be a class."""
    target = torch.randint(0, classes, (rows,), generator=generator)
    return target.masked_fill_(torch.rand(rows, generator=generator) < ignored, ignore_index)


def within_dtype(dtype: str, impl: str, spread: float) -> tuple[str, float]:
    """The engine and the spread that there are: C++ has no kernel for these, and says so; what is
    larger than numbers of fp16 are is Inf in plain torch, too."""
    if dtype not in ("float16", "float64"):
        return impl, spread
    return impl.replace("cpp", "auto"), min(spread, 1.0) if dtype == "float16" else spread


def put_unusual(matrix: Tensor, value: float | None, generator: torch.Generator) -> None:
    """Into a place of the matrix that is drawn."""
    at = [torch.randint(0, max(1, size), (), generator=generator) for size in matrix.shape]
    if value is not None and matrix.numel():
        matrix[tuple(at)] = value


def drawn(shape: Sequence[int], generator: torch.Generator, columns_first: bool = False) -> Tensor:
    """Normal numbers; of a matrix the columns may lie together."""
    if not columns_first or len(shape) != 2:
        return torch.randn(*shape, generator=generator)
    return torch.randn(*reversed(shape), generator=generator).t()


def size_of_sums(leaves: Sequence[Tensor], scale: float, squared: bool) -> float:
    """The size of what is summed into a row's results: at least 1, or the largest logit.

    In one class, or a certain one, all of it cancels, and its roundings are left. `leaves`: logits,
    or hidden states and a head. `squared`: gradients multiply by one more logit.
    """
    x, *head = (float(leaf.abs().max()) if leaf.numel() else 0.0 for leaf in leaves[:2])
    logit = max(1.0, scale) * max(1.0, x * head[0] * leaves[0].shape[-1] if head else x)
    return 4.0 * logit * (logit if squared else 1.0)  # upstream gradients are seldom above 4


def size_of_loss(case: Loss, leaves: Sequence[Tensor], target: Tensor) -> float:
    """The size of what is summed into a loss and its gradients."""
    size = size_of_sums(leaves, case.logit_scale, case.z_loss > 0)
    return size / _divisor(case, target) if case.reduction == "mean" else size


def with_gradients(
    compute: Computed,
    leaves: Sequence[Tensor],
    generator: torch.Generator,
    accumulated: bool = False,
) -> list[Tensor]:
    """Results, and the gradients of all leaves for drawn gradients of the results; of two backward
    passes where they are `accumulated` in `grad`."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    results = compute(*leaves)
    upstream = [
        torch.randn(result.shape, generator=generator).to(result.dtype) for result in results
    ]
    if not accumulated:
        return [*results, *torch.autograd.grad(results, leaves, upstream)]
    for again in (True, False):
        torch.autograd.backward(results, upstream, retain_graph=again)
    return [*results, *(leaf.grad for leaf in leaves)]  # type: ignore[list-item]


def check_against_float64(
    ours: Computed,
    plain: Computed,
    leaves: Sequence[Tensor],
    generator: torch.Generator,
    autocast: bool = False,
    accumulated: bool = False,
    **of_sums: Any,
) -> None:
    """Values and gradients, whose products are those of bf16 under `autocast`, `accumulated` as in
    `with_gradients`.

    `of_sums`: `terms` and `size` of `assert_no_worse`.
    """
    state = generator.get_state()
    every = []
    exact = [leaf.double() for leaf in leaves]
    for compute, given in ((ours, leaves), (plain, leaves), (plain, exact)):
        generator.set_state(state)
        rounded = autocast and given is leaves
        with torch.autocast("cpu", torch.bfloat16, enabled=rounded):
            every.append(with_gradients(compute, given, generator, accumulated))
    for at, (found, *others) in enumerate(zip(*every, strict=True)):
        known = found.bfloat16() if autocast else found  # the dtype says what roundings may do
        assert_no_worse(known, *others, f"result {at}", **of_sums)
    for leaf, gradient in zip(leaves, every[0][-len(leaves) :], strict=True):
        assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape
