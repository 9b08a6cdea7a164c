"""The machine code of the Triton kernels for GPUs that are not there: no spills, wide loads, few compilations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.row_problems import CASES, EVERYTHING, Case, Problem, draw, run

pytest.importorskip("triton")

from support.triton_compiler import Binary, binary, compiled_for

from fastft.loss.cross_entropy_triton import cross_entropy_rows

HALF, FULL = torch.bfloat16, torch.float32


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
@pytest.mark.parametrize(("chip", "dtype"), [(80, HALF), (90, HALF), (100, HALF), (90, FULL)])
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


def test_all_vocabularies_of_a_kind_share_a_kernel() -> None:
    with compiled_for(90) as kernels:
        for classes in (128_256, 151_936, 256_000):
            run(cross_entropy_rows, on_meta(CASES["plain"], classes, HALF))
    assert kernels[0] is kernels[1] is kernels[2]


def test_a_number_that_changes_compiles_nothing() -> None:
    values = [replace(EVERYTHING, z_loss=z, softcap=c, label_smoothing=s) for z, c, s in
              [(0.5, 30.0, 0.1), (1.0, 1.0, 1.0), (0.0, 16.0, 0.5)]]  # fmt: skip
    with compiled_for(90) as kernels:
        for case in values:
            run(cross_entropy_rows, on_meta(case, 32_000, HALF))
        for ignored in (-100, 0, 1, 16):
            problem = on_meta(values[0], 32_000, HALF)
            run(lambda *args, value=ignored: cross_entropy_rows(*args[:8], value, *args[9:]), problem)
    assert all(kernel is kernels[0] for kernel in kernels)


def test_compiles_what_was_interpreted_before() -> None:
    """The interpreter leaves nothing behind that the compiler would see."""
    from support.triton_interpreter import interpreted

    with interpreted():
        run(cross_entropy_rows, draw(EVERYTHING, 2, 63, HALF))
    with compiled_for(90) as kernels:
        run(cross_entropy_rows, on_meta(EVERYTHING, 63, HALF))
    assert kernels[0].asm["cubin"]
