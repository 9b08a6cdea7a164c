"""The rows of a cross-entropy: the operator which every loss here is made of.

    z[t, v] = softcap * tanh(logit_scale * x[t, v] / softcap)          each step only if given
    lse[t]  = log sum_v exp(z[t, v]),              p[t, v] = exp(z[t, v] - lse[t])
    loss[t] = (1 - e) w[y] (lse[t] - z[t, y]) + (e / V) sum_v w[v] (lse[t] - z[t, v])
              + z_loss lse[t]^2
    dz[t, v] = ((1 - e) w[y] + (e / V) sum_u w[u] + 2 z_loss lse[t]) p[t, v]
               - (1 - e) w[y] (v == y) - (e / V) w[v]
    entropy[t] = -sum_v p[t, v] log p[t, v]
    d entropy[t] / dz[t, v] = -p[t, v] (log p[t, v] + entropy[t])

x are the logits (T, V), y the targets, e the label smoothing, w the class weights; smoothing and
weights as torch defines them, the z-loss as PaLM does (arXiv 2204.02311). A row whose target is
`ignore_index` has loss 0 and gradient 0. All maths is fp32 for 16-bit logits. Sums leave the target
out (`others`), and its gradient is -others / sum: a row whose target leads by 25 nats has a loss
and a gradient, where `1 - softmax` rounds both to zero. A row that holds NaN or +Inf is NaN, as
torch's. The C++ engine has the same bits on every instruction set, but for the sign and the payload
of a NaN.

Bytes moved: without a gradient the logits are read twice (maximum, sum), with one three times, and
their gradient is written; all but the first read of a row hit the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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


class RowStatistics:
    """What the reference knows about its rows: matrices (T, V), columns (T, 1).

    Args:
        logits: the rows.
        picked: the class of each target (T, 1).
        weight: of the classes, or none.
        options: the operator's.
        dtype: of the statistics.
    """

    def __init__(
        self,
        logits: Tensor,
        picked: Tensor,
        weight: Sequence[Tensor],
        options: RowOptions,
        dtype: torch.dtype,
    ) -> None:
        self.picked, self.options = picked, options
        self.z = capped(logits.to(dtype), options)
        self.highest = highest = self.z.amax(1, keepdim=True)
        self.exps = (self.z - highest).exp()
        # from the maximum, 0 where the exponential is 0
        self.distance = (self.z - highest).masked_fill_(self.exps == 0, 0.0)
        target_exp = self.exps.gather(1, picked)
        self.others = self.exps.scatter(1, picked, 0.0).sum(1, keepdim=True)
        self.total = self.others + target_exp
        # log of the sum is log1p of the sum without the class that holds the maximum, whose
        # exponential is exactly 1; NaN where the maximum is infinite
        without = torch.where(target_exp == 1, self.others, self.others - 1 + target_exp)
        self.log_sum = without.log1p()
        self.lse = highest + self.log_sum
        self.weight: Tensor | float = weight[0].to(dtype) if weight else 1.0
        self.weight_sum: Tensor | float = (
            weight[0].sum(dtype=dtype) if weight else float(logits.shape[1])
        )
        # what the target's class has of the loss, and what every class has
        hit = 1 - options.label_smoothing
        self.hits = weight[0].to(dtype)[picked] * hit if weight else torch.full_like(self.lse, hit)
        self.spread = options.label_smoothing / logits.shape[1]

    def losses(self) -> Tensor:
        """The losses (T, 1)."""
        losses = self.hits * (self.highest - self.z.gather(1, self.picked) + self.log_sum)
        if self.options.z_loss:  # 0 times Inf is NaN
            losses += self.options.z_loss * self.lse.square()
        if self.spread:
            below = ((self.highest - self.z) * self.weight).sum(1, keepdim=True)
            losses += self.spread * (self.weight_sum * self.log_sum + below)
        return losses

    def entropy(self) -> Tensor:
        """The entropies (T, 1)."""
        return self.log_sum - (self.exps * self.distance).sum(1, keepdim=True) / self.total

    def is_top1(self) -> Tensor:
        """Whether the target is the first maximum (T, 1)."""
        best = self.z == self.highest
        before = torch.arange(best.shape[1], device=best.device) < self.picked
        return best.gather(1, self.picked) & ~(best & before).any(1, keepdim=True)

    def gradient(self, upstream: Sequence[Tensor]) -> Tensor:
        """dz (T, V) of the losses' sum, or by the gradients (T,) of losses, lse and entropy."""
        one, none = torch.ones_like(self.lse), torch.zeros_like(self.lse)
        given = [u[:, None].to(one.dtype) for u in upstream]
        of_loss, of_lse, of_entropy = (*given, *(one, none, none)[len(given) :])
        softmax, spreads = self.exps / self.total, self.spread * of_loss
        factor = spreads * self.weight_sum + 2 * self.options.z_loss * of_loss * self.lse + of_lse
        if len(given) > 1:
            factor = factor - of_entropy * (self.distance - self.log_sum + self.entropy())
        gradient = softmax * factor
        # what the others have of the sum: 1 - softmax would round to 0 in a confident row
        of_target = softmax.scatter(1, self.picked, -self.others / self.total)
        gradient += of_target * (self.hits * of_loss)
        if self.spread:
            gradient -= spreads * self.weight
        gradient *= self.options.logit_scale
        if self.options.softcap:
            gradient *= 1 - (self.z / self.options.softcap).square()
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
    picked = target.long()[:, None].masked_fill(ignored | wrong, 0)
    rows = RowStatistics(logits, picked, weight, options, losses.dtype)

    def masked(values: Tensor) -> Tensor:
        return values.masked_fill_(ignored, 0.0).masked_fill_(wrong, torch.nan)

    losses.copy_(masked(rows.losses())[:, 0])
    lse.copy_(rows.lse.masked_fill(ignored, 0.0)[:, 0])
    if len(statistics) == 1:
        if not grad:  # what autograd has kept would count as changed
            statistics[0].copy_(torch.cat([rows.highest, rows.others], 1))
    elif statistics:
        statistics[0].copy_(rows.entropy().masked_fill_(ignored, 0.0)[:, 0])
        statistics[1].copy_((rows.is_top1() & ~ignored & ~wrong)[:, 0])
    if grad:
        grad[0].copy_(masked(rows.gradient(upstream)))


