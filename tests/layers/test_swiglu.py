"""silu(gate) * up in one pass, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.each_instruction_set import printed_by_each
from support.numerics import assert_no_worse
from support.unneeded import Unneeded
from torch import Tensor

from fastft import _native
from fastft.layers import swiglu as room
from fastft.layers.swiglu import BACKWARD, FORWARD, swiglu, takes

DTYPES = [torch.float32, torch.bfloat16]
SIZES = [(1,), (7,), (63,), (3, 507), (4, 4096), (5, 4097), (2, 3, 5000)]
INF, NAN = torch.inf, torch.nan
needs_kernel = pytest.mark.skipif(bool(_native.missing("cpu")), reason="not built")


def operands(*shape: int, dtype: torch.dtype, count: int = 3, size: float = 3.0) -> list[Tensor]:
    torch.manual_seed(0)
    return [(torch.randn(*shape) * size).to(dtype) for _ in range(count)]


def unfilled(like: Tensor, count: int) -> list[Tensor]:
    return [torch.full_like(like, torch.nan) for _ in range(count)]


def plain(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def of_plain(gate: Tensor, up: Tensor, grad: Tensor) -> list[Tensor]:
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    y = plain(gate, up)
    return [y, *torch.autograd.grad(y, (gate, up), grad)]


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("size", [0.01, 3.0, 200.0])
def test_it_is_no_further_from_float64_than_torch(shape, dtype, size):
    gate, up, grad = operands(*shape, dtype=dtype, size=size)
    (out,), grads = unfilled(gate, 1), unfilled(gate, 2)
    FORWARD.native(out, gate, up)
    BACKWARD.native(*grads, grad, gate, up)
    exact = of_plain(gate.double(), up.double(), grad.double())
    names = ("y", "d gate", "d up")
    for name, ours, torchs, truth in zip(
        names, [out, *grads], of_plain(gate, up, grad), exact, strict=True
    ):
        assert_no_worse(ours, torchs, truth, name)


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_ends_of_the_range(dtype):
    """NaN and Inf come where torch has them, at every place in a register."""
    values = torch.tensor([0.0, -0.0, 1e-40, 20.0, -20.0, 87.5, -87.5, 200.0, -200.0, INF, -INF])
    values = torch.cat((values, torch.tensor([NAN, 3e38, -3e38]))).to(dtype)
    for shift in range(17):
        gate = values.roll(shift).repeat(3)
        up, grad = torch.full_like(gate, 0.5), torch.full_like(gate, -2.0)
        (out,), grads = unfilled(gate, 1), unfilled(gate, 2)
        FORWARD.native(out, gate, up)
        BACKWARD.native(*grads, grad, gate, up)
        for ours, torchs in zip([out, *grads], of_plain(gate, up, grad), strict=True):
            torch.testing.assert_close(ours, torchs, equal_nan=True, rtol=1e-2, atol=1e-35)


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_element_has_the_same_bits_wherever_it_lies(dtype):
    gate, up, grad = operands(70_001, dtype=dtype)
    whole, threads = None, torch.get_num_threads()
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        found = unfilled(gate, 3)
        FORWARD.native(found[0], gate, up)
        BACKWARD.native(*found[1:], grad, gate, up)
        whole = whole or found
        assert all(map(torch.equal, found, whole))
    torch.set_num_threads(threads)
    for begin, end in ((1, 18), (4095, 4098), (69_990, 70_001)):
        part = [each[begin:end] for each in (gate, up, grad)]
        found = unfilled(part[0], 3)
        FORWARD.native(found[0], *part[:2])
        BACKWARD.native(*found[1:], part[2], *part[:2])
        assert all(map(torch.equal, found, [each[begin:end] for each in whole]))


PROGRAM = """
import hashlib, torch
from fastft.layers.swiglu import BACKWARD, FORWARD
digest = hashlib.sha256()
for dtype in (torch.float32, torch.bfloat16):
    gate, up, grad = (torch.randn(10_007, generator=torch.Generator().manual_seed(seed))
                      .mul(30 if seed == 0 else 1).to(dtype) for seed in range(3))
    found = [torch.empty_like(gate) for _ in range(3)]
    FORWARD.native(found[0], gate, up)
    BACKWARD.native(*found[1:], grad, gate, up)
    for each in found:
        digest.update(each.view(torch.int16).numpy().tobytes())
