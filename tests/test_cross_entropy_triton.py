"""The Triton kernel of `cross_entropy_rows`, interpreted on the CPU with bounds and race checks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.row_problems import CASES, EVERYTHING, IGNORED, Case, Problem, check, draw, run

pytest.importorskip("triton")

import triton
import triton.language as tl
from support.triton_interpreter import MemoryFault, interpreted

from fastft.loss.cross_entropy_triton import cross_entropy_rows
from fastft.ops import OPERATORS

SIZES = [(1, torch.float32), (63, torch.float16), (507, torch.float32), (507, torch.bfloat16)]


@pytest.mark.parametrize(("classes", "dtype"), SIZES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_option(case: Case, classes: int, dtype: torch.dtype) -> None:
    with interpreted():
        check(cross_entropy_rows, draw(case, 5, classes, dtype))


@pytest.mark.parametrize("padding", [1, 8, 24])
@pytest.mark.parametrize("classes", [1000, 1024, 2051])
def test_rows_at_any_distance(classes: int, padding: int) -> None:
    """Rows that start on 16 bytes or off them, in logits and gradient alike or not; one block of rows or several."""
    for case in (EVERYTHING, CASES["in place"]):
        with interpreted():
            check(cross_entropy_rows, draw(case, 4, classes, torch.bfloat16, padding=padding))


@pytest.mark.parametrize("margin", [0.1, 3.3, 10.7, 25.0, 31.9, 60.2])
def test_a_confident_row_has_all_its_digits(margin: float) -> None:
    """Where fp32 torch has no loss left: relative to the loss, not to what torch gets."""
    logits = torch.tensor([[margin, 0.0], [0.0, -margin]])
    problem = Problem(Case(), logits, torch.zeros(2, dtype=torch.int64), [], [torch.ones(2)])
    with interpreted():
        ours = run(cross_entropy_rows, problem)
    exponential = (logits[:, 1] - logits[:, 0]).double().exp()
    for actual, truth in ((ours["losses"], exponential.log1p()), (ours["grad"][:, 1], exponential / (1 + exponential))):
        assert torch.allclose(actual.double(), truth, rtol=4 * torch.finfo(torch.float32).eps, atol=0.0)
    assert torch.equal(ours["grad"][:, 0], -ours["grad"][:, 1])


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows: int) -> None:
    with interpreted():
        check(cross_entropy_rows, draw(EVERYTHING, rows, 63, torch.bfloat16))


def test_the_order_of_the_programs_changes_no_bit() -> None:
    problem = draw(CASES["everything in place"], 9, 1001, torch.bfloat16)
    results = []
    for order in (None, 1, 2):
        with interpreted(order):
            results.append(run(cross_entropy_rows, problem))
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


@pytest.mark.parametrize("classes", [1000, 50_257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("case", "reads"), [("forward", 1), ("in place", 2)])
def test_bytes_are_those_of_the_docstring(case: str, reads: int, dtype: torch.dtype, classes: int) -> None:
    problem = draw(CASES[case], 2, classes, dtype)
    with interpreted() as launches:
        run(cross_entropy_rows, problem)
    assert len(launches) == 1
    row, small = classes * dtype.itemsize, 2 * 24  # targets, upstream, the target's logit; losses and lse
    assert 0 <= launches[0].bytes_read - 2 * reads * row <= small
    assert 0 <= launches[0].bytes_written - 2 * (reads - 1) * row <= small


def poisoned(problem: Problem, position: int, value: float) -> Problem:
    problem.logits[0, position] = value
    return problem


@pytest.mark.parametrize("position", [3, 500], ids=["other", "target"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_none(value: float, position: int) -> None:
    """NaN and infinities come out as torch's, and stay in their row."""
    problem = draw(Case(), 3, 507, torch.float32)
    problem.target[0] = 500
    with interpreted():
        ours = check_finite_rows(poisoned(problem, position, value))
    leaf = problem.logits.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(leaf, problem.target, reduction="none", ignore_index=IGNORED)
    (losses * problem.upstream[0]).sum().backward()
    assert torch.equal(ours["losses"].isnan(), losses.isnan()) and torch.equal(ours["losses"].isinf(), losses.isinf())
    assert torch.equal(ours["grad"].isnan(), leaf.grad.isnan())


def check_finite_rows(problem: Problem) -> dict[str, torch.Tensor]:
    ours = run(cross_entropy_rows, problem)
    assert all(value[1:].isfinite().all() for value in ours.values())
    return ours


def test_a_row_of_minus_infinity_is_nan() -> None:
    problem = draw(Case(), 3, 63, torch.float32)
    problem.logits[0] = -torch.inf
    with interpreted():
        ours = check_finite_rows(problem)
    assert ours["losses"][0].isnan() and ours["grad"][0].isnan().all()


@pytest.mark.parametrize("target", [-1, 63, 2**31 - 1])
def test_a_target_out_of_range_is_nan_in_its_row(target: int) -> None:
    problem = draw(EVERYTHING, 3, 63, torch.float32)
    problem.target[0] = target
    with interpreted():
        ours = check_finite_rows(problem)
    assert ours["losses"][0].isnan() and ours["grad"][0].isnan().all() and not ours["is_top1"][0]


def test_ties_count_for_the_first_class() -> None:
    problem = draw(Case(statistics=True), 4, 63, torch.float32)
    problem.logits[:, [7, 40]] = 100.0
    problem.target.copy_(torch.tensor([7, 40, 8, IGNORED]))
    with interpreted():
        assert run(cross_entropy_rows, problem)["is_top1"].tolist() == [True, False, False, False]


def test_offsets_pass_two_to_the_31() -> None:
    near = draw(CASES["plain"], 5, 63, torch.bfloat16)
    far = torch.empty(2**31 + 200, dtype=torch.bfloat16)  # untouched pages cost nothing
    with interpreted():
        check(cross_entropy_rows, replace(near, logits=far.as_strided((5, 63), (2**29 + 8, 1)).copy_(near.logits)))


@triton.jit
def _faulty_kernel(x, n, STEP: tl.constexpr, TILE: tl.constexpr):
    position = tl.program_id(0) * STEP + tl.arange(0, TILE)
    tl.store(x + position, tl.load(x + position, position < n) + 1, position < n)


@pytest.mark.parametrize(("n", "step", "fault"), [(16, 8, None), (17, 8, "outside"), (16, 7, "race")])
def test_the_interpreter_finds_faults(n: int, step: int, fault: str | None) -> None:
    x = torch.zeros(16, dtype=torch.int32)
    with interpreted():
        if fault is None:
            _faulty_kernel[(2,)](x, n, STEP=step, TILE=8)
            assert x.eq(1).all()
        else:
            with pytest.raises(MemoryFault, match=fault):
                _faulty_kernel[(3,)](x, n, STEP=step, TILE=8)


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(TypeError, match="logits must be float32, bfloat16 or float16"):
        run(cross_entropy_rows, draw(Case(), 2, 3, torch.float64))


def test_tensors_on_the_cpu_are_refused() -> None:
    with pytest.raises(RuntimeError, match="impl='triton' is not available for cross_entropy_rows"):
        OPERATORS["cross_entropy_rows"].resolve("triton", torch.device("cpu"))
    with pytest.raises(RuntimeError, match="grad_norm_squared_ has no triton kernel"):
        OPERATORS["grad_norm_squared_"].resolve("triton", torch.device("cuda"))