# weight, upstream, statistics and grad may be empty lists. weight: one vector, of the classes.
# upstream: the gradients of losses (1 where it is empty), or of losses, lse and entropy.
# statistics: entropy and is_top1, whether the target is the first maximum; or, on a CPU, `sums`
# (T, 2) alone, in fp64: maximum and `others` of each row, which a call without grad writes, and one
# with grad takes, in the place of two passes, and then writes no losses. grad: like the logits, or
# the logits themselves. Vectors over rows are fp32 (fp64 for fp64 logits).
ROWS = ops.Operator(
    "cross_entropy_rows("
    "Tensor logits, Tensor target, Tensor[] weight, Tensor[] upstream, "
    "Tensor(a!) losses, Tensor(b!) lse, Tensor(c!)[] statistics, Tensor(d!)[] grad, "
    "int ignore_index, float label_smoothing, float z_loss, float softcap, float logit_scale) "
    "-> ()",
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


def probability_losses(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: RowOptions
) -> Tensor:
    """The losses (T,) of logits (T, V) and target probabilities (T, V), in plain torch."""
    z = capped(logits.to(statistics_dtype(logits.dtype)), options)
    weight = None if weight is None else weight.to(z.dtype)
    losses = F.cross_entropy(
        z, target.to(z.dtype), weight, reduction="none", label_smoothing=options.label_smoothing
    )
    return losses + options.z_loss * z.logsumexp(1).square() if options.z_loss else losses