print(digest.hexdigest())
"""


@needs_kernel
def test_every_instruction_set_has_the_same_bits():
    assert len({*printed_by_each(PROGRAM).values()}) == 1


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_the_references(dtype):
    gate, up, grad = operands(3, 50, dtype=dtype)
    found = unfilled(gate, 3)
    FORWARD.reference(found[0], gate, up)
    BACKWARD.reference(*found[1:], grad, gate, up)
    exact = of_plain(gate.double(), up.double(), grad.double())
    for ours, torchs, truth in zip(found, of_plain(gate, up, grad), exact, strict=True):
        assert_no_worse(ours, torchs, truth)


@needs_kernel
def test_nothing_to_compute():
    gate, up = torch.empty(0, 7, requires_grad=True), torch.empty(0, 7, requires_grad=True)
    y = swiglu(gate, up)
    y.sum().backward()
    assert y.shape == gate.grad.shape == up.grad.shape == (0, 7)


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autograd_and_what_does_not_lie_in_order(dtype):
    gate, up, grad = operands(40, 30, dtype=dtype)
    gate, up = gate.T.requires_grad_(), up.T.requires_grad_()
    y = swiglu(gate, up)
    found = [y, *torch.autograd.grad(y, (gate, up), grad.T)]
    exact = of_plain(gate.double(), up.double(), grad.T.double())
    for ours, torchs, truth in zip(found, of_plain(gate, up, grad.T), exact, strict=True):
        assert ours.dtype == dtype
        assert_no_worse(ours, torchs, truth)
    (expanded,) = torch.autograd.grad(swiglu(gate, up).sum(), up)
    torch.testing.assert_close(expanded, F.silu(gate.detach()), rtol=1e-2, atol=1e-5)


@needs_kernel
@pytest.mark.parametrize("trained", ["gate", "up"])
def test_who_needs_no_gradient_gets_none(trained):
    gate, up, grad = operands(30, dtype=torch.float32)
    (gate if trained == "gate" else up).requires_grad_()
    swiglu(gate, up).backward(grad)
    assert (gate.grad is None) == (trained == "up") and (up.grad is None) == (trained == "gate")


@needs_kernel
def test_gradients_have_gradients_and_may_be_many():
    gate, up, grad = (each.requires_grad_() for each in operands(4, 5, dtype=torch.float32))
    found = []
    for function in (swiglu, plain):
        first = torch.autograd.grad(function(gate, up), (gate, up), grad, create_graph=True)
        second = torch.autograd.grad(sum(each.pow(2).sum() for each in first), (gate, up, grad))
        many = torch.autograd.grad(
            function(gate, up), (gate, up), torch.eye(20).view(20, 4, 5), is_grads_batched=True
        )
        found.append((*first, *second, *many))
    torch.testing.assert_close(*found)
    assert torch.autograd.gradcheck(
        lambda a, b: room._gradients(grad.double(), a, b),
        [each.double().detach().requires_grad_() for each in (gate, up)],
    )


@needs_kernel
def test_a_result_that_nobody_needs():
    gate, up, _ = (each.requires_grad_() for each in operands(9, dtype=torch.float32))

    y = Unneeded.apply(swiglu(gate, up)).sum()
    assert torch.autograd.grad(y, (gate, up), allow_unused=True) == (None, None)


@needs_kernel
def test_hooks_may_give_saved_tensors_back_in_other_ways():
    gate, up, grad = (each.requires_grad_() for each in operands(6, 8, dtype=torch.float32))
    expected = torch.autograd.grad(plain(gate, up), (gate, up), grad)
    for pack, unpack in (
        (lambda kept: kept.mT.contiguous(), lambda kept: kept.mT),
        (lambda kept: kept.double(), lambda kept: kept),
    ):
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            y = swiglu(gate, up)
        found = torch.autograd.grad(y, (gate, up), grad)
        torch.testing.assert_close([each.float() for each in found], [*expected])


@needs_kernel
def test_backward_twice_and_operands_that_have_changed():
    gate, up, grad = operands(50, dtype=torch.float32)
    gate.requires_grad_()
    y = swiglu(gate, up)
    twice = [torch.autograd.grad(y, gate, grad, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*twice)
    up.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(grad)


def test_which_tensors_it_takes():
    def of(*shape, **options):
        return torch.empty(*shape, **options)

    assert takes(of(8, 4096), of(8, 4096))
    assert takes(of(8, 4096, dtype=torch.bfloat16))
    assert not takes(of(4, 4096)) and not takes(of(8, 4096, dtype=torch.float16))
    assert not takes(of(8, 4096, device="meta")) and not takes(of(8, 4096).to_mkldnn())
    assert not takes(torch.nn.Parameter(of(8, 4096)))
    assert not takes(of(8, 4096), of(4096, 8))
    assert not takes(of(8, 4096), of(8, 4096, dtype=torch.bfloat16))
    with torch.overrides.BaseTorchFunctionMode():
        assert not takes(of(8, 4096))


HALF, SHORT, LEFT = torch.empty(4).half(), torch.empty(3), torch.empty(4, 4).T


@needs_kernel
@pytest.mark.parametrize(
    ("out", "gate", "up", "message"),
    [
        (HALF, HALF, HALF, "gate must be float32 or bfloat16"),
        (torch.empty(4), torch.empty(4), SHORT, "up must be contiguous"),
        (torch.empty(4), torch.empty(4), torch.empty(4).bfloat16(), "up must be contiguous"),
        (SHORT, torch.empty(4), torch.empty(4), "out must be contiguous"),
        (torch.empty(4, 4), LEFT, torch.empty(4, 4), "gate must be contiguous"),
    ],
)
def test_what_does_not_fit_is_refused(out, gate, up, message):
    with pytest.raises(RuntimeError, match=message):
        FORWARD.native(out, gate, up)
    message = message.replace("out", "grad_gate")
    with pytest.raises(RuntimeError, match=message):
        BACKWARD.native(out, *(torch.empty(gate.shape, dtype=gate.dtype) for _ in "ab"), gate, up)
