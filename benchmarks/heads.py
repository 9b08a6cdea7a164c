"""Output heads to time losses of, and a step of training through one."""

from __future__ import annotations

import pytest
import torch
from compare import DEVICE

from fastft.loss.head_gemms import is_emulated

SHAPE = (8192, 4096, 128256) if DEVICE == "cuda" else (1024, 512, 16384)
EMULATED = (128, 256, 8192)
IDS = {torch.float32: "fp32", torch.bfloat16: "bf16", 0.0: "all_counted", 0.5: "half_ignored"}


def make(device, dtype, ignored=0.0, trainable=True, alone=False):
    """A head and its inputs, as large as rivals can be timed at; `alone`: of the full size, for
    ours against ours."""
    if device == "cuda" and dtype == torch.float32:
        pytest.skip("on a GPU nobody trains such a head in fp32: a call takes half a second")
    rows, hidden, classes = EMULATED if is_emulated(dtype, device) and not alone else SHAPE
    torch.manual_seed(0)
    x = torch.randn(rows, hidden, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(classes, hidden, device=device) / hidden**0.5).to(dtype)
    weight.requires_grad_(trainable)
    target = torch.randint(0, classes, (rows,), device=device)
    return x, weight, target.masked_fill(torch.rand(rows, device=device) < ignored, -100)


def stepping(loss, x, weight, target):
    def step():
        x.grad = weight.grad = None
        loss(x, weight, target).backward()

    return step
