"""What a linear layer says about each token, without ever holding its logits: the stuff of DPO,
GRPO and distillation.

    log_probs[t] = z[t, y] - lse[t],   entropy[t] = -sum_v p[t, v] log p[t, v],   is_top1[t]: the target comes first

z, lse and p as in `cross_entropy`. A loss of these numbers reaches hidden states (T, H) and head
(V, H) in one of two ways. `linear_log_probs` takes any loss: backward makes the logits again (4
products of 2 T H V flops). With `linear_token_loss` the loss of a row is a function of that row's
numbers, so that its derivative is known as soon as a chunk has its logits (3 products, as for plain
cross-entropy): policy gradients, DFT, focal losses.

Kept for backward: the operands; `linear_token_loss` keeps the gradients instead. Bytes moved: as in
`linear_rows`, and one more pass over the workspace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastft.loss.cross_entropy_rows import rows_implementation
from fastft.loss.dtensor_head import whole_head
from fastft.loss.head_gemms import working_dtype
from fastft.loss.head_sweep import HeadCall, Outputs, needed, scaled, sweep
from fastft.loss.linear_cross_entropy import (
    check_indices,
    check_positive,
    check_shapes,
    compute_dtype,
)
from fastft.loss.linear_rows import linear_rows
from fastft.loss.options import check_device, check_tensors, refuse_second_derivative, row_options


class LinearLogProbs(NamedTuple):
    """Per token, in `target`'s shape; 0 (False) where the target is `ignore_index`. fp32 (fp64 for
    fp64 operands)."""

    log_probs: Tensor
    entropy: Tensor
    lse: Tensor
    is_top1: Tensor


def _checked_head(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int
) -> tuple[tuple[Tensor, Tensor, Tensor | None], Tensor, Tensor, torch.dtype]:
    """Input (T, H), weight and bias of a whole head; the target, as it came and flat; the dtype of
    the products."""
    check_tensors(target=target)
    dtype = compute_dtype(input, weight, bias)
    check_shapes(input, weight, bias)
    input, weight, bias, target = whole_head(input, weight, bias, target)
    flat = check_indices(target, input, len(weight), ignore_index)
    return (input.reshape(-1, input.shape[-1]), weight, bias), target, flat, dtype


def linear_log_probs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_rows: int | None = None,
    max_counted: int | None = None,
    impl: str = "auto",
) -> LinearLogProbs:
    """Log-probability of each target, entropy, log sum exp and whether the target is the most
    probable class.

    Differentiable in `log_probs`, `entropy` and `lse`. Obeys autocast as `F.linear` does.

    Args:
        input: hidden states (..., H), floating point.
        linear_weight: the head's weight (V, H), `input`'s dtype unless autocast is on; a DTensor is
            gathered, as in `linear_cross_entropy`.
        target: class indices in [0, V) or `ignore_index`, int64 or int32, of shape (...).
        linear_bias: the head's bias (V,), or None (default).
        ignore_index: rows with this target are 0 in every result and get no gradient. Default -100.
        softcap: logits become `softcap * tanh(logits / softcap)`; None (default): they stay.
        logit_scale: multiplies the logits, before the softcap (1 / temperature); default 1.
        chunk_rows: as in `linear_cross_entropy`.
        max_counted: as in `linear_cross_entropy`.
        impl: as in `linear_cross_entropy`.

    Returns:
        `LinearLogProbs(log_probs, entropy, lse, is_top1)`. Of classes with equal logits the first
        is the top one.

    Raises:
        TypeError, ValueError, RuntimeError: as `linear_cross_entropy`.
    """
    options = row_options(ignore_index, softcap=softcap, logit_scale=logit_scale)
    check_positive("chunk_rows", chunk_rows, 1)
    check_positive("max_counted", max_counted, 0)
    operands, target, flat, dtype = _checked_head(
        input, linear_weight, linear_bias, target, ignore_index
    )
    plan: dict[str, Any] = {
        "statistics": True,
        "chunk_rows": chunk_rows,
        "max_counted": max_counted,
    }
    losses, lse, entropy, is_top1 = linear_rows(
        operands, flat, None, dtype=dtype, options=options, impl=impl, **plan
    )
    log_probs, entropy, lse, is_top1 = (
        result.view(target.shape) for result in (-losses, entropy, lse, is_top1)
    )
    return LinearLogProbs(log_probs, entropy, lse, is_top1)


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
        rows = rows_implementation(
            call.impl, working_dtype(call.dtype, input.device.type), input.device
        )

        def fill(z: Tensor, where: slice | Tensor, outputs: Outputs) -> None:
            losses, lse, *statistics = outputs.of_rows(len(z), True)
            rows(z, target[where], [], [], losses, lse, statistics, [], *call.options)
            known = [values.detach().requires_grad_() for values in (-losses, statistics[0], lse)]
            counted = target[where] != call.options.ignore_index
            with torch.enable_grad():
                tokens = LinearLogProbs(known[0], known[1], known[2], statistics[1])
                values = token_loss(tokens, *(argument[where] for argument in arguments))
                _check_values(values, len(z))
                values = torch.where(counted, values, 0.0)
            outputs.losses[where] = values.detach().to(losses.dtype)
            if not any(call.needs):
                return
            given: tuple[Tensor | None, ...] = (None, None, None)
            if values.requires_grad:
                given = torch.autograd.grad(
                    values, known, torch.ones_like(values), allow_unused=True
                )
            log_probs, entropy, of_lse = (torch.zeros_like(lse) if g is None else g for g in given)
            rows(
                z,
                target[where],
                [],
                [-log_probs, of_lse, entropy],
                losses,
                lse,
                statistics,
                [z],
                *call.options,
            )

        ctx.dtypes = tuple(
            None if tensor is None else tensor.dtype for tensor in (input, weight, bias)
        )
        outputs = sweep(input, weight, bias, target, call, fill)
        ctx.save_for_backward(*outputs[4:])
        ctx.needs = call.needs
        return outputs.losses.sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("linear_token_loss")
        gradients = scaled(needed(ctx.saved_tensors, ctx.needs), upstream, ctx.dtypes)
        return *gradients, None, None, None, None


def _check_values(values: Tensor, rows: int) -> None:
    if not isinstance(values, Tensor) or values.shape != (rows,):
        got = (
            f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        )
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
    `chunk_rows`, `max_counted` and `impl` are those of `linear_log_probs`.

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
    options = row_options(ignore_index, softcap=softcap, logit_scale=logit_scale)
    check_positive("chunk_rows", chunk_rows, 1)
    check_positive("max_counted", max_counted, 0)
    operands, target, flat, dtype = _checked_head(
        input, linear_weight, linear_bias, target, ignore_index
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
    recording = torch.is_grad_enabled()
    needs = [recording and tensor is not None and tensor.requires_grad for tensor in operands]
    bound = -1 if max_counted is None else max_counted
    call = HeadCall(
        (needs[0], needs[1], needs[2]), True, True, dtype, impl, chunk_rows or 0, bound, options
    )
    with torch.autocast(input.device.type, enabled=False):
        rows = [argument.reshape(-1) for argument in arguments]
        return _LinearTokenLoss.apply(*operands, flat, token_loss, rows, call)
