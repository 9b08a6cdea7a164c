"""Output heads to time losses of, and a step of training through one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import models
import pytest
import torch
from compare import DEVICE
from torch import Tensor

from fastft.loss.head_gemms import is_emulated

IDS = {torch.float32: "fp32", torch.bfloat16: "bf16", 0.0: "all_counted", 0.5: "half_ignored"}
# of a head whose gradient, and both in float64, two cores have the time and memory for
ELEMENTS, TOKENS = 2**26, 64


class Shape(NamedTuple):
    """Rows, hidden size, classes."""

    rows: int
    hidden: int
    classes: int


WHOLE = Shape(8192, 4096, 128256) if DEVICE == "cuda" else Shape(1024, 512, 16384)
EMULATED, SMALL = Shape(128, 256, 8192), Shape(63, 32, 1003)


def shape_of(device: str, dtype: torch.dtype, small: bool, alone: bool = False) -> Shape:
    """As large as rivals can be timed at; `alone`: of the full size, for ours against ours."""
    if small:
        return SMALL
    return EMULATED if is_emulated(dtype, device) and not alone else WHOLE


def of_model(name: str, device: str, dtype: torch.dtype, small: bool) -> Shape:
    """A model's head; on two cores 64 tokens, and the classes that are left of it at 2^26
    elements."""
    config = models.config(name)
    if small:
        return SMALL
    if device == "cuda":
        return Shape(8192, config.hidden_size, config.vocab_size)
    if is_emulated(dtype, device):
        pytest.skip("this processor emulates bf16 products: half a minute for each call")
    classes = min(config.vocab_size, ELEMENTS // config.hidden_size)
    return Shape(TOKENS, config.hidden_size, classes)


def make(
    device: str, dtype: torch.dtype, shape: Shape, ignored: float = 0.0, trainable: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, the head, targets."""
    if device == "cuda" and dtype == torch.float32:
        pytest.skip("on a GPU nobody trains such a head in fp32: a call takes half a second")
    torch.manual_seed(0)
    x = torch.randn(shape.rows, shape.hidden, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(shape.classes, shape.hidden, device=device) / shape.hidden**0.5).to(dtype)
    weight.requires_grad_(trainable)
    target = torch.randint(0, shape.classes, (shape.rows,), device=device)
    return x, weight, target.masked_fill(torch.rand(shape.rows, device=device) < ignored, -100)


def stepping(
    loss: Callable[..., Tensor], x: Tensor, weight: Tensor, target: Tensor
) -> Callable[[], None]:
    def step() -> None:
        loss(x, weight, target).backward()
        x.grad = weight.grad = None  # else the next run gives this one's memory back

    return step


def told(shape: Shape) -> str:
    return f"N={shape.rows}, H={shape.hidden}, V={shape.classes}"
