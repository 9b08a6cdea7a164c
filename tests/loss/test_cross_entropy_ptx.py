"""`cross_entropy_rows` as CUDA and Triton compute it: compiled for sm_80 and sm_90 and executed as
PTX.

By default a case of each option; `make ptx` runs the whole table of options, dtypes and sizes on
both chips.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.ptx.engines import ENGINES, Engine, operator
from support.row_problems import CASES, EVERYTHING, IGNORED, Case, Problem, check, draw, plain, run

from fastft.loss.cross_entropy_rows import ROWS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CUDA_80, CUDA_90, TRITON_80, TRITON_90 = ENGINES
engines = pytest.mark.parametrize("engine", ENGINES, ids=str)


def whole_table() -> list[Any]:
    """Every case on every engine, chip, dtype and size; those that run by default have each option
    once a chip."""
    quick = {
        CUDA_90: [(507, "bf16", CASES), (1, "fp16", ["everything"])],
        CUDA_80: [(63, "fp32", CASES), (507, "fp16", ["everything in place"])],
        TRITON_90: [(507, "bf16", CASES), (1, "fp32", ["everything"])],
        TRITON_80: [(63, "fp32", ["plain", "in place", "everything", "everything in place"])],
    }
    table = []
    for engine in ENGINES:
        by_default = {(size, dtype, name) for size, dtype, names in quick[engine] for name in names}
        for size in (1, 63, 507):
            for dtype in DTYPES:
                for name in CASES:
                    marks = () if (size, dtype, name) in by_default else pytest.mark.ptx
                    label = f"{engine}-{size}-{dtype}-{name}"
                    table.append(pytest.param(engine, size, dtype, name, id=label, marks=marks))
    return table


@pytest.mark.parametrize(("engine", "classes", "dtype", "case"), whole_table())
def test_every_option(engine: Engine, classes: int, dtype: str, case: str) -> None:
    with operator(engine, ROWS.name) as (row_kernel, _):
        check(row_kernel, draw(CASES[case], 5, classes, DTYPES[dtype]))


@pytest.mark.ptx
@engines
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_every_option_with_approximations_that_are_off_by_two_ulp(
    engine: Engine, dtype: str, case: str
) -> None:
    with operator(engine, ROWS.name, noise_ulp=2) as (row_kernel, _):
        check(row_kernel, draw(CASES[case], 5, 507, DTYPES[dtype]))


@engines
def test_approximations_that_are_off_by_two_ulp(engine: Engine) -> None:
    with operator(engine, ROWS.name, noise_ulp=2) as (row_kernel, _):
        check(row_kernel, draw(CASES["everything in place"], 3, 507, torch.bfloat16))


@engines
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("classes", [7, 512], ids=["single elements", "vectors"])
def test_gradients_are_rounded_to_nearest(engine: Engine, classes: int, dtype: str) -> None:
    """Truncation is within twice torch's error, but makes every second number another."""
    problem = draw(CASES["plain"], 12, classes, DTYPES[dtype])
    counted = problem.target != IGNORED
    with operator(engine, ROWS.name) as (row_kernel, _):
        ours = run(row_kernel, problem)["grad"][counted]
    nearest = plain(problem, torch.float64)["grad"][counted].to(ours.dtype)
    assert (ours == nearest).double().mean() > 0.95


LONG = [
    *[(size, "bf16", padding) for size in (5_000, 151_936) for padding in (0, 3, 8)],
    *[(size, "fp32", padding) for size in (2_051, 40_003, 60_000) for padding in (0, 3, 8)],
]
QUICK = [(5_000, "bf16", 3), (40_003, "fp32", 0), (60_000, "fp32", 8)]


def long_rows() -> list[Any]:
    quick = {engine: QUICK[: 1 if engine == TRITON_80 else 3] for engine in ENGINES}
    rows = [
        (engine, *row, () if row in quick[engine] else pytest.mark.ptx)
        for engine in ENGINES
        for row in LONG
    ]
    return [pytest.param(*row, id="-".join(map(str, row)), marks=marks) for *row, marks in rows]


@pytest.mark.parametrize(("engine", "classes", "dtype", "padding"), long_rows())
def test_long_rows_at_any_distance(engine: Engine, classes: int, dtype: str, padding: int) -> None:
    """Rows of one block and of several, that fit into shared memory and that do not, on 16 bytes
    and off them."""
    with operator(engine, ROWS.name) as (row_kernel, _):
        for case in (CASES["in place"], EVERYTHING):
            check(row_kernel, draw(case, 2, classes, DTYPES[dtype], padding=padding))


@engines
def test_the_order_of_the_blocks_changes_no_bit(engine: Engine) -> None:
    problem = draw(CASES["everything in place"], 9, 1_001, torch.bfloat16)
    results = []
    for order in (None, 1, 2):
        with operator(engine, ROWS.name, order=order) as (row_kernel, _):
            results.append(run(row_kernel, problem))
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


