"""Linear layers behind a norm of ours, in models: what they keep, and whose they are left."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from support.fused_trainings import WAYS, trained_as_stock
from support.kept_for_backward import kept_for
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fastft import _native
from fastft.integrations import linear_products
from fastft.integrations import norms as norms_module
from fastft.integrations.fused_loss import FusedLossCallback
from fastft.integrations.linear_products import use_own_layers
from fastft.integrations.norms import use_own_norms
from fastft.layers import matrix_product
from fastft.layers import rms_norm as room

pytestmark = pytest.mark.skipif(
    _native.missing("cpu") is not None, reason="there is no library for CPUs"
)


@pytest.fixture
def made_again(monkeypatch):
    """The layers whose input is made again; norms and products have our kernels, small ones
    too."""
    monkeypatch.setattr(norms_module, "is_ahead", lambda: True)
    monkeypatch.setattr(linear_products, "is_ahead", lambda: True)
    monkeypatch.setattr(room, "LEAST", 1)
    monkeypatch.setattr(matrix_product, "LEAST", 4)
    monkeypatch.setattr(linear_products, "LEAST_WORK", 1)
    found, real = [], linear_products.normed_linear
    monkeypatch.setattr(
        linear_products, "normed_linear", lambda *all: found.append(1) or real(*all)
    )
    return found


class Block(nn.Module):
    """As in a decoder: nobody holds the norm's result when its layers are done."""

    def __init__(self, bias=True):
        super().__init__()
        torch.manual_seed(3)
        self.norm = LlamaRMSNorm(48)
        self.layers = nn.ModuleList(nn.Linear(48, 24, bias=bias) for _ in range(3))
        nn.init.normal_(self.norm.weight)

    def forward(self, x):
        y = self.norm(x)
        return torch.cat([layer(y) for layer in self.layers], -1)


def inputs(dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(3, 11, 48).to(dtype).requires_grad_()


@contextlib.contextmanager
def own(block, products=True):
    with contextlib.ExitStack() as stack:
        assert use_own_norms(block, stack) is not None
        yield use_own_layers(block, stack, products=products, norms=True)


def trained(block, x):
    """Result and gradients, and how many numbers of activations autograd has kept besides x and the
    roots of its rows."""
    z = block(x)
    kept = {each.data_ptr(): each.numel() for each in kept_for(z)}
    z.square().sum().backward()
    found = [z.detach(), x.grad, *(p.grad for p in block.parameters() if p.requires_grad)]
    x.grad = None
    block.zero_grad()
    of_model = {each.data_ptr() for each in (*block.parameters(), x)}
    sizes = [size for place, size in kept.items() if place not in of_model]
    return found, sum(size for size in sizes if size >= x.numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("products", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_norms_result_is_not_kept(bias, products, dtype, made_again):
    block, x = Block(bias).to(dtype), inputs(dtype)
    expected, kept = trained(block, x)
    assert kept >= x.numel()
    with own(block, products) as used:
        found, kept = trained(block, x)
    tolerance = {"rtol": 2e-2, "atol": 0.5} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(found, expected, **tolerance)
    assert kept == 0 and len(made_again) == 3
    assert len(used) == 3 * (products and dtype == torch.float32)
    assert all("forward" not in vars(module) for module in block.modules())


def _whose_weights_are_frozen(block, monkeypatch):
    block.layers.requires_grad_(False)


def _with_a_hook_on_the_norm(block, monkeypatch):
    block.norm.register_forward_hook(lambda module, args, y: y.data.mul_(2))


def _with_a_hook_before_each_layer(block, monkeypatch):
    for layer in block.layers:
        layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def _whose_layers_write_uncounted(block, monkeypatch):
    def write(module, args):
        args[0].data.clamp_(-1, 1)

    block.layers[0].register_forward_pre_hook(write)


def _with_layers_that_somebody_has_replaced(block, monkeypatch):
    real = F.linear
    monkeypatch.setattr(F, "linear", lambda x, weight, bias=None: real(x, weight, bias) * 2)


def _with_subclasses(block, monkeypatch):
    class Other(nn.Linear):
        pass

    for layer in block.layers:
        layer.__class__ = Other


def _that_writes_to_the_result(block, monkeypatch):
    block.norm = nn.Sequential(block.norm, nn.Hardtanh(-1, 1, inplace=True))


@pytest.mark.parametrize(
    "change",
    [
        _whose_weights_are_frozen,
        _with_a_hook_on_the_norm,
        _with_a_hook_before_each_layer,
        _whose_layers_write_uncounted,
        _with_layers_that_somebody_has_replaced,
        _with_subclasses,
        _that_writes_to_the_result,
    ],
)
def test_what_is_more_than_a_layer_behind_a_norm_is_left_alone(change, made_again, monkeypatch):
    block, x = Block(), inputs()
    change(block, monkeypatch)
    expected, _ = trained(block, x)
    with own(block):
        found, _ = trained(block, x)
    torch.testing.assert_close(found, expected)
    assert not made_again


def test_under_autocast_and_without_gradients_layers_are_torchs(made_again):
    block, x = Block(), inputs()
    with own(block):
        with torch.no_grad():
            block(x)
        with torch.autocast("cpu", torch.bfloat16):
            block(x).sum().backward()
        torch.func.jacfwd(block)(x)
    assert not made_again


def test_compilers_and_exports_see_the_layers_operations(made_again):
    block, x = Block(), inputs()
    expected = block(x)
    with own(block):
        for module, given in ((block, x), (block.layers[0], x)):
            compiled = torch.compile(module, backend="eager", fullgraph=True)
            torch.testing.assert_close(compiled(given), module(given))
            exported = torch.export.export(module, (given.detach(),), strict=True).module()
            torch.testing.assert_close(exported(given), module(given))
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(
    "hooks",
    [
        contextlib.nullcontext(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t),
    ],
    ids=["no hooks", "hooks"],
)
def test_checkpoints_around_layers_or_the_norm_as_well(reentrant, inside, hooks, made_again):
    block, x = Block(), inputs()
    expected, _ = trained(block, x)

    def layers(y):
        return torch.cat([layer(y) for layer in block.layers], -1)

    def checkpointed(x):
        with hooks:
            if inside:
                return checkpoint(lambda x: layers(block.norm(x)), x, use_reentrant=reentrant)
            return checkpoint(layers, block.norm(x), use_reentrant=reentrant)

    with own(block):
        checkpointed(x).square().sum().backward()
    found = [x.grad, *(p.grad for p in block.parameters())]
    torch.testing.assert_close(found, expected[1:])


def test_without_norms_and_products_no_layer_is_touched():
    block = Block()
    with contextlib.ExitStack() as stack:
        use_own_layers(block, stack, products=False, norms=False)
        assert all("forward" not in vars(module) for module in block.modules())


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("linear", [None, False])
@pytest.mark.parametrize("way", WAYS)
def test_a_training_has_stocks_losses(way, linear, made_again, tmp_path):
    callback = FusedLossCallback(linear=linear)
    trained_as_stock(tmp_path, way, callback)
    # without reentrance hooks are given what is kept, and one layer's alone at a time
    assert bool(made_again) == (way != "checkpointing")
    assert bool(callback.linear_layers) == (linear is None)


def test_a_training_without_our_norms_keeps_what_torch_keeps(made_again, tmp_path):
    trained_as_stock(tmp_path, "plain", FusedLossCallback(rms_norm=False))
    assert not made_again
