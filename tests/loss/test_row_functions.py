"""Losses that the row kernel does not know go through the head as those do that it knows: with
emulated products, and without the rows that do not count."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from support.device_mode import DeviceMode
from support.numerics import assert_no_worse
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastft
from fastft import _native
from fastft.loss import head_gemms, head_sweep
from fastft.loss.head_gemms import is_emulated, working_dtype
from fastft.loss.head_sweep import CountedRows
from fastft.loss.row_functions import apply_to_rows

T, H, V = 63, 17, 507
aten = torch.ops.aten
PRODUCTS = {aten.mm: 0, aten.addmm: 1, aten.addmm_: 1}  # where the first matrix stands


class Products(TorchDispatchMode):
    """The dtype and the rows of every product x W^T that is made of `hidden` columns of x."""

    def __init__(self, hidden=H):
        super().__init__()
        self.hidden, self.dtypes, self.rows = hidden, set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in PRODUCTS:
            x, weight = args[PRODUCTS[func.overloadpacket] :][:2]
            self.dtypes |= {x.dtype, weight.dtype}
            if x.shape[1] == self.hidden and weight.shape[1] == V:
                self.rows += len(x)
        return func(*args, **(kwargs or {}))


class LanguageModel(nn.Module):
    """A head, and the log-probabilities of tokens, as losses of preferences and policies ask."""

    def __init__(self, weight):
        super().__init__()
        self.head = nn.Linear(*weight.T.shape, bias=False, device="meta")
        self.head.weight = nn.Parameter(weight.clone())

    def get_output_embeddings(self):
        return self.head

    def forward(self, x, target):
        taken = target.clamp(min=0)[:, None]
        wide = torch.promote_types(x.dtype, torch.float32)
        return self.head(x).to(wide).log_softmax(-1).gather(-1, taken)[:, 0]


def make(dtype, ignored=0.3):
    x, weight = torch.randn(T, H).to(dtype), torch.randn(V, H).to(dtype)
    target = torch.randint(0, V, (T,)).masked_fill(torch.rand(T) < ignored, -100)
    return x, weight, target


def masked_sum(log_probs, target):
    return torch.where(target != -100, -log_probs, 0.0).sum()


def test_log_probabilities_in_a_model_have_the_products_of_the_head():
    x, weight, target = make(torch.bfloat16)
    if os.environ.get("FASTFT_CPU_ISA", "avx512bf16") != "avx512bf16":
        assert is_emulated(torch.bfloat16, "cpu")

    def gradients(dtype):
        model, leaf = LanguageModel(weight.to(dtype)), x.detach().clone().to(dtype).requires_grad_()
        masked_sum(model(leaf, target), target).backward()
        return leaf.grad, model.head.weight.grad

    model, leaf = LanguageModel(weight), x.detach().clone().requires_grad_()
    with fastft.fused_loss(model) as report, Products() as products:
        masked_sum(model(leaf, target), target).backward()
    assert report.fused and not report.materialised
    assert products.dtypes == {working_dtype(torch.bfloat16, "cpu")}
    # all in forward, and in backward those which the mask lets through
    assert products.rows == T + int((target != -100).sum())
    ours, rivals, truths = (
        (leaf.grad, model.head.weight.grad),
        gradients(torch.bfloat16),
        gradients(torch.float64),
    )
    for name, *results in zip("xW", ours, rivals, truths, strict=True):
        assert_no_worse(*results, name, terms=T + H + V)


@pytest.mark.skipif(bool(_native.missing("cpu")), reason="not built")
def test_log_probabilities_where_bf16_is_emulated():
    test = test_log_probabilities_in_a_model_have_the_products_of_the_head.__name__
    # without bf16 units every processor emulates, whatever else it has
    environment = {**os.environ, "FASTFT_CPU_ISA": "avx512", "ATEN_CPU_CAPABILITY": "avx2"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", f"{__file__}::{test}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout


HEADS = {
    "one layer": [torch.bfloat16],
    "and an adapter": [torch.bfloat16] * 2,
    "and an adapter of fp32": [torch.bfloat16, torch.float32],
    "of fp32 and an adapter": [torch.float32, torch.bfloat16],
}


@pytest.mark.parametrize("dtypes", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("emulated", [False, True])
@pytest.mark.parametrize("summed", [False, True])
def test_rows_that_do_not_count_are_left_out(dtypes, emulated, summed, monkeypatch):
    for module in (head_sweep, head_gemms):
        monkeypatch.setattr(
            module, "is_emulated", lambda dtype, _: emulated and dtype == torch.bfloat16
        )
    monkeypatch.setattr(head_gemms, "_SLAB_BYTES", 4 * H * 100)
    monkeypatch.setitem(head_sweep._LIMITS, "cpu", (0, 16, 1 << 31, 0))
    target = make(torch.float32)[2]
    terms = [[tensor.requires_grad_() for tensor in make(dtype)[:2]] for dtype in dtypes]
    upstream = torch.rand(()) if summed else torch.rand(T)

    def loss(z, y):
        return F.cross_entropy(z.float() + 1, y, reduction="sum" if summed else "none")

    def plain(*tensors, wide):
        z = sum(F.linear(x, weight) for x, weight in zip(tensors[::2], tensors[1::2], strict=True))
        return F.cross_entropy(
            z if wide else z.float(), target, reduction="sum" if summed else "none"
        )

    rows = CountedRows.of(target, -100, -1)
    leaves = [tensor for term in terms for tensor in term]
    with Products() as products:
        ours = apply_to_rows(
            [[(*term, None) for term in terms]], loss, target, summed=summed, rows=rows
        )
        gradients = torch.autograd.grad(ours, leaves, upstream)
    passes = 1 if summed else 2
    assert products.rows % (passes * rows.counted) == 0 and 0 < rows.counted < T
    double = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = plain(*double, wide=True)
    stock = plain(*leaves, wide=False)
    truths = [exact, *torch.autograd.grad(exact, double, upstream.double())]
    rivals = [stock, *torch.autograd.grad(stock, leaves, upstream)]
    for result, rival, truth in zip([ours, *gradients], rivals, truths, strict=True):
        assert result.dtype == rival.dtype
        assert_no_worse(result, rival, truth, terms=T + H + V)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_row_receives_a_gradient(dtype):
    x, weight = (tensor.requires_grad_() for tensor in make(dtype)[:2])
    with Products() as products:
        result = apply_to_rows([[(x, weight, None)]], lambda z: z.logsumexp(-1))
        gradients = torch.autograd.grad(result, (x, weight), torch.zeros(T, dtype=dtype))
    assert products.rows == T
    assert all(not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("bound", [40, 63, 30])
def test_a_bound_of_the_rows_on_a_device(bound):
    """Too low a one shows, and nobody waits for the device."""
    x, weight, target = make(torch.float32, ignored=0.0)
    target[40:] = -100
    leaves = x.requires_grad_(), weight.requires_grad_()
    with DeviceMode(refuse=True), Products() as products:
        rows = CountedRows.of(target, -100, bound)
        loss = apply_to_rows(
            [[(*leaves, None)]],
            lambda z, y: F.cross_entropy(z + 1, y, reduction="sum"),
            target,
            summed=True,
            rows=rows,
        )
        gradients = torch.autograd.grad(loss, leaves)
    assert products.rows == bound
    if bound < 40:
        assert loss.isnan() and all(gradient.isnan().any() for gradient in gradients)
    else:
        expected = F.cross_entropy(F.linear(*leaves), target, reduction="sum")
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradients, torch.autograd.grad(expected, leaves))
