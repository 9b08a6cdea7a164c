"""The rows of a linear layer's cross-entropy: one operator, forward and backward, of every plan.

    z = x W^T + b;     loss[t], lse[t], entropy[t] and dz of z as in `cross_entropy_rows`
    dx = dz W,         dW = dz^T x,         db = sum dz

x are the hidden states (T, H), W the head (V, H), y the targets. Rows that are not ignored go
through the head as `head_sweep` says; the row kernel turns their logits into dz in place. What is
computed when, in products of 2 T H V flops, depends on who needs a gradient:

    a sum                      forward: z, dx, dW (3; 2 where W or x is frozen)
                               backward: a scaling
    rows, only x trained       forward: z, dx (2)       backward: a scaling of dx's rows
    rows, W or b trained       forward: z (1)           backward: z again, dx, dW (3)
    rows and their entropies   forward: z (1)           backward: z again, dx, dW (3)
    nobody needs one           forward: z (1)

Products run in the dtype of the operands (`head_gemms` says how), statistics and sums in fp32. dz
is between -1 and 1, unnormalised, and so are the gradients of a sum, and in fp16 (which loses
nothing so under a GradScaler) and in fp32 products on a CPU those of a mean, a sum over N. A
device's fp32 and bf16 gradients of a mean are divided in the forward pass:

    dW = sum over chunks of dz^T round(x / N)
    dx = round(round(dz W) / N),     db = round(sum dz / N)

What backward scales by is 1 then, as a rule, and the scaling (`scale_gradients`) leaves them alone.
It is x that is divided and not dz: where a target has a small probability dz is near -1, and all
these would be rounded alike in bf16, by up to 0.39 %. The roundings of x differ, and there is one
of dW less. A CPU's bf16 products are divided themselves, before they are rounded:
dW = sum over chunks of round(dz^T x / N).

Kept for backward: dx, dW and db, or only the operands where backward makes z again. Bytes moved on
top of the products' operands: for each chunk, 4 passes over the workspace (R V) and 2 over dW.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastft import ops
from fastft.loss.cross_entropy_rows import ROWS
from fastft.loss.head_gemms import working_dtype
from fastft.loss.head_sweep import HeadCall, Operands, Outputs, Where, handed_back, sweep_one
from fastft.loss.logit_moments import logit_moments
from fastft.loss.options import refuse_second_derivative, statistics_dtype


def divides_rows(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the gradients of a mean are divided where they are made, for products in `dtype`."""
    if device.type == "cpu":
        return working_dtype(dtype, device.type) == torch.bfloat16
    return dtype in (torch.float32, torch.bfloat16)


def _linear_cross_entropy_rows(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    upstream: Sequence[Tensor],
    divisor: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    call = HeadCall.of(*arguments)
    row_kernel = ROWS.implementation(
        call.impl, input.device, working_dtype(call.dtype, input.device.type)
    )
    weights = [] if weight is None else [weight]

    def fill(z: Tensor, where: Where, outputs: Outputs) -> Tensor | None:
        results, more = outputs.of_rows(len(z), call.statistics), []
        losses, lse, *statistics = results
        if call.moments:
            more = logit_moments(z, target[where], call.options, losses.dtype)
        upstreams, grad = [u[where] for u in upstream], [z] if any(call.needs) else []
        row_kernel(
            *(z, target[where], weights, upstreams, losses, lse, statistics, grad), *call.options
        )
        for output, values in zip(outputs, (*results, *more), strict=False):
            output[where] = values
        return z if grad else None

    outputs = sweep_one((input, linear_weight, linear_bias), target, call, fill, divisor)
    total = outputs.losses.sum() if call.summed else outputs.losses
    return total if divisor is None else total / divisor, *outputs[1:]


def _fake(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    upstream: Sequence[Tensor],
    divisor: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    call = HeadCall.of(*arguments)
    outputs = Outputs.empty(input, linear_weight, call)
    return outputs.losses.sum() if call.summed else outputs.losses, *outputs[1:]


# The gradients of losses (their sum, or times upstream: see ROWS) are of a forward or of a backward
# pass alike. A sum and its gradients may have a divisor, ().
HEAD = ops.Operator(
    "linear_cross_entropy_rows("
    "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, "
    "Tensor[] upstream, Tensor? divisor, bool[] needs, bool summed, bool statistics, "
    "ScalarType dtype, str impl, int chunk_rows, int max_counted, int ignore_index, "
    "float label_smoothing, float z_loss, float softcap, float logit_scale, bool moments) -> "
    "(Tensor losses, Tensor lse, Tensor entropy, Tensor is_top1, Tensor mean_logits, "
    "Tensor log_sum_sq_probs, Tensor d_input, Tensor d_weight, Tensor d_bias)",
    _linear_cross_entropy_rows,
    engines={},
    fake=_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.call = HeadCall.of(*inputs[7:])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[3:])
    ctx.dtypes = tuple(None if tensor is None else tensor.dtype for tensor in inputs[:3])
    ctx.kept, ctx.upstreams = any(ctx.call.needs), len(inputs[5])
    ctx.save_for_backward(*(output[-3:] if ctx.kept else inputs[:5]))


def _backward(ctx: Any, *upstreams: Tensor | None) -> tuple[Any, ...]:
    refuse_second_derivative("linear_cross_entropy")
    needs = ctx.needs_input_grad[:3]
    if ctx.kept:
        results = handed_back(ctx.saved_tensors, needs, ctx.dtypes, upstreams[0])
    else:
        call = ctx.call._replace(needs=tuple(needs), summed=False, statistics=False, moments=False)
        *operands, target, weight = ctx.saved_tensors
        gradients = _recompute(operands, target, weight, upstreams[:3], call)
        results = handed_back(gradients, needs, ctx.dtypes)
    return *results, None, None, [None] * ctx.upstreams, *(None,) * 14


def _recompute(
    operands: Sequence[Tensor],
    target: Tensor,
    weight: Tensor | None,
    upstreams: tuple[Tensor | None, ...],
    call: HeadCall,
) -> tuple[Tensor, ...]:
    """The gradients of the operands, from those of losses, lse and entropy."""
    zero = torch.zeros(target.shape, dtype=statistics_dtype(call.dtype), device=target.device)
    losses, lse, entropy = (
        zero if u is None else u.expand(target.shape).contiguous() for u in upstreams
    )
    upstream = [losses] if lse is entropy is zero else [losses, lse, entropy]
    return HEAD.native(*operands, target, weight, upstream, None, *call.flat())[-3:]


torch.library.register_autograd(
    HEAD.qualified_name, _backward, setup_context=_setup_context, lib=ops.library
)


def linear_rows(
    operands: Operands,
    target: Tensor,
    weight: Tensor | None,
    call: HeadCall,
    divisor: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Losses (or their sum), lse, entropy, is_top1, mean_logits and log_sum_sq_probs of a head over
    flat rows.

    Args:
        operands: input (T, H), linear_weight (V, H), linear_bias (V,) or None.
        target: (T,), contiguous.
        weight: as `class_weights` returns it.
        call: as `HeadCall.planned` makes it.
        divisor: (), of a sum and its gradients.
    """
    return HEAD.native(*operands, target, weight, [], divisor, *call.flat())[:6]
