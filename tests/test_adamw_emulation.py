"""AdamW's CUDA kernels, compiled by g++ and run on the CPU: they have the bits of the C++ engine."""

from __future__ import annotations

import ctypes
import shutil
from typing import Any

import pytest
import torch
from support import cuda_host
from support.adamw_problems import MODES, Mode, Training, assert_same_bits
from torch.nn import Parameter

import fastft
from fastft import _native
from fastft.optim import adamw_plan, device_counts

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
    pytest.mark.skipif(_native.missing("cpu") is not None, reason="no native CPU library"),
]

MIXED = Mode(torch.bfloat16, "stochastic", "bf16")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return cuda_host.operators(tmp_path_factory.mktemp("emulated"))


@pytest.fixture
def on_device(emulated: Any):
    """A function after which impl="cpp" means the emulated CUDA kernels."""
    with pytest.MonkeyPatch.context() as patch:

        def replace() -> None:
            patch.setattr(torch.ops.fastft, "adamw_bind", emulated.adamw_bind)
            patch.setattr(torch.ops.fastft, "adamw_bound_", emulated.adamw_bound_)
            patch.setattr(torch.ops.fastft, "adamw_written", lambda sums, bound: None)
            patch.setattr(adamw_plan, "_release", lambda bound, kind: release(ctypes.c_int64(bound)))

        release = cuda_host.operators.library.fastft_adamw_release
        yield replace