@engines
@pytest.mark.parametrize("position", [3, 500], ids=["other", "target"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_none(engine: Engine, value: float, position: int) -> None:
    """NaN and infinities come out as torch's, and stay in their row."""
    problem = draw(Case(), 3, 507, torch.float32)
    problem.target[0], problem.logits[0, position] = 500, value
    with operator(engine, ROWS.name) as (row_kernel, _):
        ours = run(row_kernel, problem)
    assert all(value[1:].isfinite().all() for value in ours.values())
    leaf = problem.logits.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(
        leaf, problem.target, reduction="none", ignore_index=IGNORED
    )
    (losses * problem.upstream[0]).sum().backward()
    assert torch.equal(ours["losses"].isnan(), losses.isnan()) and torch.equal(
        ours["losses"].isinf(), losses.isinf()
    )
    assert torch.equal(ours["grad"].isnan(), leaf.grad.isnan())


@engines
def test_a_row_of_minus_infinity_is_nan(engine: Engine) -> None:
    problem = draw(Case(), 3, 507, torch.float32)
    problem.logits[0] = -torch.inf
    with operator(engine, ROWS.name) as (row_kernel, _):
        ours = run(row_kernel, problem)
    assert ours["losses"][0].isnan() and ours["grad"][0].isnan().all()
    assert all(value[1:].isfinite().all() for value in ours.values())


@engines
@pytest.mark.parametrize("margin", [0.1, 3.3, 10.7, 25.0, 31.9, 60.2])
def test_a_confident_row_has_all_its_digits(engine: Engine, margin: float) -> None:
    """Where fp32 torch has no loss left: relative to the loss, not to what torch gets."""
    logits = torch.tensor([[margin, 0.0], [0.0, -margin]])
    problem = Problem(Case(), logits, torch.zeros(2, dtype=torch.int64), [], [torch.ones(2)])
    with operator(engine, ROWS.name) as (row_kernel, _):
        ours = run(row_kernel, problem)
    exponential = (logits[:, 1] - logits[:, 0]).double().exp()
    share = exponential / (1 + exponential)
    for actual, truth in (
        (ours["losses"], exponential.log1p()),
        (ours["grad"], torch.stack([-share, share], 1)),
    ):
        assert torch.allclose(
            actual.double(), truth, rtol=4 * torch.finfo(torch.float32).eps, atol=0.0
        )


@engines
@pytest.mark.parametrize("target", [-1, 63, 2**31 - 1])
def test_a_target_out_of_range_is_nan_in_its_row(engine: Engine, target: int) -> None:
    problem = draw(EVERYTHING, 3, 63, torch.float32)
    problem.target[0] = target
    with operator(engine, ROWS.name) as (row_kernel, _):
        ours = run(row_kernel, problem)
    assert ours["losses"][0].isnan() and ours["grad"][0].isnan().all() and not ours["is_top1"][0]
    assert all(value[1:].isfinite().all() for value in ours.values())


@engines
def test_ties_count_for_the_first_class(engine: Engine) -> None:
    problem = draw(Case(statistics=True), 4, 63, torch.float32)
    problem.logits[:, [7, 40]] = 100.0
    problem.target.copy_(torch.tensor([7, 40, 8, IGNORED]))
    with operator(engine, ROWS.name) as (row_kernel, _):
        assert run(row_kernel, problem)["is_top1"].tolist() == [True, False, False, False]


@engines
@pytest.mark.parametrize("count", [0, 1])
def test_few_rows(engine: Engine, count: int) -> None:
    with operator(engine, ROWS.name) as (row_kernel, launches):
        check(row_kernel, draw(EVERYTHING, count, 63, torch.float32))
    assert len(launches) == count


@engines
@pytest.mark.parametrize("case", ["plain", "in place"])
def test_offsets_pass_two_to_the_31(engine: Engine, case: str) -> None:
    near = draw(CASES[case], 5, 63, torch.bfloat16)
    far = torch.empty(2**31 + 200, dtype=torch.bfloat16)  # untouched pages cost nothing
    with operator(engine, ROWS.name) as (row_kernel, _):
        check(
            row_kernel,
            replace(near, logits=far.as_strided((5, 63), (2**29 + 8, 1)).copy_(near.logits)),
        )


@pytest.mark.parametrize("classes", [1_000, 50_257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("case", "reads"), [("forward", 1), ("in place", 2)])
def test_bytes_are_those_of_triton_s_docstring(
    case: str, reads: int, dtype: torch.dtype, classes: int
) -> None:
    with operator(TRITON_90, ROWS.name) as (row_kernel, launches):
        run(row_kernel, draw(CASES[case], 2, classes, dtype))
    (launch,) = launches
    # targets, upstream, the target's logit; the results
    row, small = classes * dtype.itemsize, 2 * launch.block * 24
    assert 0 <= launch.bytes_read - 2 * reads * row <= small
    assert 0 <= launch.bytes_written - 2 * (reads - 1) * row <= small


def test_arguments_are_checked() -> None:
    problem = draw(EVERYTHING, 3, 63, torch.float32)
    with operator(CUDA_90, ROWS.name) as (row_kernel, launches):
        for broken in (
            replace(problem, target=problem.target[:2]),
            replace(problem, weight=[torch.ones(62)]),
            replace(problem, upstream=problem.upstream[:2]),
            replace(problem, logits=problem.logits.double()),
        ):
            with pytest.raises(RuntimeError, match="cross_entropy_rows: "):
                run(row_kernel, broken)
    assert not launches


def test_triton_refuses_other_dtypes() -> None:
    with operator(TRITON_90, ROWS.name) as (row_kernel, _):
        with pytest.raises(TypeError, match="logits must be float32, bfloat16 or float16"):
            run(row_kernel, draw(Case(), 2, 3, torch.float64))
