"""Log-probabilities of a model's logits, lazy or not: as `linear_log_probs` has them.

What the row kernel knows of (one layer, a scale, a softcap) goes to it. The logits of several
layers (LoRA), another function of them, and logits that exist take plain torch:

    log_probs = log_softmax(z)[y],  entropy = -sum_v p log p,  ...          in fp32, for each row
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastft.loss.head_sweep import CountedRows
from fastft.loss.lazy.logits import LazyLogits
from fastft.loss.lazy.losses import known_rows
from fastft.loss.lazy.sources import Linear
from fastft.loss.linear_log_probs import LinearLogProbs, linear_log_probs

IGNORED = -100  # TRL's label, and torch's


def token_log_probs(
    logits: Tensor,
    target: Tensor,
    *,
    max_counted: int | None = None,
    mean_logits: bool = False,
    log_sum_sq_probs: bool = False,
) -> LinearLogProbs:
    """`linear_log_probs` of logits (..., V) and `target` (...), for which -100 is ignored.

    Args:
        logits: `LazyLogits`, or a tensor of numbers.
        target: int64, on their device.
        max_counted, mean_logits, log_sum_sq_probs: as in `linear_log_probs`.
    """
    extras = {"mean_logits": mean_logits, "log_sum_sq_probs": log_sum_sq_probs}
    lazy = logits if isinstance(logits, LazyLogits) and logits.is_lazy else None
    known = None if lazy is None else known_rows(lazy)
    if lazy is not None and known is not None and lazy.recorded.head.origin.shard is None:
        options = {"max_counted": max_counted, **extras, **known}
        head = lazy.checked().head
        tokens = head.inside_head(lambda layer: _by_kernel(layer, target, **options))
        names = [*LinearLogProbs._fields[:4], *(name for name in extras if extras[name])]
        return LinearLogProbs(**dict(zip(names, tokens, strict=True)))
    flat = target.reshape(-1)
    if lazy is not None:
        rows = CountedRows.of(flat, IGNORED, -1 if max_counted is None else max_counted)
        columns = lazy.over_rows(_of_rows, flat, rows=rows)
    else:
        columns = _of_rows(logits.reshape(len(flat), logits.shape[-1]), flat)
    counted = (flat != IGNORED)[:, None]
    log_probs, entropy, lse, is_top1, means, squares = (
        column.view(target.shape) for column in torch.where(counted, columns, 0.0).unbind(1)
    )
    return LinearLogProbs(
        log_probs,
        entropy,
        lse,
        is_top1.bool(),
        means.detach() if mean_logits else None,
        squares.detach() if log_sum_sq_probs else None,
    )


def _by_kernel(layer: Linear, target: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """Tensors alone, for the hooks that see what a head returns."""
    ((x, weight, bias),) = layer.terms
    with torch.autocast(x.device.type, enabled=False):  # it had its say when the head ran
        tokens = linear_log_probs(x, weight, target, linear_bias=bias, **options)
    return tuple(values for values in tokens if values is not None)


def _of_rows(logits: Tensor, target: Tensor) -> Tensor:
    """The six numbers (T, 6) of logits (T, V)."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    picked = target.clamp(min=0)[:, None]
    log_p, lse = z.log_softmax(1), z.logsumexp(1)
    p = log_p.exp()
    columns = [
        log_p.gather(1, picked)[:, 0],
        -(p * log_p.masked_fill(p == 0, 0.0)).sum(1),
        lse,
        (z.argmax(1) == picked[:, 0]).to(z.dtype),
        z.detach().mean(1),
        (2 * log_p.detach()).logsumexp(1),
    ]
    return torch.stack(columns, 1)
