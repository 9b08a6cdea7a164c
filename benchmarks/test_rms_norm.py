"""A root mean square norm, forward and backward, against transformers'. The bare work reads and
writes as many bytes."""

from __future__ import annotations

import models
import pytest
import torch
from compare import compare
from errors import check

from fastft.layers.rms_norm import FORWARD, rms_norm

TOKENS = 512  # of which no tensor is too large for the heap
MODELS = ("smollm2-135m", "qwen3-0.6b", "llama-3-8b")
EPS = 1e-6


def ours(x, weight):
    return rms_norm(x, weight, EPS)


def plain(x, weight):
    """As transformers' Llama does it; in float64 for float64."""
    wide = x if x.dtype == torch.float64 else x.float()
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * normal.to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_rms_norm_of_model(benchmark, name, dtype):
    width = models.config(name).hidden_size
    torch.manual_seed(0)
    x, grad = (torch.randn(TOKENS, width).to(dtype) for _ in range(2))
    operands = [x.requires_grad_(), torch.randn(width).to(dtype).requires_grad_()]
    benchmark.extra_info["shape"] = f"N={TOKENS}, H={width}"

    def stepping(function):
        def step():
            torch.autograd.grad(function(*operands), operands, grad)

        return step

    def check_gradients():
        benchmark.extra_info["relative_errors"] = check(
            {"ours": ours, "torch": plain},
            plain,
            operands,
            ("y", "d_x", "d_weight"),
            plain="torch",
            terms=1,
            upstream=grad,
        )

    def bare():
        x.detach().clone()
        torch.add(x.detach(), grad)

    FORWARD.resolve("cpp", x.device, dtype)
    compare(
        benchmark,
        stepping(ours),
        {"torch": stepping(plain)},
        check=check_gradients,
        bytes_moved=5 * x.numel() * dtype.itemsize,
        bare=bare,
    )
