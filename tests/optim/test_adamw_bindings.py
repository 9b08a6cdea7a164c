"""Operators called directly with numbers that nobody checked: a sentence, never the end of the
process."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import ptx
from support.ptx.engines import require_cuda
from torch import Tensor

import fastft
from fastft import _native

pytestmark = pytest.mark.skipif(_native.missing("cpu") is not None, reason="no native CPU library")

HYPER = [[1.0, 0.1, 0.999, 0.001, -0.1, 0.03, 1e-8, 1.0, 1.0]]
HUGE = 2**63 - 1


@pytest.fixture
def cuda() -> Iterator[tuple[Any, Any]]:
    """The operators and the library of CUDA, their launches run as PTX."""
    require_cuda()
    with ptx.cuda_operators(90) as gpu:
        yield gpu.ops, gpu.library


@pytest.fixture(params=["cpp", "cuda, as PTX"])
def native(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """The operators and the library of an engine."""
    return (
        request.getfixturevalue("cuda")
        if request.param != "cpp"
        else (torch.ops.fastft, _native.library("cpu"))
    )


def bind(native: Any, size: int = 5, row: int = 0, first: int = 0) -> tuple[int, Tensor]:
    param, m, v = torch.zeros(3, size).unbind()
    return native[0].adamw_bind(
        [param], [m], [v], [], [], torch.tensor([[row, 0, 0, first]])
    ), param


def step(native: Any, bound: int, size: int = 5) -> int:
    return native[0].adamw_bound_([torch.ones(size)], torch.tensor(HYPER), torch.ones(()), 0, bound)


def test_numbers_that_stand_for_no_binding(native: Any) -> None:
    bound, param = bind(native)
    other = torch.zeros(64)
    for forged in (
        0,
        -1,
        2**62 - 1,
        HUGE,
        -HUGE - 1,
        bound + 1,
        bound - 1000,
        other.data_ptr(),
        id(param),
    ):
        with pytest.raises(
            RuntimeError,
            match=f"adamw_bound_: {forged} is nothing that it has bound, or was released",
        ):
            step(native, forged)
    assert not param.any() and step(native, bound) == 0 and param.all()


def test_a_released_binding(native: Any) -> None:
    bound, param = bind(native)
    native[1].fastft_adamw_release(ctypes.c_int64(bound))
    # twice, and numbers that nobody has given
    native[1].fastft_adamw_release(ctypes.c_int64(bound))
    for number in (0, -1, HUGE):
        native[1].fastft_adamw_release(ctypes.c_int64(number))
    with pytest.raises(RuntimeError, match="or was released"):
        step(native, bound)
    again, _ = bind(native)
    assert again != bound and not param.any()  # no number is given twice


def test_a_binding_of_another_library(cuda: Any) -> None:
    host = torch.ops.fastft, _native.library("cpu")
    for ours, theirs in ((host, cuda), (cuda, host)):
        bound, _ = bind(ours)
        with pytest.raises(RuntimeError, match="nothing that it has bound"):
            step(theirs, bound)


def test_a_binding_released_by_another_thread_while_it_steps(native: Any) -> None:
    bounds = [bind(native, 4001)[0] for _ in range(200)]
    failures: list[str] = []

    def release() -> None:
        for bound in bounds:
            native[1].fastft_adamw_release(ctypes.c_int64(bound))

    thread = threading.Thread(target=release)
    thread.start()
    for bound in bounds:
        try:
            assert step(native, bound, 4001) == 0
        except RuntimeError as error:
            failures.append(str(error))
    thread.join()
    assert all("or was released" in failure for failure in failures)


@pytest.mark.parametrize(
    ("row", "first"), [(HUGE, 0), (2**31, 0), (-1, 0), (0, -1), (0, HUGE), (HUGE, HUGE)]
)
def test_a_table_that_points_out_of_everything(native: Any, row: int, first: int) -> None:
    with pytest.raises(RuntimeError, match="adamw_: bad table row 0"):
        bind(native, row=row, first=first)
    p, table = torch.zeros(5), torch.tensor([[row, 0, 0, first]])
    with pytest.raises(RuntimeError, match="adamw_: bad table row 0"):
        native[0].adamw_([p], [p], [p], [p], [], [], table, torch.tensor(HYPER), torch.ones(()), 0)


def test_a_row_that_the_table_of_numbers_lacks(native: Any) -> None:
    bound, param = bind(native, row=1)
    with pytest.raises(RuntimeError, match="a row for each index"):
        step(native, bound)
    assert not param.any()


@pytest.mark.parametrize(
    "lengths", [[HUGE, HUGE, 1], [HUGE] * 3, [1, 2**62, 2**62], [-HUGE - 1, 5], [3, -HUGE]]
)
def test_a_plan_of_lengths_whose_sum_overflows(lengths: list[int]) -> None:
    n, outputs = (
        len(lengths),
        [torch.zeros(len(lengths) + more, dtype=torch.int64) for more in (0, 0, 1)],
    )
    arguments = [
        torch.tensor(lengths),
        torch.tensor([0, n]),
        100,
        0,
        *outputs,
        torch.zeros(1, dtype=torch.int64),
    ]
    with pytest.raises(RuntimeError, match=r"plan_packs: length .* of a window is not in \[1, "):
        torch.ops.fastft.plan_packs(*arguments)


def test_a_batch_that_ignores_more_tokens_than_there_are() -> None:
    def filled(ignored: int) -> list[list[int]]:
        outputs = [torch.zeros(5, dtype=dtype) for dtype in (torch.int64, torch.int64, torch.int32)]
        sums, source = torch.zeros(3, dtype=torch.int32), torch.arange(5)
        lengths = torch.tensor([2, 3])
        torch.ops.fastft.packed_boundaries(
            lengths, torch.tensor([0, ignored]), source, 0, *outputs, sums
        )
        return [tensor.tolist() for tensor in (*outputs, sums)]

    assert (
        filled(HUGE)
        == filled(3)
        == [[0, 1, *[-100] * 3], [0, 1, 0, 1, 2], [0, 0, 1, 1, 1], [0, 2, 5]]
    )
    assert filled(-HUGE - 1) == filled(0)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("freed", ["param", "grad", "exp_avg", "exp_avg_sq_scale"])
def test_memory_that_was_freed(freed: str, clip: float | None) -> None:
    """`untyped_storage().resize_(0)` leaves shape and strides and takes the memory."""
    params = [torch.ones(size, requires_grad=True) for size in ((7,), (3, 130))]
    optimizer = fastft.AdamW(params, moments="4bit", max_grad_norm=clip, impl="cpp")
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    before = params[0].detach().clone()
    last = params[1]
    owner = {"param": last, "grad": last.grad, **optimizer.state[last]}[freed]
    owner.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="has been freed"):
        optimizer.step()
    assert torch.equal(params[0], before)
