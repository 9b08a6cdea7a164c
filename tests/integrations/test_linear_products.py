"""Linear layers by oneDNN: F.linear's numbers and gradients, and stock's where it is not for us."""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from support.fused_trainings import llama, train
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastft.foreign import onednn
from fastft.integrations import fused_loss as fused_loss_module
from fastft.integrations.fused_loss import FusedLossCallback
from fastft.integrations.linear_products import linear, use_onednn

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch is built without oneDNN"
)


@pytest.fixture
def faster(monkeypatch):
    """As on a processor whose AVX-512 MKL does not use."""
    monkeypatch.setattr(onednn, "reason_against", lambda: None)


@pytest.fixture
def products(monkeypatch):
    """How often oneDNN is asked."""
    asked, product = [], onednn.product

    def counting(*operands):
        asked.append(1)
        return product(*operands)

    monkeypatch.setattr(onednn, "product", counting)
    return asked


def tensors(shape, features, outputs, bias):
    torch.manual_seed(0)
    made = [torch.randn(*shape, features), torch.randn(outputs, features)]
    made += [torch.randn(outputs)] if bias else []
    return [tensor.requires_grad_() for tensor in made]


@needs_onednn
@pytest.mark.parametrize(
    "shape, features, outputs, bias",
    [
        ((63,), 33, 17, True),
        ((3, 507), 64, 129, False),
        ((2, 9), 7, 1, True),
        ((1,), 5, 4097, True),
    ],
)
def test_results_and_gradients_are_no_further_from_float64_than_torch(
    shape, features, outputs, bias
):
    operands = tensors(shape, features, outputs, bias)
    upstream = torch.randn(*shape, outputs)
    results = []
    for function, dtype in ((linear, None), (F.linear, None), (F.linear, torch.float64)):
        with_dtype = [each.detach().to(dtype or each.dtype).requires_grad_() for each in operands]
        y = function(*with_dtype)
        results.append([y, *torch.autograd.grad(y, with_dtype, upstream.to(y.dtype))])
    for ours, torchs, exact in zip(*results, strict=True):
        assert ours.shape == exact.shape and ours.dtype == torch.float32
        limit = 2 * (torchs - exact).norm() + 1e-7 * exact.norm()
        assert (ours - exact).norm() <= limit


@needs_onednn
def test_gradients_have_gradients_and_take_what_is_expanded_or_transposed():
    x, weight = tensors((12,), 6, 9, False)
    found = []
    for function in (linear, F.linear):
        y = function(x.mT.contiguous().mT, weight)
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.pow(2).sum(), weight)[0])
    torch.testing.assert_close(*found)


@needs_onednn
def test_only_plain_fp32_products_of_enough_rows_are_its(faster, products):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8, bias=False))
    x = torch.randn(16, 8)
    expected = model(x)
    with contextlib.ExitStack() as stack:
        assert use_onednn(model, stack) == 2
        torch.testing.assert_close(model(x), expected)
        assert len(products) == 2
        for context in (
            torch.autocast("cpu", torch.bfloat16),
            FlopCounterMode(display=False),
            torch.device("cpu"),  # a mode of functions
        ):
            with context:
                model(x)
        model(x[:2])
        copy.deepcopy(model)(x)
        pickle.loads(pickle.dumps(model))(x)
        assert len(products) == 2
        with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied|size"):
            model(torch.randn(16, 9))
        model.to(torch.bfloat16)(x.bfloat16())
        assert len(products) == 2
    assert all("forward" not in vars(layer) for layer in model)


@needs_onednn
@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("adapter", [False, True])
def test_a_training_has_stocks_losses_and_leaves_nothing(
    adapter, onednn, faster, products, tmp_path
):
    def model():
        made = llama()
        if adapter:
            peft = pytest.importorskip("peft")
            torch.manual_seed(1)
            made = peft.get_peft_model(made, peft.LoraConfig(target_modules="all-linear"))
        return made

    stock, _, _ = train(tmp_path, model())
    callback, trained = FusedLossCallback(onednn=onednn), model()
    fused, _, _ = train(tmp_path, trained, [callback])
    assert fused.losses == pytest.approx(stock.losses, rel=1e-6)
    assert bool(products) == onednn
    count = sum(type(module) is nn.Linear for module in trained.modules()) - 1  # but the head
    assert callback.linear_layers == (count if onednn else 0)
    assert all("forward" not in vars(module) for module in trained.modules())


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"torch_compile": True, "torch_compile_backend": "eager"}, "torch.compile's"),
        ({}, "MKL has the same instructions"),
    ],
)
def test_who_asks_for_nothing_is_told_so(change, reason, monkeypatch, products, tmp_path):
    said = []
    why = None if change else "MKL has the same instructions"
    monkeypatch.setattr(onednn, "reason_against", lambda: why)
    monkeypatch.setattr(fused_loss_module.logger, "warning", said.append)
    callback = FusedLossCallback(onednn=True)
    train(tmp_path, llama(), [callback], **change)
    assert [line for line in said if "onednn=True does nothing" in line and reason in line]
    assert callback.linear_layers == 0 and not products


def test_it_is_a_switch():
    with pytest.raises(TypeError, match="onednn must be True or False, got 'no'"):
        FusedLossCallback(onednn="no")
