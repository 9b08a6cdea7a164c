"""Linear layers by our own product: F.linear's numbers and gradients, or F.linear itself."""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from support.fused_trainings import arguments, examples, llama, train
from support.unneeded import Unneeded
from torch import nn
from torch.autograd import forward_ad
from torch.overrides import BaseTorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer

import fastft
from fastft import _native
from fastft.integrations import fused_loss as fused_loss_module
from fastft.integrations import linear_products
from fastft.integrations.fused_loss import FusedLossCallback
from fastft.integrations.linear_products import linear, use_own_layers
from fastft.layers import matrix_product

needs_kernel = pytest.mark.skipif(
    _native.missing("cpu") is not None, reason="there is no library for CPUs"
)


@pytest.fixture
def faster(monkeypatch):
    """As on a processor that MKL does not use, for the smallest products too."""
    monkeypatch.setattr(linear_products, "is_ahead", lambda: True)
    monkeypatch.setattr(matrix_product, "LEAST", 4)
    monkeypatch.setattr(linear_products, "LEAST_WORK", 1)


@pytest.fixture
def products(monkeypatch):
    """The layers' products."""
    asked, times = [], linear_products._times

    def counting(*operands):
        asked.append(1)
        return times(*operands)

    monkeypatch.setattr(linear_products, "_times", counting)
    return asked


def tensors(shape, features, outputs, bias):
    torch.manual_seed(0)
    made = [torch.randn(*shape, features), torch.randn(outputs, features)]
    made += [torch.randn(outputs)] if bias else []
    return [tensor.requires_grad_() for tensor in made]


@needs_kernel
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
    shape, features, outputs, bias, faster
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


@needs_kernel
def test_gradients_have_gradients_and_take_what_is_expanded_or_transposed():
    x, weight = tensors((12,), 6, 9, False)
    found = []
    for function in (linear, F.linear):
        y = function(x.mT.contiguous().mT, weight)
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.pow(2).sum(), weight)[0])
    torch.testing.assert_close(*found)


@needs_kernel
def test_batches_of_gradients_and_forward_mode_are_torchs(faster, products):
    x, weight, bias = tensors((12,), 6, 9, True)
    layer = nn.Linear(6, 9)
    layer.weight.data, layer.bias.data = weight.data, bias.data
    expected = torch.autograd.functional.jacobian(layer, x)

    def tangent():
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x))).tangent

    expected_tangent = tangent()
    with contextlib.ExitStack() as stack:
        used = use_own_layers(nn.Sequential(layer), stack)
        y = layer(x)
        assert products and used == {id(layer)}
        (rows,) = torch.autograd.grad(
            y, x, torch.eye(y.numel()).view(-1, *y.shape), is_grads_batched=True
        )
        torch.testing.assert_close(rows.view(expected.shape), expected)
        torch.testing.assert_close(tangent(), expected_tangent)


@needs_kernel
def test_a_weight_that_nobody_needs_has_no_gradient_as_in_torch(faster, products):
    x, weight = tensors((12,), 6, 9, False)
    for function in (linear, F.linear):
        y = function(x, weight)
        found = torch.autograd.grad(Unneeded.apply(y).sum(), (x, weight), allow_unused=True)
        assert found == (None, None)
    assert products == [1]


@needs_kernel
def test_backward_under_autocast_is_torchs(faster, products):
    x, weight = tensors((12,), 64, 9, False)
    found = []
    for function in (linear, F.linear):
        y = function(x, weight).pow(2).sum()
        with torch.autocast("cpu", torch.bfloat16):
            found.append(torch.autograd.grad(y, (x, weight)))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)
    assert products == [1]


