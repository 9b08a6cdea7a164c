"""What a head's loss must be on any device where torch's CUDA differs from its CPU: on a GPU, and
on a CPU too."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import fastft
from support.numerics import assert_no_common_factor, assert_no_worse
from support.row_problems import IGNORED

ROWS, HIDDEN, CLASSES = 9450, 64, 1003
COUNTED = 8100  # of which 1 / COUNTED in bf16 is 0.38 % off


def _head(rows: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, the head, and targets of which every seventh is ignored."""
    target = torch.randint(0, CLASSES, (rows,))
    target[::7] = IGNORED
    tensors = torch.randn(rows, HIDDEN), torch.randn(CLASSES, HIDDEN) / HIDDEN**0.5
    x, weight = (tensor.to(device, dtype).requires_grad_() for tensor in tensors)
    return x, weight, target.to(device)


def _gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    # as a GradScaler scales, so that fp16 holds them
    return list(torch.autograd.grad(loss * 1024, leaves))


def check_the_factor_of_the_mean(dtype: torch.dtype, chunk_rows: int | None, device: str) -> None:
    """All of a gradient is scaled by 1 / COUNTED in fp32: rounding it to `dtype` first would show
    in every element."""
    x, weight, target = _head(ROWS, dtype, device)
    assert int((target != IGNORED).sum()) == COUNTED
    ours = _gradients(
        fastft.linear_cross_entropy(x, weight, target, chunk_rows=chunk_rows), x, weight
    )
    doubles = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    truths = _gradients(F.cross_entropy(F.linear(*doubles), target), *doubles)
    for name, actual, truth in zip(("d_input", "d_weight"), ours, truths, strict=True):
        assert_no_common_factor(actual, truth, dtype, name)


def check_fp32_weights_under_autocast(chunk_rows: int, device: str) -> None:
    """Several chunks, whose 16-bit products add up in fp32 (Trainer's `bf16=True`)."""
    x, weight, target = _head(507, torch.float32, device)

    def run(loss: object, dtype: torch.dtype, autocast: bool) -> list[Tensor]:
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (x, weight)]
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            value = loss(*leaves)
        return [value, *torch.autograd.grad(value, leaves)]

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(x, weight)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), target)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return fastft.linear_cross_entropy(x, weight, target, chunk_rows=chunk_rows)

    found, rivals = run(ours, torch.float32, True), run(plain, torch.float32, True)
    truths = run(plain, torch.float64, False)
    for name, *results in zip(("loss", "d_input", "d_weight"), found, rivals, truths, strict=True):
        assert_no_worse(*results, name, terms=507 + HIDDEN + CLASSES)
