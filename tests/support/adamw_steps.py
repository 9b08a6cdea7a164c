"""Steps of an optimizer over random parameters and gradients, and what became of both."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from fastft import _native

NATIVE = _native.missing("cpu") is None
needs_native = pytest.mark.skipif(not NATIVE, reason="no native library")
ENGINES = ["eager", pytest.param("cpp", marks=needs_native)]
Shapes = list[tuple[int, ...]]
# that torch's AdamW has too
OPTIONS = [
    {},
    {"weight_decay": 0.0},
    {"lr": 0.1, "betas": (0.3, 0.5), "eps": 1e-3, "weight_decay": 0.3},
    {"maximize": True, "betas": (0.0, 0.9)},
    {"lr": torch.tensor(0.01)},
    {"amsgrad": True},
    {"amsgrad": True, "maximize": True, "betas": (torch.tensor(0.8), torch.tensor([0.9]))},
]


def start(shapes: Shapes, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def clones(params: list[Parameter], dtype: torch.dtype | None = None) -> list[Parameter]:
    return [Parameter(param.detach().to(dtype or param.dtype, copy=True)) for param in params]


def gradients(shapes: Shapes, steps: int, seed: int = 1) -> list[list[Tensor]]:
    """Gradients over six decades for each step, the first ones the same however many there are."""
    generator = torch.Generator().manual_seed(seed)

    def one(shape: tuple[int, ...]) -> Tensor:
        scale = 10 ** (torch.rand(shape, generator=generator) * 6 - 4)
        return torch.randn(shape, generator=generator) * scale

    return [[one(shape) for shape in shapes] for _ in range(steps)]


def params_of(optimizer: torch.optim.Optimizer) -> list[Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def train(
    optimizer: torch.optim.Optimizer, steps_of_grads: list[list[Tensor | None]]
) -> list[Parameter]:
    """Steps, one for each list of gradients, and returns the parameters; None is no gradient."""
    params = params_of(optimizer)
    for grads in steps_of_grads:
        for param, grad in zip(params, grads, strict=True):
            param.grad = None if grad is None else grad.to(param.dtype)
        optimizer.step()
    return params


def states(optimizer: torch.optim.Optimizer, name: str) -> list[Tensor]:
    return [state[name] for state in optimizer.state.values()]


def snapshot(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    """Each parameter's weight and state, by name."""
    return [{"weight": param.detach(), **optimizer.state[param]} for param in params_of(optimizer)]


def equal(left: list[Tensor], right: list[Tensor]) -> None:
    """Raises unless all values are equal, NaN to NaN."""
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.dtype == b.dtype
        a, b = a.detach(), b.detach()
        off = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
        assert torch.equal(a.nan_to_num(12345.0), b.nan_to_num(12345.0)), off


def assert_same(
    left: list[dict[str, Tensor]], right: list[dict[str, Tensor]], but: tuple[str, ...] = ()
) -> None:
    """Raises unless two snapshots are equal, without the names of `but`; NaN is equal to NaN."""
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        names = sorted(a.keys() - set(but))
        equal([a[name] for name in names], [b[name] for name in names])


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Raises unless all bits are the same: also those of NaN, and the sign of zero."""
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (ours, theirs)))


def on_disk(saved: dict[str, Any]) -> Any:
    """The same after torch.save and a load of weights only."""
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)
