"""Cross-entropy over logits, forward and backward. The bare work is a copy: one read, one write."""

from __future__ import annotations

import models
import pytest
import torch
import torch.nn.functional as F
from compare import DEVICE, compare, rival
from errors import check

from fastft.loss.cross_entropy import cross_entropy
from fastft.loss.cross_entropy_rows import ROWS as OPERATOR

ROWS, CLASSES = (8192, 128256) if DEVICE == "cuda" else (1024, 16384)
ALL = {"softcap": 30.0, "logit_scale": 0.5, "z_loss": 1e-4, "label_smoothing": 0.1}


def plain(logits, target):
    return F.cross_entropy(logits, target)


def plain_with_all(logits, target):
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    z = torch.tanh(logits * ALL["logit_scale"] / ALL["softcap"]) * ALL["softcap"]
    squares = z.logsumexp(-1).square().mean()
    return (
        F.cross_entropy(z, target, label_smoothing=ALL["label_smoothing"]) + ALL["z_loss"] * squares
    )


def measure(benchmark, device, rows, classes, dtype, options):
    torch.manual_seed(0)
    logits = torch.randn(rows, classes, device=device).to(dtype).requires_grad_()
    target = torch.randint(0, classes, (rows,), device=device)
    benchmark.extra_info["shape"] = f"N={rows}, V={classes}"

    def stepping(function, **options):
        def step():
            function(logits, target, **options).backward()
            logits.grad = None  # else the next run gives this one's memory back

        return step

    plainly = plain_with_all if options else plain
    rivals = {"torch": stepping(plainly)}
    if device == "cuda" and (liger := rival("liger_kernel.transformers")):  # without a logit scale
        given = (
            {"label_smoothing": 0.1, "lse_square_scale": 1e-4, "softcap": 30.0} if options else {}
        )
        # it writes over its input: a copy keeps the benchmark's logits
        loss = liger.LigerCrossEntropyLoss(**given)
        rivals["Liger, on a copy"] = stepping(lambda logits, target: loss(logits.clone(), target))
    checked = min(rows, 2**27 // classes)  # of which float64 fits a GPU

    def check_rows():
        benchmark.extra_info["relative_errors"] = check(
            {
                "ours": lambda z: cross_entropy(z, target[:checked], **options),
                "torch": lambda z: plainly(z, target[:checked]),
            },
            lambda z: plainly(z, target[:checked]),
            [logits.detach()[:checked].requires_grad_()],
            ("loss", "d_logits"),
            plain="torch",
            terms=checked + classes,
        )

    compare(
        benchmark,
        stepping(cross_entropy, **options),
        rivals,
        check=check_rows,
        bytes_moved=2 * logits.numel() * dtype.itemsize,
        bare=lambda: logits.detach().clone(),
    )


@pytest.mark.parametrize("options", [{}, ALL], ids=["plain", "all_options"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_cross_entropy(benchmark, device, small, dtype, options):
    rows, classes = (63, 2051) if small else (ROWS, CLASSES)
    measure(benchmark, device, rows, classes, dtype, options)


@pytest.mark.parametrize("model", ["smollm2-135m", "qwen3-8b", "gemma-2-2b"])
def test_cross_entropy_of_model(benchmark, device, small, model):
    """bf16 logits of 8192 tokens; on two cores 256."""
    classes, rows = models.config(model).vocab_size, 8192 if device == "cuda" else 256
    measure(benchmark, device, 3 if small else rows, classes, torch.bfloat16, {})


@pytest.mark.skipif(DEVICE == "cpu", reason="compares the engines of a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("classes", [32_000, 50_257, 128_256, 151_936])
def test_engines(benchmark, device, dtype, classes):
    """Losses and gradient in one launch, by the CUDA and by the Triton kernel, which must agree."""
    rows = 4096
    logits = torch.randn(rows, classes, device=device).to(dtype)
    grad, (losses, lse) = torch.empty_like(logits), torch.empty(2, rows, device=device)
    target = torch.randint(0, classes, (rows,), device=device)

    def step(engine):
        function = OPERATOR.implementation(engine, logits.device)
        function(logits, target, [], [], losses, lse, [], [grad], -100, 0.0, 0.0, 0.0, 1.0)

    others = [] if OPERATOR.unavailable("triton", logits.device) else ["triton"]

    def agree():
        step("cuda")
        cuda = losses.clone(), grad.clone()
        for name in others:
            step(name)
            torch.testing.assert_close((losses, grad), cuda)

    compare(
        benchmark,
        lambda: step("cuda"),
        {name: lambda name=name: step(name) for name in others},
        check=agree,
        bytes_moved=2 * logits.numel() * dtype.itemsize,
        bare=lambda: grad.copy_(logits),
    )
