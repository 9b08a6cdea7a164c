"""A gated unit without its products, silu(gate) * up, forward and backward. The bare work reads and
writes as many bytes."""

from __future__ import annotations

import models
import pytest
import torch
import torch.nn.functional as F
from compare import compare
from errors import check

from fastft.layers.swiglu import FORWARD, swiglu

TOKENS = 256  # of which no tensor is too large for the heap
MODELS = ("smollm2-135m", "qwen3-0.6b", "llama-3-8b")


def plain(gate, up):
    return F.silu(gate) * up


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_swiglu_of_model(benchmark, name, dtype):
    width = models.config(name).intermediate_size
    torch.manual_seed(0)
    gate, up, grad = (torch.randn(TOKENS, width).to(dtype) for _ in range(3))
    operands = [gate.requires_grad_(), up.requires_grad_()]
    benchmark.extra_info["shape"] = f"N={TOKENS}, I={width}"

    def stepping(function):
        def step():
            torch.autograd.grad(function(gate, up), operands, grad)

        return step

    def check_gradients():
        benchmark.extra_info["relative_errors"] = check(
            {"ours": swiglu, "torch": plain},
            plain,
            operands,
            ("y", "d_gate", "d_up"),
            plain="torch",
            terms=1,
            upstream=grad,
        )

    def bare():
        torch.add(gate.detach(), up.detach())
        torch.add(gate.detach(), grad), up.detach().clone()

    FORWARD.resolve("cpp", gate.device, dtype)
    compare(
        benchmark,
        stepping(swiglu),
        {"torch": stepping(plain)},
        check=check_gradients,
        bytes_moved=8 * gate.numel() * dtype.itemsize,
        bare=bare,
    )
