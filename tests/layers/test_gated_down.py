"""A gated unit's last layer, whose input backward makes again, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.numerics import assert_no_worse
from support.unneeded import Unneeded
from torch import Tensor

from fastft import _native
from fastft.layers.gated_down import gated_down
from fastft.layers.swiglu import swiglu

pytestmark = pytest.mark.skipif(_native.missing("cpu") is not None, reason="not built")
DTYPES = [torch.float32, torch.bfloat16]


def ours(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    return gated_down(gate, up, weight, torch.mm)


def plain(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    return F.linear(F.silu(gate) * up, weight)


def operands(*shape: int, width: int = 5, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Gate, up, weight and the gradient of the result."""
    torch.manual_seed(0)
    sizes = [shape, shape, (width, shape[-1]), (*shape[:-1], width)]
    return [torch.randn(size).to(dtype) for size in sizes]


def trained(operands: list[Tensor], function=ours) -> list[Tensor]:
    *inputs, grad = operands
    inputs = [each.detach().requires_grad_() for each in inputs]
    z = function(*inputs)
    return [z, *torch.autograd.grad(z, inputs, grad)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 63), (2, 3, 507), (65, 130)], ids=str)
def test_it_is_no_further_from_float64_than_torch(shape, dtype):
    given = operands(*shape, width=33, dtype=dtype)
    exact = trained([each.double() for each in given], plain)
    names = ("z", "d gate", "d up", "d weight")
    for name, found, torchs, truth in zip(
        names, trained(given), trained(given, plain), exact, strict=True
    ):
        assert found.dtype == dtype and found.shape == truth.shape
        assert_no_worse(found, torchs, truth, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_are_those_of_a_layer_that_keeps_its_input(dtype):
    given = operands(40, 70, dtype=dtype)

    def keeping(gate, up, weight):
        return torch.mm(swiglu(gate, up), weight.T)

    assert all(map(torch.equal, trained(given), trained(given, keeping)))


def test_what_is_kept():
    """The gate, the up and the weight, by address; nothing of the size of the unit's result."""
    gate, up, weight, _ = (each.requires_grad_() for each in operands(30, 64))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours(gate, up, weight)
    assert {each.data_ptr() for each in kept} == {each.data_ptr() for each in (gate, up, weight)}


@pytest.mark.parametrize("trains", ["gate", "up", "weight"])
def test_who_needs_no_gradient_gets_none(trains):
    names = ("gate", "up", "weight")
    *inputs, grad = operands(9, 4)
    for name, each in zip(names, inputs, strict=True):
        each.requires_grad_(name == trains)
    ours(*inputs).backward(grad)
    assert [each.grad is not None for each in inputs] == [name == trains for name in names]


def test_gradients_have_gradients_and_may_be_many():
    found = []
    for function in (ours, plain):
        *inputs, grad = (each.requires_grad_() for each in operands(4, 3, width=2))
        first = torch.autograd.grad(function(*inputs), inputs, grad, create_graph=True)
        second = torch.autograd.grad(sum(each.pow(2).sum() for each in first), [*inputs, grad])
        many = torch.autograd.grad(
            function(*inputs), inputs, torch.eye(8).view(8, 4, 2), is_grads_batched=True
        )
        found.append((*first, *second, *many))
    torch.testing.assert_close(*found)


def test_a_result_that_nobody_needs():
    *inputs, _ = (each.requires_grad_() for each in operands(4, 3))
    y = Unneeded.apply(ours(*inputs)).sum()
    assert torch.autograd.grad(y, inputs, allow_unused=True) == (None, None, None)


@pytest.mark.parametrize("place", range(3), ids=["gate", "up", "weight"])
def test_operands_that_have_changed(place):
    *inputs, grad = operands(4, 3)
    inputs[place - 1].requires_grad_()
    z = ours(*inputs)
    inputs[place].data.add_(0)  # torch counts no change here
    inputs[place].detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.backward(grad)


def test_a_weight_that_is_given_other_memory_is_the_one_of_the_forward_pass():
    """As with `F.linear`, which keeps a view of it."""
    found = []
    for function in (ours, plain):
        *inputs, grad = (each.requires_grad_() for each in operands(4, 3))
        z = function(*inputs)
        inputs[2].data = torch.zeros_like(inputs[2])
        z.backward(grad)
        found.append([each.grad for each in inputs])
    torch.testing.assert_close(*found)


def test_hooks_may_give_saved_tensors_back_in_other_ways():
    given = operands(6, 8)
    expected = trained(given, plain)
    for pack, unpack in (
        (lambda kept: kept.mT.contiguous(), lambda kept: kept.mT),
        (lambda kept: kept.double(), lambda kept: kept),
    ):
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            found = trained(given)
        torch.testing.assert_close([each.float() for each in found], expected)


def test_what_does_not_lie_in_order_and_a_result_that_is_written_to():
    gate, up, weight, grad = operands(6, 8)
    laid = [gate.T.contiguous().T, up.T.contiguous().T, weight.T.contiguous().T, grad]
    for found, expected in zip(trained(laid), trained([gate, up, weight, grad]), strict=True):
        torch.testing.assert_close(found, expected)
    gate.requires_grad_()
    ours(gate, up, weight).add_(1).mul_(2).sum().backward()
    assert gate.grad is not None


def test_nothing_to_compute():
    *inputs, grad = operands(0, 7)
    assert [tuple(each.shape) for each in trained([*inputs, grad])] == [
        (0, 5),
        (0, 7),
        (0, 7),
        (5, 7),
    ]
