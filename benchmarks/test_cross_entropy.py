"""Cross-entropy over logits, forward and backward. The bare work is a copy: one read, one write."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compare import DEVICE, compare, rival

from fastft.loss.cross_entropy import cross_entropy
from fastft.loss.cross_entropy_rows import ROWS as OPERATOR

ROWS, CLASSES = (8192, 128256) if DEVICE == "cuda" else (1024, 16384)
ALL = {"softcap": 30.0, "logit_scale": 0.5, "z_loss": 1e-4, "label_smoothing": 0.1}


def plain(logits, target):
    return F.cross_entropy(logits, target)


def plain_with_all(logits, target):
    z = torch.tanh(logits.float() * ALL["logit_scale"] / ALL["softcap"]) * ALL["softcap"]
    squares = z.logsumexp(-1).square().mean()
    return (
        F.cross_entropy(z, target, label_smoothing=ALL["label_smoothing"]) + ALL["z_loss"] * squares
    )


@pytest.mark.parametrize("options", [{}, ALL], ids=["plain", "all_options"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_cross_entropy(benchmark, device, dtype, options):
    torch.manual_seed(0)
    logits = torch.randn(ROWS, CLASSES, device=device).to(dtype).requires_grad_()
    target = torch.randint(0, CLASSES, (ROWS,), device=device)

    def stepping(function, **options):
        def step():
            logits.grad = None
            function(logits, target, **options).backward()

        return step

    rivals = {"torch": stepping(plain_with_all if options else plain)}
    if device == "cuda" and (liger := rival("liger_kernel.transformers")):  # without a logit scale
        given = (
            {"label_smoothing": 0.1, "lse_square_scale": 1e-4, "softcap": 30.0} if options else {}
        )
        # it writes over its input: a copy keeps the benchmark's logits
        loss = liger.LigerCrossEntropyLoss(**given)
        rivals["Liger, on a copy"] = stepping(lambda logits, target: loss(logits.clone(), target))
    compare(
        benchmark,
        stepping(cross_entropy, **options),
        rivals,
        bytes_moved=2 * logits.numel() * dtype.itemsize,
        bare=lambda: logits.detach().clone(),
    )


@pytest.mark.skipif(DEVICE == "cpu", reason="compares the engines of a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("classes", [32_000, 50_257, 128_256, 151_936])
def test_engines(benchmark, device, dtype, classes):
    """Losses and gradient in one launch, by the CUDA and by the Triton kernel."""
    rows = 4096
    logits = torch.randn(rows, classes, device=device).to(dtype)
    grad, (losses, lse) = torch.empty_like(logits), torch.empty(2, rows, device=device)
    target = torch.randint(0, classes, (rows,), device=device)

    def step(engine):
        function = OPERATOR.implementation(engine, logits.device)
        function(logits, target, [], [], losses, lse, [], [grad], -100, 0.0, 0.0, 0.0, 1.0)

    compare(
        benchmark,
        lambda: step("cuda"),
        {"triton": lambda: step("triton")}
        if OPERATOR.unavailable("triton", logits.device) is None
        else {},
        bytes_moved=2 * logits.numel() * dtype.itemsize,
        bare=lambda: grad.copy_(logits),
    )
