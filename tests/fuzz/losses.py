"""The losses: of logits and of a head, log-probabilities too, every option, against float64.

Values and all gradients are at most twice as far from it as plain torch in the same dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from support import oracle
from support.numerics import assert_no_worse
from torch import Tensor

import fastft

EXAMPLES = 80
IGNORED = -100


class Case(NamedTuple):
    of: str
    dtype: str
    impl: str
    rows: int
    hidden: int
    classes: int
    spread: float
    ignored: float
    softcap: float | None
    logit_scale: float
    label_smoothing: float
    z_loss: float
    weight: bool
    bias: bool
    reduction: str
    num_items: float | None
    chunk_rows: int | None
    counted: bool
    columns_first: bool
    seed: int


CASES = st.builds(
    Case,
    of=st.sampled_from(["logits", "head", "log_probs"]),
    dtype=st.sampled_from(["float32", "bfloat16", "float64"]),
    impl=st.sampled_from(["auto", "eager", "cpp"]),
    rows=st.sampled_from([0, 1, 2, 7, 63, 64, 65]),
    hidden=st.sampled_from([1, 2, 7, 33]),
    classes=st.sampled_from([1, 2, 3, 15, 16, 17, 63, 127, 130]),
    spread=st.sampled_from([0.0, 0.1, 1.0, 30.0]),
    ignored=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    softcap=st.none() | st.sampled_from([0.5, 5.0, 50.0]),
    logit_scale=st.sampled_from([1.0, 0.1, 3.0]),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    z_loss=st.sampled_from([0.0, 1e-4, 0.1]),
    weight=st.booleans(),
    bias=st.booleans(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    num_items=st.none() | st.sampled_from([1.0, 7.0, 1000.0]),
    chunk_rows=st.none() | st.sampled_from([1, 7, 64]),
    counted=st.booleans(),
    columns_first=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)


def check(case: Case) -> None:
    if case.impl == "cpp" and case.dtype == "float64":
        case = case._replace(impl="auto")  # it has no kernel for float64, and says so
    generator = torch.Generator().manual_seed(case.seed)
    dtype = getattr(torch, case.dtype)
    leaves = _leaves(case, generator, dtype)
    target = torch.randint(0, case.classes, (case.rows,), generator=generator)
    target[torch.rand(case.rows, generator=generator) < case.ignored] = IGNORED
    weight = torch.rand(case.classes, generator=generator) + 0.1 if case.weight else None
    compute = {"logits": _of_logits, "head": _of_head, "log_probs": _log_probs}[case.of]
    ours, plain = compute(case, target, weight)
    exact = [leaf.double() for leaf in leaves]
    found = _with_gradients(ours, leaves, generator.manual_seed(case.seed))
    rival = _with_gradients(plain, leaves, generator.manual_seed(case.seed))
    truth = _with_gradients(plain, exact, generator.manual_seed(case.seed))
    terms = case.rows + case.hidden + case.classes
    summed = _of_row(case, target, exact)
    for at, results in enumerate(zip(found, rival, truth, strict=True)):
        assert_no_worse(*(_beside(summed, each) for each in results), f"result {at}", terms=terms)
    for leaf, gradient in zip(leaves, found[-len(leaves) :], strict=True):
        assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape


def _of_row(case: Case, target: Tensor, leaves: list[Tensor]) -> float:
    """The size of what is summed into a row's results, a power of two: at least 1, or the largest
    logit. In one class, or a certain one, all of it cancels, and its roundings are left."""
    x, *head = (float(leaf.abs().max()) if leaf.numel() else 0.0 for leaf in leaves)
    logit = max(1.0, case.logit_scale) * max(1.0, x * head[0] * case.hidden if head else x)
    size = 4.0 * logit  # upstream gradients, which are normal, are seldom above 4
    if case.of == "log_probs" or case.z_loss:
        size *= logit  # gradients of entropies and of z-losses multiply by one
    if case.of != "log_probs" and case.reduction == "mean":
        size /= case.num_items or max(1, int((target != IGNORED).sum()))
    return 2.0 ** math.ceil(math.log2(size))


def _beside(size: float, result: Tensor) -> Tensor:
    return torch.cat([result.flatten(), result.new_tensor([size])])


def _leaves(case: Case, generator: torch.Generator, dtype: torch.dtype) -> list[Tensor]:
    def drawn(*shape: int) -> Tensor:
        tensor = torch.randn(shape[::-1] if case.columns_first else shape, generator=generator)
        tensor = tensor.to(dtype)
        return tensor.t() if case.columns_first and len(shape) == 2 else tensor

    if case.of == "logits":
        return [case.spread * drawn(case.rows, case.classes)]
    head = [drawn(case.rows, case.hidden), case.spread * drawn(case.classes, case.hidden)]
    return head + ([drawn(case.classes)] if case.bias else [])


Computed = Callable[..., list[Tensor]]


def _reduced(losses: Tensor, case: Case, target: Tensor) -> Tensor:
    """As `num_items`, and the mean over no row at all, are documented."""
    if case.reduction == "none":
        return losses
    total = losses.sum()
    if case.reduction == "sum":
        return total
    return total / (case.num_items or max(1, int((target != IGNORED).sum())))


def _of_logits(case: Case, target: Tensor, weight: Tensor | None) -> tuple[Computed, Computed]:
    options = _options(case)
    plain = _plain(case, target, weight, options)

    def ours(logits: Tensor) -> list[Tensor]:
        asked = _asked(case) | options
        return [fastft.cross_entropy(logits, target, weight=weight, impl=case.impl, **asked)]

    return ours, plain


def _of_head(case: Case, target: Tensor, weight: Tensor | None) -> tuple[Computed, Computed]:
    options = _options(case)
    plain = _plain(case, target, weight, options)

    def ours(x: Tensor, head: Tensor, bias: Tensor | None = None) -> list[Tensor]:
        asked = _asked(case) | options
        counted = int((target != IGNORED).sum()) if case.counted else None
        asked |= {"chunk_rows": case.chunk_rows, "max_counted": counted, "linear_bias": bias}
        loss = fastft.linear_cross_entropy(x, head, target, weight=weight, impl=case.impl, **asked)
        return [loss]

    return ours, lambda x, head, bias=None: plain(F.linear(x, head, bias))


def _log_probs(case: Case, target: Tensor, _: Tensor | None) -> tuple[Computed, Computed]:
    options = {"softcap": case.softcap, "logit_scale": case.logit_scale}

    def ours(x: Tensor, head: Tensor, bias: Tensor | None = None) -> list[Tensor]:
        counted = int((target != IGNORED).sum()) if case.counted else None
        asked = {"chunk_rows": case.chunk_rows, "max_counted": counted, "linear_bias": bias}
        found = fastft.linear_log_probs(x, head, target, impl=case.impl, **options, **asked)
        return [found.log_probs, found.entropy, found.lse]

    def plain(x: Tensor, head: Tensor, bias: Tensor | None = None) -> list[Tensor]:
        logits = F.linear(x, head, bias)
        kept = torch.promote_types(logits.dtype, torch.float32)
        return list(oracle.log_probs(logits.to(kept), target, **options))[:3]

    return ours, plain


def _options(case: Case) -> dict[str, Any]:
    names = ("softcap", "logit_scale", "label_smoothing", "z_loss")
    return {name: getattr(case, name) for name in names}


def _asked(case: Case) -> dict[str, Any]:
    is_mean = case.reduction == "mean"
    return {"reduction": case.reduction, "num_items": case.num_items if is_mean else None}


def _plain(case: Case, target: Tensor, weight: Tensor | None, options: dict[str, Any]) -> Computed:
    # torch's own mean is by the weights of the rows
    weighted = case.reduction == "mean" and weight is not None and not case.num_items
    reduction = "mean" if weighted and bool((target != IGNORED).any()) else "none"

    def plain(logits: Tensor) -> list[Tensor]:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        asked = options | {"weight": weight, "reduction": reduction}
        losses = oracle.cross_entropy(logits, target, **asked)
        return [losses if reduction == "mean" else _reduced(losses, case, target)]

    return plain


def _with_gradients(
    compute: Computed, leaves: list[Tensor], generator: torch.Generator
) -> list[Tensor]:
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    results = compute(*leaves)
    upstream = [
        torch.randn(result.shape, generator=generator).to(result.dtype) for result in results
    ]
    gradients = torch.autograd.grad(results, leaves, upstream)
    return [*results, *gradients]
