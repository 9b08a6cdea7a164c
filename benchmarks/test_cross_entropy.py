"""Cross-entropy over 1024 x 16384 logits, forward and backward. The limit is one read and one write: a copy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compare import compare

from fastft.loss.cross_entropy import cross_entropy

ROWS, CLASSES = 1024, 16384


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy(benchmark, dtype):
    torch.manual_seed(0)
    logits = torch.randn(ROWS, CLASSES).to(dtype).requires_grad_()
    target = torch.randint(0, CLASSES, (ROWS,))

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