@pytest.fixture(params=["0", "1", "2"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTFT_EMULATION_SEED", request.param)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_every_mode(on_device: Any, order: None, mode: Mode) -> None:
    expected = Training(mode, "cpp").step(3).values()
    on_device()
    assert_same_bits(Training(mode, "cpp").step(3).values(), expected)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_tensors_that_begin_in_the_middle_of_a_vector(on_device: Any, mode: Mode) -> None:
    expected = Training(mode, "cpp", sizes=(507, 3), offset=1).step(2).values()
    on_device()
    assert_same_bits(Training(mode, "cpp", sizes=(507, 3), offset=1).step(2).values(), expected)


def test_8_bit_moments_of_numbers_that_are_none(on_device: Any, order: None) -> None:
    def run() -> list[torch.Tensor]:
        training = Training(MODES["exact-8bit"], "cpp", sizes=(1, 507, 1040)).step()
        for param in training.params[1:]:
            param.grad[-1, -3:] = torch.tensor([torch.nan, torch.inf, -torch.inf])
        training.optimizer.step()
        return training.step().values()

    expected = run()
    on_device()
    assert_same_bits(run(), expected)


def test_elements_whose_number_is_no_multiple_of_eight(emulated: Any) -> None:
    """As the second shard of a tensor of 507 elements, from the 254th on."""
    whole = Training(MIXED, "cpp", sizes=(507,)).step()
    part = whole.optimizer._plan.parts[0]
    pieces = [[t.detach().clone()[254:] for t in tensors] for tensors in (part.params, part.exp_avgs, part.exp_avg_sqs)]
    pieces.append([t.clone()[254:] for t in part.max_exp_avg_sqs])
    before = adamw_plan._hyper_row(whole.optimizer.param_groups[1], 2)
    whole.step()
    table = torch.tensor([[0, *part.table[0, 1:3].tolist(), 254]])
    grads, hyper, seed = [whole.params[0].grad[254:]], torch.tensor([before]), whole.optimizer.param_groups[0]["seed"]
    emulated.adamw_(pieces[0], grads, *pieces[1:], [], table, hyper, torch.ones(()), seed)
    after = (part.params, part.exp_avgs, part.exp_avg_sqs, part.max_exp_avg_sqs)
    assert_same_bits([piece[0] for piece in pieces], [tensors[0].detach()[254:] for tensors in after])


def test_more_groups_than_a_launch_carries(on_device: Any) -> None:
    def run() -> list[torch.Tensor]:
        params = [Parameter(torch.linspace(-1, 1, 9)) for _ in range(70)]
        optimizer = fastft.AdamW([{"params": [p], "lr": 1e-3 * i} for i, p in enumerate(params)], impl="cpp")
        for _ in range(2):
            for param in params:
                param.grad = torch.linspace(1, 2, 9)
            optimizer.step()
        return [param.detach() for param in params]

    expected = run()
    on_device()
    assert_same_bits(run(), expected)


@pytest.mark.parametrize("capturing", [False, True])
def test_gradients_that_move_and_that_stay(on_device: Any, capturing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> list[torch.Tensor]:
        training = Training(MIXED, "cpp").step(2)
        plan = training.optimizer._plan
        for param in training.params:
            param.grad.mul_(3.0)
        training.optimizer.step()
        training.params[2].grad = training.params[2].grad.clone()
        training.optimizer.step()
        training.params[4].grad = None
        training.optimizer.step()
        assert training.optimizer._plan is not plan  # another signature
        return training.values()

    expected = run()
    if capturing:
        monkeypatch.setenv("FASTFT_EMULATION_CAPTURES", "1")
    on_device()
    assert_same_bits(run(), expected)


def test_memory_that_moves_is_noticed(on_device: Any) -> None:
    def run() -> list[torch.Tensor]:
        training = Training(MIXED, "cpp").step()
        training.params[3].data = training.params[3].data.clone()
        training.optimizer.state[training.params[4]]["exp_avg"] = torch.zeros(4097, dtype=torch.bfloat16)
        return training.step(2).values()

    expected = run()
    on_device()
    assert_same_bits(run(), expected)


def test_what_does_not_fit_is_refused(emulated: Any) -> None:
    p, hyper, one = [torch.zeros(5)], torch.ones(1, 9), torch.ones(())
    table = torch.tensor([[0, 0, 0, 0]])
    for arguments, words in (
        ((p, [torch.zeros(4)], p, p, [], [], table, hyper, one, 0), "gradient 0"),
        ((p, p, [torch.zeros(4)], p, [], [], table, hyper, one, 0), "exp_avg"),
        ((p, p, p, p, [], [], table, hyper[:, 1:], one, 0), "hyper"),
        ((p, p, p, p, [], [], table + 1, hyper, one, 0), "adamw_: "),
    ):
        with pytest.raises(RuntimeError, match=words):
            emulated.adamw_(*arguments)


def check_norm(emulated: Any, sizes: list[int], dtype: torch.dtype) -> None:
    grads = [torch.randn(size).to(dtype) * 10 ** (i % 7 - 3) for i, size in enumerate(sizes)]
    grads[0] = torch.cat([grads[0][:1], grads[0]])[1:]  # in the middle of a vector
    ours, expected = torch.full((2,), torch.nan, dtype=torch.float64)
    emulated.grad_norm_squared_(ours, grads)
    torch.ops.fastft.grad_norm_squared_(expected, grads)
    assert torch.equal(ours.sqrt().float(), expected.sqrt().float()) and ours > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_that_of_the_cpu(emulated: Any, order: None, dtype: torch.dtype) -> None:
    check_norm(emulated, [20_001, 1, 63, 0, 507], dtype)


def test_the_norm_of_more_tensors_than_a_launch_carries(emulated: Any) -> None:
    check_norm(emulated, [3] * 200, torch.float32)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_shows_a_number_that_is_none(emulated: Any, dtype: torch.dtype, value: float) -> None:
    total, grad = torch.zeros((), dtype=torch.float64), torch.full((20_001,), 3e38).to(dtype)
    emulated.grad_norm_squared_(total, [grad, torch.zeros(0)])
    assert total.sqrt().float() == grad.double().norm().float()
    grad[-1] = value
    emulated.grad_norm_squared_(total, [torch.zeros(7), grad])
    assert not total.isfinite()
    emulated.grad_norm_squared_(total, [])
    assert total == 0


def test_a_skipped_step_does_nothing(on_device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_counts, "counted_there", lambda device, groups: True)
    on_device()
    training = Training(MIXED, "cpp").step(2)
    before = training.values()
    training.optimizer.found_inf = torch.ones(())
    assert_same_bits(training.step().values(), before)
    assert training.optimizer.step_was_skipped
    del training.optimizer.found_inf
    assert not torch.equal(training.step().values()[4], before[4])
