"""The machine code of the Triton kernels for GPUs that are not there: no spills, few compilations.
Registers and widths of this version of Triton are in benchmarks/results/kernels.md."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version
from support.row_problems import CASES, EVERYTHING, Case, run

pytest.importorskip("triton")

from support.machine_code import Binary
from support.triton_calls import CODES, FULL, HALF, NIBBLES, adamw_on_meta, no_cache, rows_on_meta
from support.triton_compiler import binary, compiled_for

from fastft.loss.cross_entropy_rows_triton import cross_entropy_rows
from fastft.optim.adamw_update import Rounding
from fastft.optim.adamw_update_triton import adamw_

__all__ = ["no_cache"]  # a fixture


def compiled(case: Case, classes: int, dtype: torch.dtype, chip: int) -> Binary:
    with compiled_for(chip) as kernels:
        run(cross_entropy_rows, rows_on_meta(case, classes, dtype))
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


@pytest.mark.parametrize(
    "case", ["plain", "smoothing", "smoothing and weight", "everything in place"]
)
def test_one_class_compiles(case: str) -> None:
    code = compiled(CASES[case], 1, FULL, 90)
    assert code.spills == 0


def test_all_vocabularies_of_a_kind_share_a_kernel() -> None:
    with compiled_for(90) as kernels:
        for classes in (128_256, 151_936, 256_000):
            run(cross_entropy_rows, rows_on_meta(CASES["plain"], classes, HALF))
    assert kernels[0] is kernels[1] is kernels[2]


def test_a_number_that_changes_compiles_nothing() -> None:
    values = [
        replace(EVERYTHING, z_loss=z, softcap=c, label_smoothing=s)
        for z, c, s in [(0.5, 30.0, 0.1), (1.0, 1.0, 1.0), (0.0, 16.0, 0.5)]
    ]
    with compiled_for(90) as kernels:
        for case in values:
            run(cross_entropy_rows, rows_on_meta(case, 32_000, HALF))
        for ignored in (-100, 0, 1, 16):
            problem = rows_on_meta(values[0], 32_000, HALF)
            run(
                lambda *args, value=ignored: cross_entropy_rows(*args[:8], value, *args[9:]),
                problem,
            )
    assert all(kernel is kernels[0] for kernel in kernels)


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
        (75, Rounding.STOCHASTIC, NIBBLES, False),
        (80, Rounding.KAHAN, NIBBLES, False),
        (90, Rounding.FP32, NIBBLES, False),
        (100, Rounding.EXACT, NIBBLES, False),
    ],
)
def test_adamw_has_no_spills(
    chip: int, rounding: Rounding, moment: torch.dtype, amsgrad: bool
) -> None:
    with compiled_for(chip) as kernels:
        adamw_(*adamw_on_meta(rounding, moment, amsgrad))
    code = binary(kernels[0])
    # with the compiler of Triton 3.6 one register of one of these kernels
    older = Version(version("triton")) < Version("3.7") and moment is HALF
    assert code.spills <= 4 * older and code.stack <= 8 * older and code.atomics == 0
