"""What a linear layer says about each token, without its logits: for DPO, GRPO, distillation.

    log_probs[t] = z[t, y] - lse[t],     entropy[t] = -sum_v p[t, v] log p[t, v]
    is_top1[t]: whether the target comes first
    mean_logits[t], log_sum_sq_probs[t]: as in `logit_moments`, where they are asked for

z, lse and p are those of `cross_entropy_rows`. A loss of these numbers reaches hidden states (T, H)
and head (V, H) in one of two ways. `linear_log_probs` takes any loss: backward makes the logits
again (4 products of 2 T H V flops). With `linear_token_loss` the loss of a row is a function of
that row's numbers, so that its derivative is known as soon as a chunk has its logits (3 products,
as for plain cross-entropy): policy gradients, DFT, focal losses.

Kept for backward: the operands; `linear_token_loss` keeps the gradients instead. Bytes moved: as in
`linear_rows`, and one more pass over the workspace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastft.loss.cross_entropy_rows import ROWS
from fastft.loss.dtensor_head import whole_head
from fastft.loss.head_gemms import working_dtype
from fastft.loss.head_sweep import HeadCall, Operands, Outputs, Where, handed_back, sweep_one
from fastft.loss.linear_rows import linear_rows
from fastft.loss.logit_moments import summed_over_classes
from fastft.loss.options import (
    check_device,
    check_indices,
    check_shapes,
    check_tensors,
    compute_dtype,
    refuse_second_derivative,
    row_options,
    statistics_dtype,
    sum_of_counted,
)


class LinearLogProbs(NamedTuple):
    """What is known of each token, in `target`'s shape; 0 (False) where it is `ignore_index`.

    fp32, or fp64 for fp64 operands. `mean_logits` (the mean of the token's logits over the
    vocabulary) and `log_sum_sq_probs` (log sum_v p_v^2) are None where they were not asked for.
    """

    log_probs: Tensor
    entropy: Tensor
    lse: Tensor
    is_top1: Tensor
    mean_logits: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None


def _planned(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    **plan: Any,
) -> tuple[Operands, Tensor, Tensor, HeadCall]:
    """Checks the arguments, and returns: input (T, H), weight and bias of a whole head; the target,
    as it came and flat; the call. `plan`: as of `HeadCall.planned`."""
    options = row_options(ignore_index, softcap=softcap, logit_scale=logit_scale)
    check_tensors(target=target)
    dtype = compute_dtype(input, weight, bias)
    check_shapes(input, weight, bias)
    input, weight, bias, target = whole_head(input, weight, bias, target)
    flat = check_indices(target, input, -1, len(weight), ignore_index)
    operands = input.reshape(-1, input.shape[-1]), weight, bias
    return (
        operands,
        target,
        flat,
        HeadCall.planned(operands, dtype, options, statistics=True, **plan),
    )


def linear_log_probs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mean_logits: bool = False,
    log_sum_sq_probs: bool = False,
    chunk_rows: int | None = None,
    max_counted: int | None = None,
    impl: str = "auto",
) -> LinearLogProbs:
    """Computes log-probability and entropy, log sum exp and is_top1 of each target.

    Differentiable in `log_probs`, `entropy` and `lse`; the others have no gradient. Obeys autocast
    as `F.linear` does.

    Args:
        input: hidden states (..., H), floating point.
        linear_weight: the head's weight (V, H), `input`'s dtype unless autocast is on; a DTensor is
            gathered, as in `linear_cross_entropy`.
        target: class indices in [0, V) or `ignore_index`, int64 or int32, of shape (...).
        linear_bias: the head's bias (V,), or None (default).
        ignore_index: rows with this target are 0 in every result and get no gradient. Default -100.
        softcap: logits become `softcap * tanh(logits / softcap)`; None (default): they stay.
        logit_scale: multiplies the logits, before the softcap (1 / temperature); default 1.
        mean_logits: whether the means of the logits, scaled and capped, are computed too. Costs one
            pass over the weight, with a softcap one over the logits. Default False.
        log_sum_sq_probs: whether log sum_v p_v^2 is, a pass of plain torch over the logits in the
            forward. Default False.
        chunk_rows: as in `linear_cross_entropy`.
        max_counted: as in `linear_cross_entropy`.
        impl: as in `linear_cross_entropy`.

    Returns:
        `LinearLogProbs(log_probs, entropy, lse, is_top1, mean_logits, log_sum_sq_probs)`, the last
        two None unless asked for. Of classes with equal logits the first is the top one.

    Raises:
        TypeError, ValueError, RuntimeError: as `linear_cross_entropy`.
    """
    operands, target, flat, call = _planned(
        input,
        linear_weight,
        linear_bias,
        target,
        ignore_index=ignore_index,
        softcap=softcap,
        logit_scale=logit_scale,
        impl=impl,
        chunk_rows=chunk_rows,
        max_counted=max_counted,
        moments=log_sum_sq_probs or (mean_logits and softcap is not None),
    )
    losses, lse, entropy, is_top1, means, log_sums = linear_rows(operands, flat, None, call)
    if mean_logits and not call.moments:
        means = _means(operands, flat, call)
    shape = target.shape
    return LinearLogProbs(
        -losses.view(shape),
        entropy.view(shape),
        lse.view(shape),
        is_top1.view(shape),
        means.view(shape) if mean_logits else None,
        log_sums.view(shape) if log_sum_sq_probs else None,
    )


@torch.no_grad()
def _means(operands: Operands, target: Tensor, call: HeadCall) -> Tensor:
    options, scale = call.options, call.options.logit_scale / len(operands[1])
    with torch.autocast(target.device.type, enabled=False):
        means = scale * summed_over_classes(*operands, statistics_dtype(call.dtype))
    return means.masked_fill_(target == options.ignore_index, 0.0)


class _LinearTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        token_loss: Callable[..., Tensor],
        arguments: Sequence[Tensor],
        call: HeadCall,
    ) -> Tensor:
        row_kernel = ROWS.implementation(
            call.impl, input.device, working_dtype(call.dtype, input.device.type)
        )

        def fill(z: Tensor, where: Where, outputs: Outputs) -> Tensor | None:
            y, options = target[where], call.options
            losses, lse, *statistics = outputs.of_rows(len(z), True)
            row_kernel(z, y, [], [], losses, lse, statistics, [], *options)
            known = [values.detach().requires_grad_() for values in (-losses, statistics[0], lse)]
            with torch.enable_grad():
                tokens = LinearLogProbs(known[0], known[1], known[2], statistics[1])
                values = token_loss(tokens, *(argument[where] for argument in arguments))
                _check_values(values, len(z))
                values = torch.where(y != options.ignore_index, values, 0.0)
            outputs.losses[where] = values.detach().to(losses.dtype)
            if not any(call.needs):
                return None
            given: Sequence[Tensor | None] = (None, None, None)
            if values.requires_grad:
                given = torch.autograd.grad(
                    values, known, torch.ones_like(values), allow_unused=True
                )
            log_probs, entropy, of_lse = (torch.zeros_like(lse) if g is None else g for g in given)
            upstream = [-log_probs, of_lse, entropy]
            row_kernel(z, y, [], upstream, losses, lse, statistics, [z], *options)
            return z

        operands = input, weight, bias
        outputs = sweep_one(operands, target, call, fill)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in operands]
        ctx.save_for_backward(*outputs.gradients)
        return outputs.losses.sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("linear_token_loss")
        needs = ctx.needs_input_grad[:3]
        return *handed_back(ctx.saved_tensors, needs, ctx.dtypes, upstream), *(None,) * 4


def _check_values(values: Tensor, rows: int) -> None:
    if not isinstance(values, Tensor) or values.shape != (rows,):
        is_tensor = isinstance(values, Tensor)
        got = f"shape {tuple(values.shape)}" if is_tensor else type(values).__name__
        raise ValueError(f"token_loss must return one loss per token, shape ({rows},), got {got}")


def linear_token_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    token_loss: Callable[..., Tensor],
    *arguments: Tensor,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_rows: int | None = None,
    max_counted: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """The sum over tokens of `token_loss`, with all gradients made in the forward pass.

    For example the clipped policy gradient, or DFT (a token's loss times its probability):

        def dft(token):
            return -token.log_probs * token.log_probs.detach().exp()

        linear_token_loss(x, head, target, dft)

    `input`, `linear_weight`, `target`, `linear_bias`, `ignore_index`, `softcap`, `logit_scale`,
    `chunk_rows`, `max_counted` and `impl` are those of `linear_log_probs`. Tokens have no
    `mean_logits` and no `log_sum_sq_probs`.

    Args:
        token_loss: `token_loss(tokens, *rows)` with `tokens` a `LinearLogProbs` of R tokens and
            `rows` their part of `arguments`; returns R losses, made of torch functions. Called once
            a chunk, on tokens in any grouping, so that a token's loss must not depend on the
            others. Only `tokens` receives a gradient.
        arguments: tensors of `target`'s shape: old log-probabilities, advantages, weights, ...

    Returns:
        A scalar, the sum over the tokens that are not ignored; fp32 (fp64 for fp64 operands).

    Raises:
        TypeError, ValueError, RuntimeError: as `linear_cross_entropy`; ValueError also where an
            argument does not have `target`'s shape, requires a gradient, or `token_loss` returns
            another shape than (R,).
    """
    operands, target, flat, call = _planned(
        input,
        linear_weight,
        linear_bias,
        target,
        ignore_index=ignore_index,
        softcap=softcap,
        logit_scale=logit_scale,
        impl=impl,
        chunk_rows=chunk_rows,
        max_counted=max_counted,
        summed=True,
    )
    for i, argument in enumerate(arguments):
        check_tensors(**{f"arguments[{i}]": argument})
        check_device(f"arguments[{i}]", argument, input.device)
        if argument.shape != target.shape:
            raise ValueError(
                f"arguments[{i}] must have target's shape {tuple(target.shape)}, got "
                f"{tuple(argument.shape)}"
            )
        if argument.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"arguments[{i}] requires a gradient, which linear_token_loss does not compute"
            )
    rows = [argument.reshape(-1) for argument in arguments]
    with torch.autocast(flat.device.type, enabled=False):
        total = _LinearTokenLoss.apply(*operands, flat, token_loss, rows, call)
        return sum_of_counted(total, flat != ignore_index)
