"""A head and its loss, forward and backward. The limit is the GEMMs alone: three, or two where the head is frozen.

On a CPU N=1024, H=512, V=16384; on a GPU the head of an 8 B Llama, N=8192, H=4096, V=128256.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compare import DEVICE, compare, rival

from fastft.loss.linear_cross_entropy import linear_cross_entropy

N, H, V = (8192, 4096, 128256) if DEVICE == "cuda" else (1024, 512, 16384)


@pytest.mark.parametrize(
    ("dtype", "head", "ignored"),
    [
        (torch.float32, "trainable", 0.0),
        (torch.float32, "trainable", 0.5),
        (torch.float32, "frozen", 0.0),
        (torch.bfloat16, "trainable", 0.0),
        (torch.bfloat16, "trainable", 0.5),
        (torch.bfloat16, "frozen", 0.0),
    ],
    ids=lambda value: {torch.float32: "fp32", torch.bfloat16: "bf16", 0.0: "all_counted", 0.5: "half_ignored"}.get(
        value
    ),
)
def test_linear_cross_entropy(benchmark, device, dtype, head, ignored):
    if device == "cuda" and dtype == torch.float32:
        pytest.skip("a head of this size is not trained in fp32 on a GPU")
    if device == "cpu" and dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor emulates bf16 GEMMs: a call takes a minute")
    torch.manual_seed(0)
    x = torch.randn(N, H, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(V, H, device=device) / H**0.5).to(dtype).requires_grad_(head == "trainable")
    target = torch.randint(0, V, (N,), device=device).masked_fill(torch.rand(N, device=device) < ignored, -100)
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
    if device == "cuda" and (liger := rival("liger_kernel.transformers")):
        fused = liger.LigerFusedLinearCrossEntropyLoss()
        rivals["Liger"] = lambda: step(lambda x, weight, target: fused(weight, x, target))
    compare(
        benchmark,
        lambda: step(linear_cross_entropy),
        rivals,
        rounds=7,
        bytes_moved=dtype.itemsize * 4 * len(counted) * V,
        limit=gemms,
    )