@needs_kernel
def test_only_dense_inputs_are_its(faster, products):
    layer, dense = nn.Linear(8, 8), torch.randn(16, 8)
    nested = torch.nested.nested_tensor([dense, dense[:3]])
    of_inputs = [dense.to_sparse(), dense.to_sparse_csr(), dense.to_mkldnn(), nested]
    with torch.no_grad():
        expected = [layer(x) for x in of_inputs]
        with contextlib.ExitStack() as stack:
            used = use_own_layers(nn.Sequential(layer), stack)
            found = [layer(x) for x in of_inputs]
        layer.weight = None
        use_own_layers(nn.Sequential(layer), stack)
    assert not products and not used and "forward" not in vars(layer)
    assert [y.layout for y in found] == [y.layout for y in expected]


@needs_kernel
def test_a_layer_that_becomes_another_in_the_middle_of_a_training_is_that_one(faster, products):
    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    layer, x = nn.Linear(8, 8), torch.randn(16, 8)
    with contextlib.ExitStack() as stack:
        use_own_layers(nn.Sequential(layer), stack)
        before = layer(x)
        assert len(products) == 1
        layer.__class__ = Doubled
        torch.testing.assert_close(layer(x), 2 * before)
    assert len(products) == 1


@needs_kernel
def test_only_plain_fp32_products_of_enough_rows_are_its(faster, products, monkeypatch):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8, bias=False))
    x = torch.randn(16, 8)
    expected = model(x)
    with contextlib.ExitStack() as stack:
        used = use_own_layers(model, stack)
        torch.testing.assert_close(model(x), expected)
        assert len(products) == 2 and used == {id(model[0]), id(model[2])}
        for context in (
            torch.autocast("cpu", torch.bfloat16),
            FlopCounterMode(display=False),
            BaseTorchFunctionMode(),
        ):
            with context:
                model(x)
        model(x[:2])
        monkeypatch.setattr(linear_products, "LEAST_WORK", 2000)
        model(x)
        monkeypatch.setattr(linear_products, "LEAST_WORK", 1)
        torch.func.jacfwd(model)(x)
        torch.func.vmap(torch.func.grad(lambda rows: model(rows).sum()))(x.expand(3, 16, 8))
        assert len(products) == 2 and not linear_products._large_layers(model)
        with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied|size"):
            model(torch.randn(16, 9))
        model.to(torch.bfloat16)(x.bfloat16())
        assert len(products) == 2
    assert all("forward" not in vars(layer) for layer in model)


def _replica(layer):
    replica = layer._replicate_for_data_parallel()
    replica.weight, replica.bias = layer.weight, layer.bias
    return replica


def _pickled(layer):
    return pickle.loads(pickle.dumps(layer))


def _of_its_method(layer):
    return pickle.loads(pickle.dumps(layer.forward)).__self__


@needs_kernel
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, _pickled, _of_its_method, _replica])
def test_a_copy_of_a_layer_is_a_stock_one_with_weights_of_its_own(copied, faster, products):
    layer, x = nn.Linear(8, 8), torch.randn(16, 8)
    with contextlib.ExitStack() as stack:
        use_own_layers(nn.Sequential(layer), stack)
        made = copied(layer)
        torch.testing.assert_close(made(x), layer(x))
        made.weight = nn.Parameter(torch.zeros(8, 8))
        torch.testing.assert_close(made(x), made.bias.expand(16, 8))
        assert len(products) == 1 and type(made) is nn.Linear
        # of a training of its own
        assert linear_products._large_layers(nn.Sequential(layer, made)) == [made]
    assert vars(layer).keys() == vars(nn.Linear(8, 8)).keys()


@needs_kernel
def test_a_script_of_a_model_is_torchs(faster, products):
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.randn(16, 8)
    with contextlib.ExitStack() as stack:
        use_own_layers(model, stack)
        scripted = torch.jit.script(model)
        torch.testing.assert_close(scripted(x), model(x))
        assert len(products) == 1
    torch.testing.assert_close(scripted(x), model(x))


