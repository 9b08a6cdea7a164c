"""Two numbers of each row of logits that no gradient needs: their mean, and how peaked they are.

    mean_logits[t] = sum_v z[t, v] / V
    log_sum_sq_probs[t] = log sum_v p[t, v]^2 = log1p(sum' e[v]^2) - 2 log1p(sum' e[v])

z and p are those of `cross_entropy_rows`, e[v] = exp(z[v] - max z), and sum' leaves the maximum
out, whose e is exactly 1: where one class leads by 25 nats the second number is still there.

They are asked for to log them (DPO, KTO), or to weigh sequences (WPO), so that they take a pass of
plain torch over the chunk's logits, and no kernel has them. Without a softcap the mean does not
need that pass: the sum of x W^T + b is x (sum of W)^T + (sum of b), which has gradients, too.

Bytes moved: 1 pass over the logits and some over copies of a few rows, which stay in a CPU's cache;
of `summed_over_classes` one over the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastft.loss.cross_entropy_rows import capped
from fastft.loss.head_gemms import slabs
from fastft.loss.options import RowOptions


def logit_moments(
    logits: Tensor, target: Tensor, options: RowOptions, dtype: torch.dtype
) -> list[Tensor]:
    """mean_logits and log_sum_sq_probs (T,) of logits (T, V); 0 where `target` is ignored."""
    parts = [_of_slab(capped(logits[rows].to(dtype), options)) for rows in slabs(logits)]
    ignored = target == options.ignore_index
    return [torch.cat(values).masked_fill_(ignored, 0.0) for values in zip(*parts, strict=True)]


def _of_slab(z: Tensor) -> tuple[Tensor, Tensor]:
    highest, best = z.max(1, keepdim=True)
    exps = (z - highest).exp_().scatter_(1, best, 0.0)
    others = exps.sum(1).log1p()
    return z.mean(1), exps.square_().sum(1).log1p() - 2 * others


def summed_over_classes(
    input: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The sum over the classes of a linear layer's logits: (...), in `dtype`, differentiable."""
    sizes = [classes.stop - classes.start for classes in slabs(weight)]
    # no copy of the weight in `dtype`, forward or backward
    of_weight = torch.stack([part.sum(0, dtype=dtype) for part in weight.split(sizes)]).sum(0)
    result = input.to(dtype) @ of_weight
    return result if bias is None else result + bias.sum(dtype=dtype)
