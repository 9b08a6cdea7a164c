"""The mode that lets CPU tensors behave as a GPU's, against what torch documents of GPUs."""

from __future__ import annotations

import contextlib

import numpy
import pytest
import torch
from support.device_mode import DeviceMode

import fastft
from fastft.loss.linear_rows import HEAD

VALUES = torch.linspace(-3, 3, 64)
SCALE = 1 / 8100  # which bf16 and fp16 have to round


@pytest.fixture
def mode():
    with DeviceMode() as entered:
        yield entered


def test_tensors_say_that_they_are_on_the_device_but_those_of_the_host(mode):
    x = VALUES * 1
    assert (
        x.device == torch.device("cuda", 0) and x.is_cuda and not x.is_cpu and x.get_device() == 0
    )
    of_host = torch.zeros(3)
    assert of_host.device.type == "cpu" and of_host.is_cpu and not of_host.is_cuda
    assert (of_host + 1).is_cpu and (x + 1).is_cuda and torch.zeros(3, device=x.device).is_cuda
    assert (
        x.new_zeros(2).is_cuda and torch.empty_like(of_host).is_cpu and x.view(8, 8)[2:].T.is_cuda
    )
    assert mode.host(VALUES.clone())[3:].is_cpu
    assert (
        torch.frombuffer(bytearray(8), dtype=torch.int64).is_cpu
        and torch.from_numpy(numpy.zeros(3)).is_cpu
    )
    assert mode.waits == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", ["mul", "div", "add", "sub", "mul_", "out", "addcmul", "where_by_a_mask"]
)
def test_a_scalar_of_the_device_takes_the_dtype_of_the_tensor(name, dtype):
    functions = {
        "mul": torch.mul,
        "div": torch.div,
        "add": torch.add,
        "sub": torch.sub,
        "mul_": lambda x, s: x.clone().mul_(s),
        "out": lambda x, s: torch.mul(
            x, s, out=torch.empty(x.shape, dtype=torch.float32, device=x.device)
        ),
        "addcmul": lambda x, s: x.clone().addcmul_(x, s),
        "where_by_a_mask": lambda x, s: torch.where(x > s, x, s),
    }
    x, scale = VALUES.to(dtype), torch.tensor(SCALE)
    expected = functions[name](x, scale.to(dtype).float())
    with DeviceMode() as mode:
        assert torch.equal(functions[name](x, scale), expected)
    assert mode.waits == [] or {wait.what for wait in mode.waits} == {"equal"}


def test_scalars_of_the_host_numbers_and_vectors_of_one_are_read_in_fp32(mode):
    x = VALUES.bfloat16()
    exact = (x.double() * SCALE).bfloat16()
    rounded = x * torch.tensor(SCALE, device=mode.device)
    for scale in (SCALE, torch.tensor(SCALE)):
        assert torch.equal(x * scale, exact)
    one = torch.full((1,), SCALE, device=mode.device)
    assert torch.equal(torch.mul(x, one, out=torch.empty_like(x)), exact)
    assert not torch.equal(rounded, exact)


def test_a_scalar_of_the_device_keeps_its_dtype_among_scalars(mode):
    total, count = VALUES.sum(), torch.full((), 3.0, device=mode.device)
    assert (total / count).dtype == torch.float32 and (
        total.double() * count
    ).dtype == torch.float64


@pytest.mark.parametrize("inside", [True, False])
def test_roundings_show_in_the_backward_pass_too(inside):
    x, scale, upstream = VALUES.bfloat16().requires_grad_(), torch.tensor(SCALE), VALUES.bfloat16()
    with DeviceMode() if inside else contextlib.nullcontext():
        (x * scale).backward(upstream)
    assert torch.equal(x.grad, upstream * (scale.bfloat16() if inside else scale))


WAITS = {
    "tensor": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "as_tensor": lambda x: torch.as_tensor(3.0, device=x.device),
    "to": lambda x: torch.zeros(3).to(x.device),
    "to_like": lambda x: torch.zeros(3).to(x),
    "to_with_dtype": lambda x: torch.zeros(3).to("cuda:0", torch.bfloat16),
    "unpinned": lambda x: torch.zeros(3).to(x.device, non_blocking=True),
    "pinned_but_waited_for": lambda x: torch.zeros(3).pin_memory().to(x.device),
    "copy": lambda x: x.clone().copy_(torch.zeros(64)),
    "copy_back": lambda x: torch.zeros(64).copy_(x),
    "cpu": lambda x: x.cpu(),
    "item": lambda x: x[0].item(),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "float": lambda x: float(x[0]),
    "bool": lambda x: bool(x[0] > 0),
    "any": lambda x: 1 if (x > 0).any() else 0,
    "nonzero": lambda x: (x > 0).nonzero(),
    "where": lambda x: torch.where(x > 0),
    "mask": lambda x: x[x > 0],
    "mask_written": lambda x: x.clone().__setitem__(x > 0, x[:32] * 1),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "unique_consecutive": lambda x: x.unique_consecutive(),
    "bincount": lambda x: x.long().abs().bincount(),
    "equal": lambda x: torch.equal(x, x + 1),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long().abs()),
    "list_as_index": lambda x: x[[0, 1]],
    "index_of_host": lambda x: x[torch.tensor([0, 1])],
    "index_by_scalar": lambda x: x[x.long().abs()[0]],
}


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_for_the_device_is_written_down(mode, name):
    WAITS[name](VALUES * 1)
    assert len(mode.waits) == 1 and mode.waits[0].where.startswith("test_device_mode.py"), (
        mode.waits
    )


