"""The rows of a cross-entropy: the operator which every loss here is made of.

    z[t, v] = softcap * tanh(logit_scale * x[t, v] / softcap)               each step only if given
    lse[t]  = log sum_v exp(z[t, v])                p[t, v] = exp(z[t, v] - lse[t])
    loss[t] = (1 - e) w[y] (lse[t] - z[t, y]) + (e / V) sum_v w[v] (lse[t] - z[t, v]) + z_loss lse[t]^2
    dz[t, v] = ((1 - e) w[y] + (e / V) sum_u w[u] + 2 z_loss lse[t]) p[t, v] - (1 - e) w[y] (v == y) - (e / V) w[v]
    entropy[t] = -sum_v p[t, v] log p[t, v],    d entropy / dz[t, v] = -p[t, v] (log p[t, v] + entropy[t])

x are the logits (T, V), y the targets, e the label smoothing, w the class weights; smoothing and
weights as torch defines them, the z-loss as PaLM does (arXiv 2204.02311). A row whose target is
`ignore_index` has loss 0 and gradient 0. All maths is fp32 for 16-bit logits. Sums leave the target
out (`others`), and its gradient is -others / sum: a row whose target leads by 25 nats has a loss
and a gradient, where `1 - softmax` rounds both to zero. A row that holds NaN or +Inf is NaN, as
torch's.

Bytes moved: without a gradient the logits are read twice (maximum, sum), with one three times, and
their gradient is written; all but the first read of a row hit the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastft import ops
from fastft.loss.options import RowOptions, statistics_dtype

_CPU_DTYPES = (torch.float32, torch.bfloat16)
_GPU_DTYPES = (*_CPU_DTYPES, torch.float16)


def capped(logits: Tensor, options: RowOptions) -> Tensor:
    """The logits after scale and softcap."""
    z = logits if options.logit_scale == 1.0 else logits * options.logit_scale
    return torch.tanh(z / options.softcap) * options.softcap if options.softcap else z


class _Rows(NamedTuple):
    """What the reference knows about its rows: matrices (T, V), columns (T, 1)."""

    z: Tensor
    distance: Tensor  # from the maximum, 0 where the exponential is 0
    exps: Tensor  # exp(z - maximum)
    others: Tensor  # their sum without the target's
    total: Tensor
    log_sum: Tensor
    lse: Tensor
    picked: Tensor  # the class of each target
    hits: Tensor  # (1 - label_smoothing) * weight of the target
    spread: float  # label_smoothing / V
    weight: Tensor | float
    weight_sum: Tensor | float


def _rows_of(
    logits: Tensor, index: Tensor, weight: Sequence[Tensor], options: RowOptions, dtype: torch.dtype
) -> _Rows:
    z = capped(logits.to(dtype), options)
    highest, target_logit = z.amax(1, keepdim=True), z.gather(1, index)
    exps = (z - highest).exp()
    target_exp = exps.gather(1, index)
    others = exps.scatter(1, index, 0.0).sum(1, keepdim=True)
    # log of the sum is log1p of the sum without the class that holds the maximum, whose exponential
    # is exactly 1
    log_sum = torch.where(target_logit == highest, others, others - 1 + target_exp).log1p()
    hit, spread = 1 - options.label_smoothing, options.label_smoothing / logits.shape[1]
    return _Rows(
        z,
        (z - highest).masked_fill_(exps == 0, 0.0),
        exps,
        others,
        others + target_exp,
        log_sum,
        highest + log_sum,
        index,
        weight[0].to(dtype)[index] * hit if weight else torch.full_like(log_sum, hit),
        spread,
        weight[0].to(dtype) if weight else 1.0,
        weight[0].sum(dtype=dtype) if weight else float(logits.shape[1]),
    )


def _losses_of(rows: _Rows, options: RowOptions) -> Tensor:
    highest = rows.z.amax(1, keepdim=True)
    losses = rows.hits * (highest - rows.z.gather(1, rows.picked) + rows.log_sum)
    if options.z_loss:  # 0 times Inf is NaN
        losses += options.z_loss * rows.lse.square()
    if rows.spread:
        below = ((highest - rows.z) * rows.weight).sum(1, keepdim=True)
        losses += rows.spread * (rows.weight_sum * rows.log_sum + below)
    return losses


def _gradient_of(
    rows: _Rows, entropy: Tensor, upstream: Sequence[Tensor], options: RowOptions
) -> Tensor:
    one, none = torch.ones_like(entropy), torch.zeros_like(entropy)
    of_loss, of_lse, of_entropy = (
        *(u[:, None].to(one.dtype) for u in upstream),
        *(one, none, none)[len(upstream) :],
    )
    softmax, spreads = rows.exps / rows.total, rows.spread * of_loss
    factor = spreads * rows.weight_sum + 2 * options.z_loss * of_loss * rows.lse + of_lse
    if len(upstream) > 1:
        factor = factor - of_entropy * (rows.distance - rows.log_sum + entropy)
    gradient = softmax * factor
    gradient += softmax.scatter(1, rows.picked, -rows.others / rows.total) * (rows.hits * of_loss)
    if rows.spread:
        gradient -= spreads * rows.weight
    gradient *= options.logit_scale
    if options.softcap:
        gradient *= 1 - (rows.z / options.softcap).square()
    return gradient


def _cross_entropy_rows(
    logits: Tensor,
    target: Tensor,
    weight: Sequence[Tensor],
    upstream: Sequence[Tensor],
    losses: Tensor,
    lse: Tensor,
    statistics: Sequence[Tensor],
    grad: Sequence[Tensor],
    *given: Any,
) -> None:
    options = RowOptions(*given)
    ignored = (target == options.ignore_index)[:, None]
    wrong = ((target < 0) | (target >= logits.shape[1]))[:, None] & ~ignored
    index = target.long()[:, None].masked_fill(ignored | wrong, 0)
    rows = _rows_of(logits, index, weight, options, losses.dtype)
    losses.copy_(
        _losses_of(rows, options).masked_fill_(ignored, 0.0).masked_fill_(wrong, torch.nan)[:, 0]
    )
    lse.copy_(rows.lse.masked_fill(ignored, 0.0)[:, 0])
    entropy = torch.zeros_like(rows.lse)
    if statistics or len(upstream) > 1:
        entropy = rows.log_sum - (rows.exps * rows.distance).sum(1, keepdim=True) / rows.total
    if statistics:
        statistics[0].copy_(entropy.masked_fill(ignored, 0.0)[:, 0])
        best = rows.z == rows.z.amax(1, keepdim=True)
        before = torch.arange(best.shape[1], device=best.device) < index
        first = best.gather(1, index) & ~(best & before).any(1, keepdim=True)
        statistics[1].copy_((first & ~ignored & ~wrong)[:, 0])
    if grad:
        gradient = _gradient_of(rows, entropy, upstream, options)
        grad[0].copy_(gradient.masked_fill_(ignored, 0.0).masked_fill_(wrong, torch.nan))


# weight, upstream, statistics and grad may be empty lists. weight: one vector, of the classes.
# upstream: the gradients of losses (1 where it is empty), or of losses, lse and entropy.
# statistics: entropy and is_top1, whether the target is the first maximum. grad: like the logits,
# or the logits themselves. Vectors over rows are fp32 (fp64 for fp64 logits).
ROWS = ops.Operator(
    "cross_entropy_rows(Tensor logits, Tensor target, Tensor[] weight, Tensor[] upstream, "
    "Tensor(a!) losses, "
    "Tensor(b!) lse, Tensor(c!)[] statistics, Tensor(d!)[] grad, int ignore_index, float "
    "label_smoothing, "
    "float z_loss, float softcap, float logit_scale) -> ()",
    _cross_entropy_rows,
    # cuda before triton: it has fewer instructions a logit (benchmarks/NOTES.md), until a GPU
    # decides
    engines={
        "cpp": ops.takes(*_CPU_DTYPES),
        "cuda": ops.takes(*_GPU_DTYPES),
        "triton": ops.takes(*_GPU_DTYPES),
    },
    samples={"float16 logits": (torch.float16,), "float64 logits": (torch.float64,)},
)


def rows_implementation(
    impl: str, logits_dtype: torch.dtype, device: torch.device
) -> Callable[..., Any]:
    """The function that computes `cross_entropy_rows` for logits of this dtype; raises as
    `Operator.resolve` does."""
    return ROWS.implementation(impl, device, logits_dtype)


def probability_losses(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: RowOptions
) -> Tensor:
    """The losses (T,) of logits (T, V) and target probabilities (T, V), in plain torch."""
    z = capped(logits.to(statistics_dtype(logits.dtype)), options)
    weight = None if weight is None else weight.to(z.dtype)
    smoothing = options.label_smoothing
    losses = F.cross_entropy(
        z, target.to(z.dtype), weight, reduction="none", label_smoothing=smoothing
    )
    return losses + options.z_loss * z.logsumexp(1).square() if options.z_loss else losses
