"""A linear layer behind a norm, whose input backward makes again, against float64."""

from __future__ import annotations

import contextlib
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from support.kept_for_backward import kept_for
from support.numerics import assert_no_worse
from support.unneeded import Unneeded
from torch import Tensor

from fastft import _native
from fastft.layers.normed_linear import norm_of, normed_linear, remembered
from fastft.layers.rms_norm import rms_norm

pytestmark = pytest.mark.skipif(_native.missing("cpu") is not None, reason="not built")
DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-6
NAMES = ("x", "scale", "weight", "bias")


def ours(x: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = remembered(x, scale, EPS, 1.0)
    return normed_linear(y, weight, bias, norm_of(y), torch.mm)


def keeping(x: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(rms_norm(x, scale, EPS, 1.0), weight, bias)


def plain(x: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    return F.linear(((scale.to(wide.dtype) + 1) * normal).to(x.dtype), weight, bias)


def operands(
    *shape: int, width: int = 5, dtype: torch.dtype = torch.float32, bias: bool = True
) -> list[Tensor]:
    """What the norm takes, the layer's weight and bias, and the gradient of the result."""
    torch.manual_seed(0)
    sizes = [shape, shape[-1:], (width, shape[-1]), *[(width,)] * bias, (*shape[:-1], width)]
    return [torch.randn(size).to(dtype) for size in sizes]


def trained(operands: list[Tensor], function=ours) -> list[Tensor]:
    *inputs, grad = operands
    inputs = [each.detach().requires_grad_() for each in inputs]
    z = function(*inputs)
    return [z, *torch.autograd.grad(z, inputs, grad)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 5), (7, 63), (2, 3, 507), (65, 130)], ids=str)
def test_it_is_no_further_from_float64_than_torch(shape, dtype, bias):
    given = operands(*shape, width=33, dtype=dtype, bias=bias)
    exact = trained([each.double() for each in given], plain)
    for name, found, torchs, truth in zip(
        ("z", *NAMES), trained(given), trained(given, plain), exact, strict=False
    ):
        assert found.dtype == dtype and found.shape == truth.shape
        assert_no_worse(found, torchs, truth, name)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_are_those_of_a_layer_that_keeps_its_input(dtype, bias):
    given = operands(40, 70, dtype=dtype, bias=bias)
    assert all(map(torch.equal, trained(given), trained(given, keeping)))


def test_what_is_kept():
    """By address: what the norm takes and the weights, nothing of the norm's result."""
    *inputs, _ = (each.requires_grad_() for each in operands(30, 64))
    z, rstd = ours(*inputs), 30
    places = {each.data_ptr() for each in kept_for(z) if each.numel() != rstd}
    assert places == {each.data_ptr() for each in inputs[:3]}


def test_layers_that_share_a_result_and_nobody_keeps_it():
    x, scale, weight, _ = (each.requires_grad_() for each in operands(9, 8, width=8, bias=False))
    y = remembered(x, scale, EPS, 1.0)
    results = [normed_linear(y, weight, None, norm_of(y), torch.mm) for _ in range(3)]
    gone = weakref.ref(y)
    del y
    assert gone() is None
    torch.cat(results).square().sum().backward()
    found = [each.grad.clone() for each in (x, scale, weight)]
    for each in (x, scale, weight):
        each.grad = None
    torch.cat([plain(x, scale, weight) for _ in range(3)]).square().sum().backward()
    expected = [each.grad for each in (x, scale, weight)]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_a_result_that_is_gone_holds_nothing():
    x, scale, *_ = operands(4, 8)
    y = remembered(x.requires_grad_(), scale, EPS, 0.0)
    assert norm_of(y) is not None
    gone = weakref.ref(x)
    del x, y
    gc.collect()
    assert gone() is None


def test_whoever_keeps_a_result_does_not_keep_what_it_was_made_of():
    x, scale, *_ = operands(4, 8)
    x = x.requires_grad_() + 1
    y = remembered(x, scale, EPS, 0.0)
    y.sum().backward()
    gone = weakref.ref(x)
    del x
    gc.collect()
    assert gone() is None and norm_of(y) is None


def _written_to(y, x, scale):
    with torch.no_grad():
        y.mul_(2)


def _whose_input_is_written_to(y, x, scale):
    with torch.no_grad():
        x.mul_(2)


def _whose_weight_is_written_to(y, x, scale):
    with torch.no_grad():
        scale.mul_(2)


def _that_lies_elsewhere(y, x, scale):
    y.data = y.detach() * 2


def _whose_last_row_is_written_to_uncounted(y, x, scale):
    y.data[-1] += 1


def _of_another_dtype(y, x, scale):
    y.data = y.detach()[:, :3].half()


def _detached(y, x, scale):
    y.detach_()


def _turned(y, x, scale):
    y.transpose_(0, 1)


def _reshaped(y, x, scale):
    y.unsqueeze_(0)


@pytest.mark.parametrize(
    "change",
    [
        _written_to,
        _whose_input_is_written_to,
        _whose_weight_is_written_to,
        _that_lies_elsewhere,
        _whose_last_row_is_written_to_uncounted,
        _of_another_dtype,
        _detached,
        _turned,
        _reshaped,
    ],
)
def test_a_result_of_which_something_has_become_is_no_longer_known(change):
    x, scale, *_ = operands(8, 8)
    x.requires_grad_()
    y = remembered(x, scale, EPS, 0.0)
    assert norm_of(y) is not None
    change(y, x, scale)
    assert norm_of(y) is None


def test_other_tensors_are_not_known():
    x, scale, *_ = (each.requires_grad_() for each in operands(4, 8))
    y = remembered(x, scale, EPS, 0.0)
    others = [x, y.view(2, 2, 8), y.detach(), y + 0, y[:2], torch.nn.Parameter(y.detach()), "y"]
    assert [norm_of(each) for each in others] == [None] * len(others)


@pytest.mark.parametrize(
    "trains", [("x",), ("scale",), ("x", "weight"), ("scale", "bias")], ids=str
)
def test_who_needs_no_gradient_gets_none(trains):
    *inputs, grad = operands(9, 4)
    for name, each in zip(NAMES, inputs, strict=True):
        each.requires_grad_(name in trains)
    ours(*inputs).backward(grad)
    assert [each.grad is not None for each in inputs] == [name in trains for name in NAMES]


def test_gradients_have_gradients_and_may_be_many():
    found = []
    for function in (ours, plain):
        *inputs, grad = (each.requires_grad_() for each in operands(4, 3, width=2))
        first = torch.autograd.grad(function(*inputs), inputs, grad, create_graph=True)
        second = torch.autograd.grad(
            sum(each.pow(2).sum() for each in first), [*inputs, grad], allow_unused=True
        )
        many = torch.autograd.grad(
            function(*inputs), inputs, torch.eye(8).view(8, 4, 2), is_grads_batched=True
        )
        found.append((*first, *second[:3], second[-1], *many))
    torch.testing.assert_close(*found)


def test_a_result_that_nobody_needs():
    *inputs, _ = (each.requires_grad_() for each in operands(4, 3))
    z = Unneeded.apply(ours(*inputs)).sum()
    assert torch.autograd.grad(z, inputs, allow_unused=True) == (None,) * 4


@pytest.mark.parametrize("place", range(3), ids=NAMES[:3])
def test_operands_that_have_changed(place):
    *inputs, grad = operands(4, 3)
    for other in {0, 1, 2} - {place}:
        inputs[other].requires_grad_()
    z = ours(*inputs)
    inputs[place].detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.backward(grad)


@pytest.mark.parametrize("place", [0, 1], ids=NAMES[:2])
def test_operands_that_have_changed_where_torch_does_not_count_it(place):
    *inputs, grad = (each.requires_grad_() for each in operands(4, 3))
    z = ours(*inputs)
    inputs[place].data.add_(1)
    with pytest.raises(RuntimeError, match=r"between forward and backward somebody has written"):
        torch.autograd.grad(z, inputs[2], grad)


@pytest.mark.parametrize("place", range(3), ids=NAMES[:3])
def test_operands_that_are_given_other_memory_are_those_of_the_forward_pass(place):
    """As with `F.linear`, which keeps a view of its weight, and what it was given."""
    found = []
    for function in (ours, keeping):
        *inputs, grad = (each.requires_grad_() for each in operands(4, 3))
        z = function(*inputs)
        inputs[place].data = torch.zeros_like(inputs[place])
        found.append(torch.autograd.grad(z, inputs, grad))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("hooked", [remembered, normed_linear])
def test_hooks_that_compress_what_is_kept_are_asked_for(hooked):
    """Where they see what a norm keeps, layers keep their own; else it is made of their numbers."""
    x, scale, weight, _, grad = operands(6, 8)
    weight.requires_grad_(), x.requires_grad_()
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t.bfloat16(), lambda t: t.float())
    with hooks if hooked is remembered else contextlib.nullcontext():
        y = remembered(x, scale, EPS, 1.0)
    assert (norm_of(y) is None) == (hooked is remembered)
    if hooked is normed_linear:
        with hooks:
            z = normed_linear(y, weight, None, norm_of(y), torch.mm)
        (found,) = torch.autograd.grad(z, weight, grad)
        kept = rms_norm(x.bfloat16().float(), scale.bfloat16().float(), EPS, 1.0)
        torch.testing.assert_close(found, grad.T @ kept)


@pytest.mark.parametrize(
    "pack, unpack",
    [
        (lambda kept: kept.T.contiguous(), lambda kept: kept.T),
        (lambda kept: kept.double(), lambda kept: kept),
    ],
    ids=["turned", "wider"],
)
@pytest.mark.filterwarnings("ignore:The use of .*T.* on tensors of dimension other than 2")
def test_hooks_may_give_saved_tensors_back_in_other_ways(pack, unpack):
    given = operands(6, 8)

    def hooked(x, scale, weight, bias):
        y = remembered(x, scale, EPS, 1.0)
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return normed_linear(y, weight, bias, norm_of(y), torch.mm)

    found = trained(given, hooked)
    torch.testing.assert_close([each.float() for each in found], trained(given, plain))


def test_what_does_not_lie_in_order_and_a_result_that_is_written_to():
    x, scale, weight, bias, grad = operands(6, 8)
    laid = [x.T.contiguous().T, scale, weight.T.contiguous().T, bias, grad]
    for found, expected in zip(trained(laid), trained([x, scale, weight, bias, grad]), strict=True):
        torch.testing.assert_close(found, expected)
    x.requires_grad_()
    ours(x, scale, weight, bias).add_(1).mul_(2).sum().backward()
    assert x.grad is not None
