"""Numbers of a linear layer's logits that need no product with the vocabulary.

    z[t, y_t] = x_t . W[y_t] + b[y_t]                   a gathered logit a row: T H multiplications
    sum_v z[t, v] = x_t . sum_v W[v] + sum_v b[v]       a sum or mean of logits: (T + V) H

A selected log-probability is the first less a logsumexp, so that only that makes the logits; the
second is what trainers log of logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastft.loss.lazy.expressions import Expression, Place, Recorded, evaluate, parts_of
from fastft.loss.lazy.sources import Linear, Source
from fastft.loss.logit_moments import summed_over_classes
from fastft.loss.options import refuse_second_derivative, statistics_dtype

# of which a number depends on others of its row
_MIXING = (torch.softmax, torch.log_softmax, torch.stack, torch.gather, torch.amax, torch.amin)


class _Picked(torch.autograd.Function):
    """x . W[y] of each row, in fp32: x (T, H), W (V, H), y (T,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, index)
        wide = statistics_dtype(x.dtype)
        return (x.to(wide) * weight.index_select(0, index).to(wide)).sum(-1)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("a gathered logit")
        x, weight, index = ctx.saved_tensors
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = (upstream[:, None] * weight.index_select(0, index)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            # without atomics, and a class that comes often is summed in fp32
            rows = upstream[:, None] * x
            of_weight = torch.ops.aten.embedding_dense_backward(rows, index, len(weight), -1, False)
            of_weight = of_weight.to(weight.dtype)
        return of_x, of_weight, None


def _logits_at(head: Linear, index: Tensor) -> Tensor:
    """One logit of each row (T, 1)."""
    total: Any = 0
    for x, weight, bias in head.terms:
        rows = x.reshape(index.numel(), x.shape[-1])
        total = total + _Picked.apply(rows, weight, index)
        if bias is not None:
            column = torch.ones_like(rows[:, :1]), bias[:, None], index
            total = total + _Picked.apply(*column)
    return total.to(head.dtype)[:, None]


@torch._disable_dynamo
def picked(source: Source, expression: Expression, index: Tensor) -> Tensor | None:
    """`expression` at `index` (T, 1), (T, 1); None where that needs the other logits of a row."""
    columns = [operand for operand in source.operands if operand.shape[-1] == 1]
    mixes = any(
        part.function in _MIXING
        if isinstance(part, Recorded)
        else isinstance(part, Tensor) and part.numel() > 1
        for part in parts_of(expression)
    )
    is_whole = all(head.is_whole for head in source.heads)
    if index.shape[-1] != 1 or mixes or not is_whole or len(columns) < len(source.operands):
        return None
    if isinstance(expression, Place) and expression.kind == "operand":
        return None
    flat = index[:, 0]
    logits = [_logits_at(head, flat) for head in source.heads]
    return evaluate(expression, logits, [column.reshape(-1, 1) for column in columns])


@torch._disable_dynamo
def summed(head: Linear, scale: float) -> Tensor:
    """`scale` times the sum of each row's logits, (...), in fp32."""
    with torch.autocast(head.terms[0][0].device.type, enabled=False):
        dtype = statistics_dtype(head.dtype)
        first, *others = (summed_over_classes(*term, dtype) for term in head.terms)
        return scale * sum(others, first)
