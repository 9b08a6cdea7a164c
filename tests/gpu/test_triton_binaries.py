"""The machine code of the Triton kernels for GPUs that are not there: no spills, wide loads, few
compilations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.row_problems import CASES, EVERYTHING, Case, Problem, run

pytest.importorskip("triton")

from support.machine_code import Binary
from support.triton_compiler import binary, compiled_for

from fastft.loss.cross_entropy_rows_triton import cross_entropy_rows
from fastft.optim.adamw_update import RESIDUES, Rounding
from fastft.optim.adamw_update_triton import adamw_

HALF, FULL, CODES = torch.bfloat16, torch.float32, torch.int8


@pytest.fixture(scope="module", autouse=True)
def no_cache(tmp_path_factory: pytest.TempPathFactory):
    """What is looked at has been compiled by this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def on_meta(case: Case, classes: int, dtype: torch.dtype) -> Problem:
    rows = 64
    weight = [torch.empty(classes, device="meta")] if case.weighted else []
    logits = torch.empty(rows, classes, dtype=dtype, device="meta")
    target = torch.empty(rows, dtype=case.target_dtype, device="meta")
    return Problem(case, logits, target, weight, [torch.empty(rows, device="meta")] * case.upstream)


def compiled(case: Case, classes: int, dtype: torch.dtype, chip: int) -> Binary:
    with compiled_for(chip) as kernels:
        run(cross_entropy_rows, on_meta(case, classes, dtype))
    assert len(kernels) == 1
    return binary(kernels[0])


# 128256, 151936 and 256000 classes are one kernel, and 32000 classes the same with half the warps
@pytest.mark.parametrize(
    ("chip", "dtype"), [(75, HALF), (80, HALF), (90, HALF), (100, HALF), (90, FULL)]
)
@pytest.mark.parametrize("classes", [50_257, 151_936])
def test_no_spills(classes: int, chip: int, dtype: torch.dtype) -> None:
    code = compiled(CASES["everything in place"], classes, dtype, chip)
    assert (code.spills, code.stack, code.atomics) == (0, 0, 0)
    assert code.registers <= 96  # three quarters of what a thread of 16 warps may have


@pytest.mark.parametrize("dtype", [FULL, HALF])
@pytest.mark.parametrize("classes", [32_000, 50_257, 151_936])
def test_loads_and_stores_are_16_bytes_wide(classes: int, dtype: torch.dtype) -> None:
    code = compiled(CASES["in place"], classes, dtype, 90)
    loads, stores = code.widths("LDG"), code.widths("STG")
    # single elements: the target's logit; of a peeled row also the ends
    element, ends = dtype.itemsize * 8, classes % 16 != 0
    assert code.spills == 0 and loads[128] >= 4 and stores[128] >= 4
    assert (loads[element] > 8) == ends and (stores[element] > 8) == ends


@pytest.mark.parametrize(
    "case", ["plain", "smoothing", "smoothing and weight", "everything in place"]
)
def test_one_class_compiles(case: str) -> None:
    code = compiled(CASES[case], 1, FULL, 90)
    assert code.spills == 0


def test_all_vocabularies_of_a_kind_share_a_kernel() -> None:
    with compiled_for(90) as kernels:
        for classes in (128_256, 151_936, 256_000):
            run(cross_entropy_rows, on_meta(CASES["plain"], classes, HALF))
    assert kernels[0] is kernels[1] is kernels[2]


def test_a_number_that_changes_compiles_nothing() -> None:
    values = [
        replace(EVERYTHING, z_loss=z, softcap=c, label_smoothing=s)
        for z, c, s in [(0.5, 30.0, 0.1), (1.0, 1.0, 1.0), (0.0, 16.0, 0.5)]
    ]
    with compiled_for(90) as kernels:
        for case in values:
            run(cross_entropy_rows, on_meta(case, 32_000, HALF))
        for ignored in (-100, 0, 1, 16):
            problem = on_meta(values[0], 32_000, HALF)
            run(
                lambda *args, value=ignored: cross_entropy_rows(*args[:8], value, *args[9:]),
                problem,
            )
    assert all(kernel is kernels[0] for kernel in kernels)


def adamw_on_meta(rounding: Rounding, moment: torch.dtype, amsgrad: bool) -> list[Any]:
    """A call of `adamw_` over one parameter."""

    def one(dtype: torch.dtype, shape: tuple[int, ...] = (5, 1024)) -> list[torch.Tensor]:
        return [torch.empty(shape, dtype=dtype, device="meta")]

    kept, coded = FULL if rounding == Rounding.FP32 else HALF, moment == CODES
    residues = one(RESIDUES[rounding][1]) if rounding in RESIDUES else []
    scales = [*one(FULL, (5, 8)), *one(FULL, (5, 8))] if coded else []
    moments = (one(moment), one(torch.uint8 if coded else moment), one(moment) if amsgrad else [])
    table, hyper = torch.tensor([[0, rounding, amsgrad, 0]]), torch.zeros(1, 9)
    return [
        one(kept),
        one(kept),
        *moments,
        [*residues, *scales],
        table,
        hyper,
        torch.ones((), device="meta"),
        5,
    ]


@pytest.mark.parametrize(
    ("chip", "rounding", "moment", "amsgrad"),
    [
        (80, Rounding.EXACT, FULL, False),
        (90, Rounding.FP32, FULL, True),
        (90, Rounding.KAHAN, HALF, False),
        (100, Rounding.STOCHASTIC, HALF, True),
        (75, Rounding.EXACT, FULL, False),
        (75, Rounding.STOCHASTIC, CODES, False),
        (80, Rounding.STOCHASTIC, CODES, False),
        (90, Rounding.FP32, CODES, False),
        (100, Rounding.EXACT, CODES, False),
    ],
)
def test_adamw_has_no_spills_and_wide_accesses(
    chip: int, rounding: Rounding, moment: torch.dtype, amsgrad: bool
) -> None:
    with compiled_for(chip) as kernels:
        adamw_(*adamw_on_meta(rounding, moment, amsgrad))
    code = binary(kernels[0])
    kept, residues, coded = (
        FULL if rounding == Rounding.FP32 else HALF,
        rounding in RESIDUES,
        moment == CODES,
    )
    assert (code.spills, code.stack, code.atomics) == (0, 0, 0) and code.registers <= 128
    tensors = [kept, *[HALF] * residues] + ([] if coded else [moment] * (2 + amsgrad))
    # of 16 bytes, for a thread's eight elements
    vectors = sum(dtype.itemsize // 2 for dtype in tensors)
    assert (
        code.widths("STG")[128] >= vectors
        and code.widths("LDG")[128] >= vectors + kept.itemsize // 2
    )
    assert not coded or code.widths("STG")[64] >= 2  # eight codes
