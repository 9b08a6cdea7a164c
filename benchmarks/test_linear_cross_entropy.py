"""A head and its loss, forward and backward: N=1024, H=512, V=16384. The limit is the three GEMMs alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compare import compare

from fastft.loss.linear_cross_entropy import linear_cross_entropy

N, H, V = 1024, 512, 16384


@pytest.mark.parametrize(
    ("dtype", "head", "ignored"),
    [
        (torch.float32, "trainable", 0.0),
        (torch.float32, "trainable", 0.5),
        (torch.float32, "frozen", 0.0),
        (torch.bfloat16, "trainable", 0.0),
    ],
)
def test_linear_cross_entropy(benchmark, dtype, head, ignored):
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor emulates bf16 GEMMs: a call takes a minute")
    torch.manual_seed(0)
    x = torch.randn(N, H).to(dtype).requires_grad_()
    weight = (torch.randn(V, H) / H**0.5).to(dtype).requires_grad_(head == "trainable")
    target = torch.randint(0, V, (N,)).masked_fill(torch.rand(N) < ignored, -100)
    counted = (target != -100).nonzero()[:, 0]
    logits, d_x, d_weight = x.new_empty(len(counted), V), torch.empty_like(x[counted]), torch.empty_like(weight)

    def step(function, **options):
        x.grad = weight.grad = None
        function(x, weight, target, **options).backward()

    def gemms():
        with torch.no_grad():
            rows = x[counted]
            torch.mm(rows, weight.T, out=logits)
            torch.mm(logits, weight, out=d_x)
            if weight.requires_grad:
                torch.mm(logits.T, rows, out=d_weight)

    rivals = {"torch eager": lambda: step(lambda x, weight, target: F.cross_entropy(F.linear(x, weight), target))}
    # its chunked option takes seconds a call on a CPU: once is enough
    if hasattr(torch.nn, "LinearCrossEntropyOptions") and head == "trainable" and not ignored:
        options = torch.nn.LinearCrossEntropyOptions()
        rivals["torch chunked"] = lambda: step(F.linear_cross_entropy, ignore_index=-100, options=options)
    compare(
        benchmark,
        lambda: step(linear_cross_entropy),
        rivals,
        rounds=3,
        bytes_moved=dtype.itemsize * 4 * len(counted) * V,
        limit=gemms,
    )
