"""Cross-entropy over logits, forward and backward. The limit is one read and one write: a copy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compare import DEVICE, compare

from fastft.loss.cross_entropy import cross_entropy

ROWS, CLASSES = (8192, 128256) if DEVICE == "cuda" else (1024, 16384)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_cross_entropy(benchmark, device, dtype):
    torch.manual_seed(0)
    logits = torch.randn(ROWS, CLASSES, device=device).to(dtype).requires_grad_()
    target = torch.randint(0, CLASSES, (ROWS,), device=device)

    def step(function):
        logits.grad = None
        function(logits, target).backward()

    compare(
        benchmark,
        lambda: step(cross_entropy),
        {"torch": lambda: step(F.cross_entropy)},
        bytes_moved=2 * logits.numel() * dtype.itemsize,
        limit=lambda: logits.detach().clone(),
    )
