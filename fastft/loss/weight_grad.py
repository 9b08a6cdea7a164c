"""The head's weight gradient, added to `weight.grad` by the loss itself.

    weight.grad += upstream * dW        in one pass over both, rounded once

dW is the (V, H) sum of the forward pass. Autograd would scale it, round it and add it: up to five
passes over V H elements where this makes three, and, where dW was summed in fp32 for a 16-bit
weight or the graph is kept, one more (V, H) buffer. The weight's AccumulateGrad node gets no
gradient from the loss but runs all the same, after this: whoever waits for that node
(DistributedDataParallel) finds the sum in `weight.grad`. Hooks that want to see or change the
gradient cannot be served and are refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastft.loss.head_sweep import HeadCall, needed, scaled
from fastft.loss.linear_rows import HEAD
from fastft.loss.options import RowOptions, refuse_second_derivative, unrounded

_SLAB = 2048  # classes whose gradient goes through a wider copy at once


def check_accumulates(weight: Tensor, target: Tensor, reduction: str, group: Any) -> None:
    """Raises ValueError if the gradient of `weight` cannot be added to its `grad` by the loss."""
    reason = None
    if reduction == "none" or target.is_floating_point():
        reason = (
            "it needs class indices and reduction 'mean' or 'sum', whose gradients are known "
            "before backward"
        )
    elif type(weight) not in (Tensor, nn.Parameter):
        reason = f"linear_weight must be a plain tensor, it is a {type(weight).__name__}"
    elif not (weight.is_leaf and weight.requires_grad):
        reason = "linear_weight must be a leaf that requires a gradient (a parameter), it is not"
    elif group is not None:
        reason = "the classes are spread over the processes of a group"
    elif _has_hooks(weight):
        reason = "linear_weight has hooks on its gradient, which would not see this part of it"
    elif torch.compiler.is_compiling():
        reason = "torch.compile cannot trace it"
    if reason:
        raise ValueError(f"accumulate_weight_grad=True is not possible: {reason}")


def _has_hooks(weight: Tensor) -> bool:
    return bool(weight._backward_hooks or weight._post_accumulate_grad_hooks)


class _IntoGrad(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        divisor: Tensor | None,
        call: HeadCall,
    ) -> Tensor:
        losses, *_, d_input, d_weight, d_bias = HEAD.native(
            input, linear_weight, linear_bias, target, weight, [], divisor, *call.flat()
        )
        ctx.save_for_backward(d_input, d_weight, d_bias)
        ctx.weight, ctx.dtypes = (
            linear_weight,
            (input.dtype, None if linear_bias is None else linear_bias.dtype),
        )
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("linear_cross_entropy")
        (d_input, d_weight, d_bias), needs = ctx.saved_tensors, ctx.needs_input_grad
        to_input, to_bias = scaled(
            needed((d_input, d_bias), (needs[0], needs[2])), upstream, ctx.dtypes
        )
        if needs[1]:  # not where torch.autograd.grad asks for other tensors alone
            _add(ctx.weight, d_weight, upstream)
        return to_input, None, to_bias, None, None, None, None


def _add(weight: Tensor, d_weight: Tensor, upstream: Tensor) -> None:
    if _has_hooks(weight):
        raise RuntimeError(
            "accumulate_weight_grad=True: linear_weight was given hooks after the loss was computed"
        )
    if weight.grad is None:
        (weight.grad,) = scaled([d_weight], upstream, [weight.dtype])
    elif weight.grad.layout != torch.strided:
        raise RuntimeError(
            "accumulate_weight_grad=True needs a dense weight.grad; something made it sparse"
        )
    elif not weight.is_cpu or weight.grad.dtype == d_weight.dtype == upstream.dtype:
        weight.grad.addcmul_(d_weight, unrounded(upstream))
    else:  # torch would round upstream to 16 bits, or make a copy of all in the wider dtype
        for part, total in zip(d_weight.split(_SLAB), weight.grad.split(_SLAB), strict=True):
            wide = total.to(torch.promote_types(total.dtype, upstream.dtype))
            total.copy_(torch.addcmul(wide, part, upstream))


def sum_into_grad(
    operands: tuple[Tensor, Tensor, Tensor | None],
    target: Tensor,
    weight: Tensor | None,
    *,
    dtype: torch.dtype,
    options: RowOptions,
    impl: str,
    chunk_rows: int | None,
    max_counted: int | None,
    divisor: Tensor | None = None,
) -> Tensor:
    """As from `linear_rows`, `summed`; backward adds the gradient of `operands[1]` to its
    `grad`."""
    input, _, bias = operands
    needs = (input.requires_grad, True, bias is not None and bias.requires_grad)
    bound = -1 if max_counted is None else max_counted
    call = HeadCall(needs, True, False, dtype, impl, chunk_rows or 0, bound, options)
    return _IntoGrad.apply(*operands, target, weight, divisor, call)
