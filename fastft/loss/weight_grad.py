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

from fastft.loss.head_sweep import HeadCall, Operands, handed_back
from fastft.loss.linear_rows import HEAD
from fastft.loss.options import refuse_second_derivative, unrounded

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
        call: HeadCall,
        divisor: Tensor | None,
    ) -> Tensor:
        losses, *_, d_input, d_weight, d_bias = HEAD.native(
            input, linear_weight, linear_bias, target, weight, [], divisor, *call.flat()
        )
        ctx.save_for_backward(d_input, d_weight, d_bias)
        ctx.weight = linear_weight
        ctx.dtypes = input.dtype, None, None if linear_bias is None else linear_bias.dtype
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("linear_cross_entropy")
        of_input, of_weight, of_bias = ctx.needs_input_grad[:3]
        gradients, needs = ctx.saved_tensors, (of_input, False, of_bias)
        results = handed_back(gradients, needs, ctx.dtypes, upstream)
        if of_weight:  # not where torch.autograd.grad asks for other tensors alone
            _add(ctx.weight, gradients[1], upstream)
        return *results, None, None, None, None


def _add(weight: Tensor, d_weight: Tensor, upstream: Tensor) -> None:
    if _has_hooks(weight):
        raise RuntimeError(
            "accumulate_weight_grad=True: linear_weight was given hooks after the loss was computed"
        )
    if weight.grad is None:
        (weight.grad,) = handed_back([d_weight], [True], [weight.dtype], upstream)
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
    operands: Operands,
    target: Tensor,
    weight: Tensor | None,
    call: HeadCall,
    divisor: Tensor | None = None,
) -> Tensor:
    """The sum that `linear_rows` returns; backward adds the gradient of `operands[1]` to its
    `grad`."""
    return _IntoGrad.apply(*operands, target, weight, call, divisor)