@pytest.mark.parametrize(
    "name", sorted(WAITS.keys() - {"tensor", "as_tensor", "to", "to_like", "to_with_dtype"})
)
def test_the_host_does_not_wait_for_itself(mode, name):
    if name not in ("unpinned", "pinned_but_waited_for", "copy", "copy_back"):
        WAITS[name](mode.host(VALUES.clone()))
    assert mode.waits == []


FREE = {
    "full": lambda x: torch.full((3,), 2.0, device=x.device),
    "pinned": lambda x: torch.zeros(3).pin_memory().to(x.device, non_blocking=True),
    "pinned_copy": lambda x: x.clone().copy_(torch.zeros(64).pin_memory(), non_blocking=True),
    "to_another_dtype": lambda x: x.to(torch.bfloat16),
    "to_where_it_is": lambda x: x.to("cuda"),
    "fill_by_a_mask": lambda x: x.clone().__setitem__(x > 0, 0.0),
    "masked_fill": lambda x: x.masked_fill(x > 0, 0.0),
    "index": lambda x: x[x.long().abs()],
    "sort": lambda x: torch.sort(x).indices[:4],
    "slice": lambda x: x[2:5],
    "repeat_interleave": lambda x: x.repeat_interleave(torch.ones_like(x).long(), output_size=64),
    "as_tensor": lambda x: torch.as_tensor(x, device=x.device),
    "set_one": lambda x: x.clone().__setitem__(3, 5.0),
    "host_to_host": lambda x: torch.zeros(3).to("cpu").to(torch.float64),
}


@pytest.mark.parametrize("name", FREE)
def test_what_does_not_wait_is_not(mode, name):
    FREE[name](VALUES * 1)
    assert mode.waits == []


def test_a_wait_raises_where_it_happens_if_asked():
    with (
        pytest.raises(AssertionError, match="local_scalar_dense at test_device_mode"),
        DeviceMode(refuse=True),
    ):
        VALUES[0].item()


def test_host_and_device_do_not_mix_but_for_scalars(mode):
    x, of_host = VALUES * 1, torch.zeros(64)
    for function in (lambda: x + of_host, lambda: of_host @ x, lambda: torch.cat([x, of_host])):
        with pytest.raises(RuntimeError, match="same device"):
            function()
    assert (x + torch.tensor(1.0)).is_cuda


def test_products_know_out_dtype(mode):
    a, b = torch.randn(5, 7).bfloat16(), torch.randn(7, 3).bfloat16()
    a, b = (t.to("cuda") for t in (a, b))
    mode.waits.clear()
    exact = a.float() @ b.float()
    assert torch.equal(torch.mm(a, b, out_dtype=torch.float32), exact)
    out = torch.ones_like(exact)
    torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    torch.testing.assert_close(out, exact + 1)
    with pytest.raises(AssertionError, match="16-bit"):
        torch.mm(exact.T, exact, out_dtype=torch.float32)


@pytest.mark.parametrize("known", [(), ("mm",), ("addmm",)])
def test_a_torch_that_knows_fewer_products_can_be_had(known):
    a, total = torch.randn(4, 4).bfloat16(), torch.zeros(4, 4)
    products = {
        "mm": lambda: torch.mm(a, a, out_dtype=torch.float32, out=total),
        "addmm": lambda: torch.addmm(total, a, a, out_dtype=torch.float32, out=total),
    }
    with DeviceMode(out_dtype=known) as mode:
        for name, product in products.items():
            with (
                contextlib.nullcontext()
                if name in known
                else pytest.raises(RuntimeError, match="dtype")
            ):
                product()
    assert mode.operations == {"mm": 1, "addmm": 1}


def test_autocast_is_on_where_torch_would_switch_it_off(mode):
    with mode.autocast(torch.bfloat16):
        assert torch.is_autocast_enabled("cuda")
        with torch.autocast("cuda", enabled=False):
            assert not torch.is_autocast_enabled("cuda")
    assert not torch.is_autocast_enabled("cuda")


def test_operators_of_ours_are_looked_into_forward_and_backward(monkeypatch):
    seen = []
    reference = HEAD.reference
    monkeypatch.setattr(
        HEAD, "reference", lambda x, *rest: (seen.append(x.device.type), reference(x, *rest))[1]
    )
    x, head = torch.randn(6, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    y = torch.randint(0, 11, (6,))
    with DeviceMode() as mode:
        losses = fastft.linear_cross_entropy(x, head, y, reduction="none")
        losses.sum().backward()
    assert seen == ["cuda", "cuda"] and mode.waits == []
    expected = torch.nn.functional.cross_entropy(x @ head.T, y, reduction="none")
    torch.testing.assert_close(losses, expected)


def test_the_backward_of_a_python_function_sees_the_device():
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, upstream):
            assert upstream.is_cuda
            return upstream.tolist() and upstream

    x = torch.randn(3, requires_grad=True)
    with DeviceMode() as mode:
        Function.apply(x).sum().backward()
        torch.autograd.grad(Function.apply(x).sum(), x)
    assert [wait.what for wait in mode.waits] == ["tolist"] * 2
    with pytest.raises(AssertionError):
        Function.apply(x).sum().backward()  # outside the device is gone
