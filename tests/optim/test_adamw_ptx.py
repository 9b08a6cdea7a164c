"""AdamW's CUDA and Triton kernels, compiled for sm_80 and sm_90 and executed as PTX: the bits of
the C++ engine.

By default every mode on sm_90; `make ptx` runs every mode on every chip, aligned and not, in
several orders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import ptx
from support.adamw_modes import MODES, Mode
from support.adamw_problems import Training, past_two_to_the_31
from support.adamw_steps import assert_same_bits
from support.ptx.cuda import tensors_in
from support.ptx.engines import (
    ENGINES,
    Engine,
    adamw_by,
    cuda_for_cpp,
    operator,
    require_cuda,
    unbound,
)
from torch.nn import Parameter

import fastft
from fastft import _native
from fastft.ops import OPERATORS
from fastft.optim import device_counts
from fastft.optim.adamw_update import Rounding
from fastft.optim.groups import hyper_row

pytestmark = pytest.mark.skipif(_native.missing("cpu") is not None, reason="no native CPU library")

CUDA_80, CUDA_90, TRITON_80, TRITON_90 = ENGINES
MIXED = MODES["stochastic-bf16"]
SIZES = (1, 2049, 0, 63)  # a whole program of Triton, and three that are not
engines = pytest.mark.parametrize("engine", ENGINES, ids=str)


def assert_the_same_step(
    engine: Engine, mode: Mode, sizes: tuple[int, ...], offset: int = 0, **options: Any
) -> None:
    """The second step, by the kernels of `engine`."""
    ours, theirs = (Training(mode, "cpp", sizes=sizes, offset=offset).step() for _ in range(2))
    with adamw_by(engine, **options) as launches:
        unbound(ours).step()
    assert launches
    assert_same_bits(ours.values(), theirs.step().values())


def every_mode(*quick: Engine, some: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    """All engines and modes; by default those of `quick` and the modes of `some`."""
    rows = [
        pytest.param(
            engine,
            mode,
            id=f"{engine}-{mode}",
            marks=() if engine in quick or mode in some else pytest.mark.ptx,
        )
        for engine in ENGINES
        for mode in MODES
    ]
    return pytest.mark.parametrize(("engine", "mode"), rows)


@every_mode(CUDA_90, some=("fp32-fp32", "stochastic-bf16", "exact-8bit", "exact-4bit"))
def test_every_mode(engine: Engine, mode: str) -> None:
    assert_the_same_step(
        engine,
        MODES[mode],
        SIZES if engine.name == "triton" else (*SIZES, 507, *[5] * 11, 1040, 544),
    )


@every_mode(some=("stochastic-bf16", "stochastic-4bit"))
def test_tensors_that_begin_in_the_middle_of_a_vector(engine: Engine, mode: str) -> None:
    assert_the_same_step(engine, MODES[mode], (507, 3), offset=1)


@pytest.mark.ptx
@engines
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(
    "mode", ["stochastic-bf16", "stochastic-8bit", "stochastic-4bit", "exact-fp32"]
)
def test_no_order_of_the_blocks_changes_a_bit(engine: Engine, mode: str, order: int) -> None:
    assert_the_same_step(engine, MODES[mode], (20_480, 16_384, 9_000), order=order)


@pytest.mark.parametrize("engine", [CUDA_80, CUDA_90], ids=str)
@pytest.mark.parametrize("mode", ["stochastic-8bit", "stochastic-4bit"])
def test_no_order_of_cuda_s_blocks_changes_a_bit(engine: Engine, mode: str) -> None:
    assert_the_same_step(engine, MODES[mode], (8_192, 9_000, 63), order=1)


@pytest.mark.parametrize(
    "engine", [CUDA_90, pytest.param(TRITON_90, marks=pytest.mark.ptx)], ids=str
)
@pytest.mark.parametrize("sizes", [(2080,), (32, 4096, 9216)], ids=["short blocks", "whole blocks"])
@pytest.mark.parametrize("mode", ["stochastic-8bit", "stochastic-4bit"])
def test_rows_that_vectors_divide(engine: Engine, mode: str, sizes: tuple[int, ...]) -> None:
    assert_the_same_step(engine, MODES[mode], sizes)


@engines
def test_numbers_that_are_none(engine: Engine) -> None:
    results = []
    for update in (OPERATORS["adamw_"].native, None):
        param, grad, residue = (
            torch.ones(4),
            torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0]),
            torch.zeros(4),
        )
        tensors = [
            param.bfloat16(),
            grad.bfloat16(),
            torch.zeros(4),
            torch.zeros(4),
            residue.short(),
        ]
        hyper = torch.tensor([[0.99, 0.1, 0.999, 0.001, -0.01, 0.03, 1e-8, 1.0, 1.0]])
        lists = [[tensor] for tensor in tensors]
        arguments = (
            *lists[:4],
            [],
            lists[4],
            torch.tensor([[0, 1, 0, 0]]),
            hyper,
            torch.ones(()),
            0,
        )
        if update is None:
            with operator(engine, "adamw_") as (update, _):
                update(*arguments)
        else:
            update(*arguments)
        results.append(tensors)
    assert_same_bits(*([tensor.nan_to_num(123.0) for tensor in tensors] for tensors in results))
    assert results[1][0][:3].isnan().all() and results[1][0][3].isfinite()


@pytest.mark.parametrize("engine", [CUDA_80, CUDA_90, TRITON_90], ids=str)
@pytest.mark.parametrize("columns", [169, 168])
@pytest.mark.parametrize("moments", ["8bit", "4bit"])
def test_codes_of_numbers_that_are_none(engine: Engine, moments: str, columns: int) -> None:
    mode, sizes = MODES[f"exact-{moments}"], (1, 3 * columns)
    ours, theirs = (Training(mode, "cpp", sizes=sizes).step() for _ in range(2))
    with adamw_by(engine) as launches:
        for training in (unbound(ours), theirs):
            training.params[1].grad[-1, -3:] = torch.tensor([torch.nan, torch.inf, -torch.inf])
            training.optimizer.step()
            training.step()
    assert launches
    assert_same_bits(ours.values(), theirs.values())
    assert ours.values()[1][-1, -3:].isnan().all()


@pytest.mark.parametrize("engine", [CUDA_90, TRITON_90], ids=str)
@pytest.mark.parametrize("columns", [169, 168])
def test_quotients_by_roots_that_are_zero_or_nearly(engine: Engine, columns: int) -> None:
    """Of 4-bit moments: rows without a gradient, and some whose squares are denormal or 0."""
    ours, theirs = (
        Training(MODES["fp32-4bit"], "cpp", sizes=(4 * columns,)).step() for _ in range(2)
    )
    scales = torch.tensor([[0.0], [1.0], [1e-20], [3e-23]])
    with adamw_by(engine) as launches:
        for training in (unbound(ours), theirs):
            (param,) = training.params
            state = training.optimizer.state[param]
            state["exp_avg_sq_scale"].copy_(torch.tensor([[0.0], [1e-44], [1e-38], [0.0]]))
            state["exp_avg_scale"].copy_(torch.tensor([[3.0], [3e38], [1e38], [0.0]]))
            param.grad *= scales
            training.optimizer.step()
    assert launches
    assert_same_bits(ours.values(), theirs.values())


@engines
@pytest.mark.parametrize("moments", ["bf16", "8bit", "4bit"])
def test_more_than_2_31_elements_in_a_step(engine: Engine, moments: str) -> None:
    """The last blocks, over a tensor that they alone touch."""
    problem = past_two_to_the_31(moments)
    torch.ops.fastft.adamw_(*problem.end)
    last = {"only": lambda blocks: range(max(0, blocks - 2), blocks)}
    with operator(engine, "adamw_", **last) as (update, _):
        update(*problem.whole)
    problem.assert_same_ends()
    assert problem.end[0][0].all() and problem.end[2][0].any()


@engines
@pytest.mark.parametrize("moments", ["bf16", "8bit", "4bit"])
def test_random_bits_of_a_place_past_two_to_the_36(engine: Engine, moments: str) -> None:
    """As in a shard: the number of its eight elements has more than 32 bits."""
    ours, theirs = (past_two_to_the_31(moments).end for _ in range(2))
    for arguments in (ours, theirs):
        arguments[6][0, 3] = 5 * 2**36 + 8
    torch.ops.fastft.adamw_(*theirs)
    with operator(engine, "adamw_") as (update, _):
        update(*ours)
    assert_same_bits(list(tensors_in(ours)), list(tensors_in(theirs)))


def test_triton_refuses_what_does_not_fit() -> None:
    adamw_ = pytest.importorskip("fastft.optim.adamw_update_triton").adamw_
    p, table, hyper, one = (
        [torch.zeros(5)],
        torch.tensor([[0, 0, 0, 0]]),
        torch.ones(1, 9),
        torch.ones(()),
    )
    for tensors in (
        [p, [torch.zeros(4)], p, p, [], []],
        [p, p, [torch.zeros(5).double()], p, [], []],
    ):
        with pytest.raises(RuntimeError, match="adamw_: a tensor of parameter 0 must have"):
            adamw_(*tensors, table, hyper, one, 0)
    matrix, scales = torch.zeros(5, 3), [torch.zeros(5, 1), torch.zeros(5, 2)]
    for fitting, words in (
        (matrix[0, 0], "contiguous"),
        (matrix.t(), "contiguous"),
        (p[0], "exp_avg_scale"),
        (matrix, "exp_avg_sq_scale of parameter 0"),
    ):
        codes = [fitting], [fitting], [fitting.to(torch.int8)], [fitting.to(torch.uint8)], []
        with pytest.raises(RuntimeError, match=words):
            adamw_(*codes, scales, table, hyper, one, 0)
    codes = [[matrix], [matrix], *[[matrix.to(torch.uint8)]] * 2, []]
    with pytest.raises(RuntimeError, match=r"exp_avg of parameter 0 must have .*\(5, 2\)"):
        adamw_(*codes, [scales[0]] * 2, table, hyper, one, 0)


def test_triton_refuses_a_graph_that_would_repeat_the_numbers_of_its_capture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adamw_update_triton = pytest.importorskip("fastft.optim.adamw_update_triton")
    training = Training(MIXED, "cpp", sizes=SIZES).step()
    before = training.values()
    monkeypatch.setattr(adamw_update_triton, "is_capturing", lambda: True)
    with adamw_by(TRITON_90) as launches:
        with pytest.raises(
            RuntimeError, match=r"cannot capture the Triton engine.*use impl='cuda'"
        ):
            unbound(training).optimizer.step()
    assert not launches
    assert_same_bits(training.values(), before)


@pytest.fixture(params=[80, 90])
def gpu(request: pytest.FixtureRequest) -> Iterator[ptx.Gpu]:
    require_cuda()
    with ptx.cuda_operators(request.param) as gpu:
        yield gpu


def assert_the_same_training(gpu: ptx.Gpu, train: Callable[[], list[torch.Tensor]]) -> None:
    expected = train()
    with cuda_for_cpp(gpu):
        assert_same_bits(train(), expected)
    assert gpu.launches and not gpu.waits


@pytest.mark.parametrize("mode", ["fp32-fp32", "exact-8bit", "exact-4bit", "stochastic-bf16"])
def test_bound_steps(gpu: ptx.Gpu, mode: str) -> None:
    assert_the_same_training(gpu, lambda: Training(MODES[mode], "cpp").step(3).values())


def test_every_kind_of_moments_in_one_launch(gpu: ptx.Gpu) -> None:
    kinds = ("4bit", "bf16", "8bit", "fp32", "4bit")

    def train() -> list[torch.Tensor]:
        params = [Parameter(torch.linspace(-1, 1, 3 * 168).view(3, 168)) for _ in kinds]
        groups = [{"params": [p], "moments": k} for p, k in zip(params, kinds, strict=True)]
        optimizer = fastft.AdamW(groups, impl="cpp", seed=5)
        for _ in range(2):
            for param in params:
                param.grad = param.detach().sin()
            optimizer.step()
        states = [optimizer.state[param] for param in params]
        return [*map(Parameter.detach, params), *(state["exp_avg"] for state in states)]

    assert_the_same_training(gpu, train)
    launches = [launch for launch in gpu.launches if "adamw_kernel" in launch.kernel]
    assert len(launches) == 2


@pytest.mark.parametrize("on_16_bytes", [False, True])
def test_elements_whose_number_is_no_multiple_of_eight(gpu: ptx.Gpu, on_16_bytes: bool) -> None:
    """As the second shard of a tensor of 507 elements, from the 254th on, in its place or in memory
    of its own."""
    whole = Training(MIXED, "cpp", sizes=(507,)).step()
    (param,), group = whole.params, whole.optimizer.param_groups[1]
    state = whole.optimizer.state[param]
    kept = [param.detach(), *(state[name] for name in ("exp_avg", "exp_avg_sq"))]
    kept += [state["max_exp_avg_sq"]] if group["amsgrad"] else []
    pieces = [tensor.clone()[254:] for tensor in kept]
    if on_16_bytes:
        pieces = [piece.clone() for piece in pieces]
    hyper = torch.tensor([hyper_row(group, 2)])
    whole.step()
    table = torch.tensor([[0, Rounding.STOCHASTIC, group["amsgrad"], 254]])
    param_part, m, v, *largest = pieces
    grad, seed = param.grad[254:].clone(), group["seed"]
    gpu.ops.adamw_([param_part], [grad], [m], [v], largest, [], table, hyper, torch.ones(()), seed)
    assert_same_bits(pieces, [tensor[254:] for tensor in kept])


def test_more_groups_than_a_launch_carries(gpu: ptx.Gpu) -> None:
    def train() -> list[torch.Tensor]:
        params = [Parameter(torch.linspace(-1, 1, 9)) for _ in range(70)]
        optimizer = fastft.AdamW(
            [{"params": [p], "lr": 1e-3 * i} for i, p in enumerate(params)], impl="cpp"
        )
        for _ in range(2):
            for param in params:
                param.grad = torch.linspace(1, 2, 9)
            optimizer.step()
        return [param.detach() for param in params]

    assert_the_same_training(gpu, train)


@pytest.mark.parametrize("capturing", [False, True])
def test_gradients_that_move_and_that_stay(gpu: ptx.Gpu, capturing: bool) -> None:
    def train() -> list[torch.Tensor]:
        training = Training(MIXED, "cpp").step(2)
        for param in training.params:
            param.grad.mul_(3.0)
        training.optimizer.step()
        training.params[2].grad = training.params[2].grad.clone()
        training.optimizer.step()
        training.params[4].grad = None
        training.optimizer.step()
        return training.values()

    gpu.capturing = capturing
    assert_the_same_training(gpu, train)


def test_memory_that_moves_is_noticed(gpu: ptx.Gpu) -> None:
    def train() -> list[torch.Tensor]:
        training = Training(MIXED, "cpp").step()
        training.params[3].data = training.params[3].data.clone()
        training.optimizer.state[training.params[4]]["exp_avg"] = torch.zeros(
            4097, dtype=torch.bfloat16
        )
        return training.step(2).values()

    assert_the_same_training(gpu, train)


def test_a_step_follows_the_current_stream(gpu: ptx.Gpu) -> None:
    gpu.use_stream(5)
    assert_the_same_training(gpu, lambda: Training(MIXED, "cpp", sizes=(63,)).step(2).values())
    assert {launch.stream for launch in gpu.launches} == {5}


def test_a_gradient_of_another_device_is_refused(gpu: ptx.Gpu) -> None:
    p, table, hyper = [torch.zeros(5)], torch.tensor([[0, 0, 0, 0]]), torch.ones(1, 9)
    elsewhere = gpu.place(torch.zeros(5), 1)
    with pytest.raises(RuntimeError, match="gradient 0"):
        gpu.ops.adamw_(
            p,
            [elsewhere],
            [torch.zeros(5)],
            [torch.zeros(5)],
            [],
            [],
            table,
            hyper,
            torch.ones(()),
            0,
        )
    factor = gpu.place(torch.ones(()), 1)
    with pytest.raises(RuntimeError, match="grad_factor is on another device"):
        gpu.ops.adamw_(p, p, [torch.zeros(5)], [torch.zeros(5)], [], [], table, hyper, factor, 0)
    assert not any("adamw_kernel" in launch.kernel for launch in gpu.launches)


def test_hyper_parameters_on_the_device(gpu: ptx.Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_counts, "counted_there", lambda device, groups: True)
    gpu.host_arguments = {"table"}
    assert_the_same_training(gpu, lambda: Training(MIXED, "cpp").step(3).values())


def test_a_skipped_step_does_nothing(gpu: ptx.Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_counts, "counted_there", lambda device, groups: True)
    gpu.host_arguments = {"table"}
    with cuda_for_cpp(gpu):
        training = Training(MIXED, "cpp").step(2)
        before = training.values()
        training.optimizer.found_inf = torch.ones(())
        assert_same_bits(training.step().values(), before)
        assert training.optimizer.step_was_skipped
        del training.optimizer.found_inf
        assert not torch.equal(training.step().values()[4], before[4])


def test_triton_skips_a_step() -> None:
    p, hyper = [torch.ones(9)], torch.ones(1, 9)
    hyper[0, 8] = 0
    with operator(TRITON_90, "adamw_") as (update, launches):
        update(p, p, p, p, [], [], torch.tensor([[0, 0, 0, 0]]), hyper, torch.ones(()), 0)
    assert p[0].eq(1).all() and launches[0].bytes_written == 0


def test_what_does_not_fit_is_refused(gpu: ptx.Gpu) -> None:
    p, hyper, one = [torch.zeros(5)], torch.ones(1, 9), torch.ones(())
    table = torch.tensor([[0, 0, 0, 0]])
    for arguments, words in (
        ((p, [torch.zeros(4)], p, p, [], [], table, hyper, one, 0), "gradient 0"),
        ((p, p, [torch.zeros(4)], p, [], [], table, hyper, one, 0), "exp_avg"),
        ((p, p, p, p, [], [], table, hyper[:, 1:], one, 0), "hyper"),
        ((p, p, p, p, [], [], table + 1, hyper, one, 0), "adamw_: "),
    ):
        with pytest.raises(RuntimeError, match=words):
            gpu.ops.adamw_(*arguments)


def check_norm(gpu: ptx.Gpu, sizes: list[int], dtype: torch.dtype) -> None:
    grads = [torch.randn(size).to(dtype) * 10 ** (i % 7 - 3) for i, size in enumerate(sizes)]
    grads[0] = torch.cat([grads[0][:1], grads[0]])[1:]  # in the middle of a vector
    ours, expected = torch.full((2,), torch.nan, dtype=torch.float64)
    gpu.ops.grad_norm_squared_(ours, grads)
    torch.ops.fastft.grad_norm_squared_(expected, grads)
    assert torch.equal(ours.sqrt().float(), expected.sqrt().float()) and ours > 0
    assert not gpu.waits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sizes", [[20_001, 1, 63, 0, 507], [3] * 200], ids=["sizes", "more than a launch carries"]
)
def test_the_norm_is_that_of_the_cpu(gpu: ptx.Gpu, sizes: list[int], dtype: torch.dtype) -> None:
    check_norm(gpu, sizes, dtype)


def test_no_order_of_the_blocks_changes_the_norm() -> None:
    require_cuda()
    grads, norms = [torch.randn(size) for size in (70_001, 63, 40_000)], []
    for order in (None, 1, 2):
        with ptx.cuda_operators(90, order=order) as gpu:
            norms.append(torch.zeros((), dtype=torch.float64))
            gpu.ops.grad_norm_squared_(norms[-1], grads)
    assert torch.equal(norms[0], norms[1]) and torch.equal(norms[0], norms[2])


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_shows_a_number_that_is_none(
    gpu: ptx.Gpu, dtype: torch.dtype, value: float
) -> None:
    total, grad = torch.zeros((), dtype=torch.float64), torch.full((20_001,), 3e38).to(dtype)
    gpu.ops.grad_norm_squared_(total, [grad, torch.zeros(0)])
    assert total.sqrt().float() == grad.double().norm().float()
    grad[-1] = value
    gpu.ops.grad_norm_squared_(total, [torch.zeros(7), grad])
    assert not total.isfinite()
    gpu.ops.grad_norm_squared_(total, [])
    assert total == 0