@needs_kernel
@pytest.mark.parametrize("own", [None, True, False])
@pytest.mark.parametrize("adapter", [False, True])
def test_a_training_has_stocks_losses_and_leaves_nothing(adapter, own, faster, products, tmp_path):
    def model():
        made = llama()
        if adapter:
            peft = pytest.importorskip("peft")
            torch.manual_seed(1)
            made = peft.get_peft_model(made, peft.LoraConfig(target_modules="all-linear"))
        return made

    stock, _, _ = train(tmp_path, model())
    callback, trained = FusedLossCallback(linear=own), model()
    fused, _, _ = train(tmp_path, trained, [callback])
    assert fused.losses == pytest.approx(stock.losses, rel=1e-6)
    assert bool(products) == (own is not False)
    count = sum(type(module) is nn.Linear for module in trained.modules()) - 1  # but the head
    assert callback.linear_layers == (0 if own is False else count)
    assert all("forward" not in vars(module) for module in trained.modules())


@needs_kernel
@pytest.mark.parametrize("case", ["device", "mode", "rows"])
@pytest.mark.parametrize("own", [None, True])
def test_it_counts_and_says_the_layers_that_had_products(
    own, case, faster, products, monkeypatch, tmp_path
):
    said = []
    for level in ("info", "warning"):
        monkeypatch.setattr(fused_loss_module.logger, level, said.append)
    if case == "rows":
        monkeypatch.setattr(linear_products, "LEAST_WORK", 1 << 60)
    model, callback = llama(), FusedLossCallback(linear=own)
    mode = {"device": torch.device("cpu"), "mode": BaseTorchFunctionMode()}
    with mode.get(case, contextlib.nullcontext()):
        train(tmp_path, model, [callback])
    count = 7 if case == "device" else 0
    assert callback.linear_layers == count and bool(products) == bool(count)
    told = [line for line in said if "linear layers multiply by fastft's kernel" in line]
    assert told == ([f"fastft: {count} linear layers multiply by fastft's kernel"] if count else [])
    assert any("linear=True did nothing" in line for line in said) == (own is True and not count)


@needs_kernel
def test_the_line_of_plug_names_it(faster, tmp_path):
    trainer = Trainer(llama(), arguments(tmp_path), train_dataset=examples())
    plugged = fastft.plug(trainer)
    trainer.train()
    assert plugged.lines["loss"] == "fused at lm_head; 7 linear layers by fastft's products"


@pytest.mark.parametrize("linear", [None, True])
@pytest.mark.parametrize(
    "change, reason",
    [
        ({"torch_compile": True, "torch_compile_backend": "eager"}, "torch.compile's"),
        ({}, "torch's products are as fast on this processor"),
    ],
)
def test_who_asks_for_nothing_is_told_so(change, reason, linear, monkeypatch, products, tmp_path):
    said = []
    monkeypatch.setattr(linear_products, "is_ahead", lambda: bool(change))
    monkeypatch.setattr(fused_loss_module.logger, "warning", said.append)
    callback = FusedLossCallback(linear=linear)
    train(tmp_path, llama(), [callback], **change)
    told = [line for line in said if "linear=True does nothing" in line and reason in line]
    assert bool(told) == (linear is True)
    assert callback.linear_layers == 0 and not products


@pytest.mark.parametrize("callbacks, loss", [([], False), ([FusedLossCallback], True)])
def test_plug_says_where_it_cannot_ask_for_it(callbacks, loss, tmp_path):
    trainer = Trainer(llama(), arguments(tmp_path), callbacks=[made() for made in callbacks])
    with pytest.raises(ValueError, match="linear=True needs loss=True"):
        fastft.plug(trainer, loss=loss, linear=True)
    fastft.plug(trainer, loss=loss).restore()
    with pytest.raises(TypeError, match="linear must be True or False, got 1"):
        fastft.plug(trainer, linear=1)


def test_it_is_a_switch():
    with pytest.raises(TypeError, match="linear must be True, False or None, got 'no'"):
        FusedLossCallback(linear="no")
