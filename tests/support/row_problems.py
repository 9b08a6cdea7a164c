"""Problems for `cross_entropy_rows` and what plain torch makes of them: the table that every engine
must pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from support.numerics import assert_no_worse

IGNORED = -100


@dataclass(frozen=True)
class Case:
    """The options of one call. `upstream` counts how many of g_loss, g_lse, g_entropy are given."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0
    logit_scale: float = 1.0
    weighted: bool = False
    statistics: bool = False
    upstream: int = 1
    grad: str = "new"  # "", "new" or "in place"
    target_dtype: torch.dtype = torch.int64
    margin: float = 0.0  # by how much the target leads

    def floats(self) -> tuple[float, float, float, float]:
        return self.label_smoothing, self.z_loss, self.softcap, self.logit_scale


EVERYTHING = Case(
    0.1, 1e-2, 20.0, -0.5, weighted=True, statistics=True, upstream=3, target_dtype=torch.int32
)
CASES = {
    "forward": Case(grad=""),
    "plain": Case(upstream=0),
    "in place": Case(grad="in place"),
    "confident": Case(margin=25.0, target_dtype=torch.int32),
    "confident with statistics": Case(margin=25.0, statistics=True, upstream=3, grad="in place"),
    "smoothing": Case(label_smoothing=0.1),
    "weight": Case(weighted=True),
    "smoothing and weight": Case(label_smoothing=0.2, weighted=True, grad="in place"),
    "z-loss": Case(z_loss=1e-2, upstream=0),
    "softcap": Case(softcap=5.0),
    "scale": Case(logit_scale=-1.5),
    "statistics": Case(statistics=True, upstream=3),
    "gradients of statistics that nobody asks for": Case(upstream=3),
    "everything": EVERYTHING,
    "everything in place": replace(EVERYTHING, grad="in place"),
    "every loss, no gradient": replace(EVERYTHING, grad="", upstream=0),
}


@dataclass
class Problem:
    case: Case
    logits: Tensor
    target: Tensor
    weight: list[Tensor]
    upstream: list[Tensor]
    extra: dict[str, Any] = field(default_factory=dict)


def draw(
    case: Case, rows: int, classes: int, dtype: torch.dtype, device: str = "cpu", padding: int = 0
) -> Problem:
    """Random logits in rows that are `padding` elements apart; every third row but the first is
    ignored."""
    logits = (torch.randn(rows, classes + padding) * 4).to(dtype)[:, padding:]
    target = torch.randint(0, classes, (rows,))
    if case.margin and classes > 1:
        leading = logits.scatter(1, target[:, None], -torch.inf).amax(1) + case.margin
        logits.scatter_(1, target[:, None], leading[:, None].to(dtype))
    target[2::3] = IGNORED
    weight = [torch.rand(classes) + 0.5] if case.weighted else []
    upstream = [torch.randn(rows) for _ in range(case.upstream)]
    # .to keeps the padding only where it copies nothing
    moved = torch.empty_strided(logits.shape, logits.stride(), dtype=dtype, device=device).copy_(
        logits
    )
    return Problem(
        case,
        moved if padding else logits.to(device),
        target.to(device, case.target_dtype),
        [w.to(device) for w in weight],
        [g.to(device) for g in upstream],
    )


def plain(problem: Problem, dtype: torch.dtype) -> dict[str, Tensor]:
    """The contract in plain torch, computed in `dtype` from the logits as they are; gradients by
    autograd."""
    case, classes = problem.case, problem.logits.shape[1]
    leaf = problem.logits.detach().clone().contiguous().requires_grad_()
    z = leaf.to(dtype) * case.logit_scale
    if case.softcap:
        z = case.softcap * torch.tanh(z / case.softcap)
    ignored = problem.target == IGNORED
    y = problem.target.long().masked_fill(ignored, 0)[:, None]
    w = (
        problem.weight[0].to(dtype)
        if problem.weight
        else torch.ones(classes, dtype=dtype, device=z.device)
    )
    log_p = z.log_softmax(1)
    lse = z.logsumexp(1)
    smooth = case.label_smoothing / classes * -(log_p * w).sum(1)
    losses = (
        (1 - case.label_smoothing) * w[y[:, 0]] * -log_p.gather(1, y)[:, 0]
        + smooth
        + case.z_loss * lse**2
    )
    entropy = -(log_p.exp() * log_p).sum(1)
    outputs = {"losses": losses, "lse": lse}
    if case.statistics:
        outputs |= {"entropy": entropy, "is_top1": (z.argmax(1) == y[:, 0]) & ~ignored}
    outputs = {name: value.masked_fill(ignored, 0) for name, value in outputs.items()}
    if case.grad:
        scales = [g.to(dtype) for g in problem.upstream] or [torch.ones_like(losses)]
        terms = [
            scale * value for scale, value in zip(scales, (losses, lse, entropy), strict=False)
        ]
        total = sum(term.masked_fill(ignored, 0).sum() for term in terms)
        # in dtype: a leaf's gradient would be rounded to the logits'
        leaf_grad = torch.autograd.grad(total, z)[0]
        slope = case.logit_scale * (1 - (z / case.softcap) ** 2 if case.softcap else 1)
        outputs["grad"] = leaf_grad * slope
    return {name: value.detach() for name, value in outputs.items()}


def run(rows: Callable[..., None], problem: Problem) -> dict[str, Tensor]:
    """Calls an engine's function with outputs full of NaN; the logits stay as they are unless the
    case says so."""
    case, logits = problem.case, problem.logits
    n, device = len(logits), logits.device
    losses, lse, entropy = torch.full((3, n), torch.nan, device=device)
    is_top1 = torch.ones(n, dtype=torch.bool, device=device)
    grad = []
    if case.grad == "in place":
        logits = torch.empty_strided(
            logits.shape, logits.stride(), dtype=logits.dtype, device=device
        ).copy_(logits)
        grad = [logits]
    elif case.grad:
        grad = [torch.full_like(logits, torch.nan, memory_format=torch.contiguous_format)]
    statistics = [entropy, is_top1] if case.statistics else []
    smoothing, z_loss, softcap, scale = case.floats()
    options = (IGNORED, smoothing, z_loss, softcap, scale)
    rows(
        logits,
        problem.target,
        problem.weight,
        problem.upstream,
        losses,
        lse,
        statistics,
        grad,
        *options,
    )
    outputs = {"losses": losses, "lse": lse}
    if case.statistics:
        outputs |= {"entropy": entropy, "is_top1": is_top1}
    return outputs | ({"grad": grad[0]} if grad else {})


def check(rows: Callable[..., None], problem: Problem) -> dict[str, Tensor]:
    """Runs and compares every output with float64; returns them."""
    ours, truth = run(rows, problem), plain(problem, torch.float64)
    theirs = plain(problem, torch.float32)
    assert ours.keys() == truth.keys()
    for name, actual in ours.items():
        if name == "is_top1":
            assert torch.equal(actual, truth[name]), name
        else:
            assert_no_worse(
                actual,
                theirs[name].to(actual.dtype),
                truth[name],
                name,
                terms=sum(problem.logits.shape),
            )
    return ours
