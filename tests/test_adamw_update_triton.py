"""The Triton kernel of `adamw_`, interpreted on the CPU with bounds and race checks: the bits of the C++ engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from support.adamw_problems import MODES, Mode, Training, assert_same_bits

pytest.importorskip("triton")

from support.triton_interpreter import interpreted

from fastft import _native
from fastft.ops import OPERATORS
from fastft.optim import adamw_update_triton
from fastft.optim.adamw_update_triton import adamw_

pytestmark = pytest.mark.skipif(_native.missing("cpu") is not None, reason="no native CPU library")

ADAMW = OPERATORS["adamw_"]
SIZES = (1, 2049, 0, 63)  # a whole program, and three that are not
MIXED = Mode(torch.bfloat16, "stochastic", "bf16")


def by_triton(order: int) -> Callable[..., None]:
    def update(*arguments: Any) -> None:
        with interpreted(order=order, memory=[tensor for tensors in arguments[:6] for tensor in tensors]):
            adamw_(*arguments)

    return update


@contextmanager
def computed_by(update: Callable[..., None] | None, training: Training) -> Iterator[None]:
    """`update` in the engine's place, and called; None: the engine."""
    if update is None:
        yield
        return
    training.optimizer._plan.parts[0].bound = None
    with patch.object(ADAMW, "implementation", return_value=Mock(side_effect=update)) as implementation:
        yield
    implementation.return_value.assert_called()


def second_step(
    mode: Mode, update: Callable[..., None] | None, offset: int = 0, sizes: tuple[int, ...] = SIZES
) -> list[torch.Tensor]:
    """The values after two steps, the second of them by `update`."""
    training = Training(mode, "cpp", sizes=sizes, offset=offset).step()
    with computed_by(update, training):
        return training.step().values()


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_every_mode(mode: Mode) -> None:
    assert_same_bits(second_step(mode, by_triton(order=7)), second_step(mode, None))


def test_tensors_that_begin_in_the_middle_of_a_vector() -> None:
    assert_same_bits(second_step(MIXED, by_triton(order=0), offset=1), second_step(MIXED, None, offset=1))


@pytest.mark.parametrize("sizes", [(2080,), (32, 4096, 9216)], ids=["short blocks", "whole blocks"])
def test_rows_that_vectors_divide(sizes: tuple[int, ...]) -> None:
    mode = MODES["stochastic-8bit"]
    assert_same_bits(second_step(mode, by_triton(order=3), sizes=sizes), second_step(mode, None, sizes=sizes))


def test_numbers_that_are_none() -> None:
    results = []
    for update in (ADAMW.native, by_triton(order=0)):
        param, grad, residue = torch.ones(4), torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0]), torch.zeros(4)
        tensors = [param.bfloat16(), grad.bfloat16(), torch.zeros(4), torch.zeros(4), residue.short()]
        hyper = torch.tensor([[0.99, 0.1, 0.999, 0.001, -0.01, 0.03, 1e-8, 1.0, 1.0]])
        lists = [[tensor] for tensor in tensors]
        update(*lists[:4], [], lists[4], torch.tensor([[0, 1, 0, 0]]), hyper, torch.ones(()), 0)
        results.append(tensors)
    assert_same_bits(*([tensor.nan_to_num(123.0) for tensor in tensors] for tensors in results))
    assert results[1][0][:3].isnan().all() and results[1][0][3].isfinite()


def test_8_bit_moments_of_numbers_that_are_none() -> None:
    results = []
    for update in (None, by_triton(order=0)):
        training = Training(MODES["exact-8bit"], "cpp", sizes=(1, 507)).step()
        training.params[1].grad[-1, -3:] = torch.tensor([torch.nan, torch.inf, -torch.inf])
        with computed_by(update, training):
            training.optimizer.step()
        results.append(training.values())
    assert_same_bits(*results)
    assert results[0][1][-1, -3:].isnan().all()


def test_a_skipped_step_does_nothing() -> None:
    p, hyper = [torch.ones(9)], torch.ones(1, 9)
    hyper[0, 8] = 0
    by_triton(order=0)(p, p, p, p, [], [], torch.tensor([[0, 0, 0, 0]]), hyper, torch.ones(()), 0)
    assert p[0].eq(1).all()


def test_what_does_not_fit_is_refused() -> None:
    p, table, hyper, one = [torch.zeros(5)], torch.tensor([[0, 0, 0, 0]]), torch.ones(1, 9), torch.ones(())
    for tensors in ([p, [torch.zeros(4)], p, p, [], []], [p, p, [torch.zeros(5).double()], p, [], []]):
        with pytest.raises(RuntimeError, match="adamw_: a tensor of parameter 0 must have"):
            adamw_(*tensors, table, hyper, one, 0)
    matrix, scales = torch.zeros(5, 3), [torch.zeros(5, 1), torch.zeros(5, 2)]
    for fitting, words in (
        (matrix[0, 0], "contiguous"),
        (matrix.t(), "contiguous"),
        (p[0], "a scale"),
        (matrix, "a scale of parameter 0"),
    ):
        codes = [fitting], [fitting], [fitting.to(torch.int8)], [fitting.to(torch.uint8)], []
        with pytest.raises(RuntimeError, match=words):
            adamw_(*codes, scales, table, hyper, one, 0)


def test_a_graph_that_would_repeat_the_numbers_of_its_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(MIXED, "cpp", sizes=SIZES).step()
    before = training.values()
    monkeypatch.setattr(adamw_update_triton, "is_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"cannot capture the Triton engine.*use impl='cuda'"):
        with computed_by(adamw_, training):
            training.optimizer.step()
    assert_same_bits(training.values(), before)
