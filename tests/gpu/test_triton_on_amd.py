"""The Triton kernels compiled for AMD's chips, on which they have not run: no spills, nothing that
only CUDA has."""

from __future__ import annotations

import pytest
import torch
from support.row_problems import CASES, run

pytest.importorskip("triton")

import triton
import triton.language as tl
from support.amd_code import AmdCode, amd_code, of_cuda
from support.triton_calls import CODES, FULL, HALF, NIBBLES, adamw_on_meta, no_cache, rows_on_meta
from support.triton_compiler import compiled_for

from fastft.data.boundaries_triton import packed_boundaries
from fastft.loss.cross_entropy_rows_triton import cross_entropy_rows
from fastft.loss.scale_gradients_triton import scale_gradients_
from fastft.optim.adamw_update import Rounding
from fastft.optim.adamw_update_triton import adamw_

__all__ = ["no_cache"]  # a fixture

CHIPS = pytest.mark.parametrize("chip", ["gfx90a", "gfx942"])
ROWS = [
    ("in place", 151_936, HALF),
    ("in place", 50_257, FULL),
    ("everything in place", 151_936, HALF),
    ("everything in place", 50_257, HALF),
]
MODES = [
    (Rounding.FP32, FULL),
    (Rounding.EXACT, FULL),
    (Rounding.KAHAN, HALF),
    (Rounding.STOCHASTIC, HALF),
    (Rounding.STOCHASTIC, CODES),
    (Rounding.EXACT, CODES),
    (Rounding.STOCHASTIC, NIBBLES),
    (Rounding.EXACT, NIBBLES),
]


@triton.jit
def _planted_kernel(x):
    value = tl.load(x)
    tl.store(
        x,
        tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [value], tl.float32, True, 1),
    )


def assert_whole(code: AmdCode) -> None:
    assert code.wave == 64 and not code.of_cuda
    assert (code.vector_spills, code.scalar_spills, code.scratch) == (0, 0, 0)
    assert not any(name.startswith(("scratch_", "flat_")) for name in code.instructions)


@CHIPS
@pytest.mark.parametrize(("name", "classes", "dtype"), ROWS)
def test_cross_entropy(chip: str, name: str, classes: int, dtype: torch.dtype) -> None:
    with compiled_for(chip) as kernels:
        run(cross_entropy_rows, rows_on_meta(CASES[name], classes, dtype))
    code = amd_code(kernels[0])
    assert_whole(code)
    if classes % 16 == 0:  # a wave's access is of 512 bytes
        assert 64 in code.widths("load") and 64 in code.widths("store")


@CHIPS
@pytest.mark.parametrize(("rounding", "moment"), MODES)
def test_adamw(chip: str, rounding: Rounding, moment: torch.dtype) -> None:
    with compiled_for(chip) as kernels:
        adamw_(*adamw_on_meta(rounding, moment, amsgrad=False))
    code = amd_code(kernels[0])
    assert_whole(code)
    assert {64, 128} & code.widths("load") and {64, 128} & code.widths("store")


@CHIPS
def test_boundaries(chip: str) -> None:
    wide, narrow = ({"dtype": dtype, "device": "meta"} for dtype in (torch.int64, torch.int32))
    lengths, source = torch.empty(63, **wide), torch.empty(507, **wide)
    outputs = (
        torch.empty_like(source),
        torch.empty_like(source),
        torch.empty(507, **narrow),
        torch.empty(64, **narrow),
    )
    with compiled_for(chip) as kernels:
        packed_boundaries(lengths, lengths, source, 0, *outputs)
    assert len(kernels) == 2
    for kernel in kernels:
        assert_whole(amd_code(kernel))


@CHIPS
@pytest.mark.parametrize("dtype", [HALF, FULL, torch.float16])
def test_scaling(chip: str, dtype: torch.dtype) -> None:
    with compiled_for(chip) as kernels:
        scale_gradients_(
            [torch.empty(70_001, dtype=dtype, device="meta")], torch.empty((), device="meta")
        )
    code = amd_code(kernels[0])
    assert_whole(code)
    assert {64, 128} & code.widths("load") and {64, 128} & code.widths("store")


def test_what_is_of_cuda_is_found() -> None:
    with compiled_for(90) as kernels:
        _planted_kernel[(1,)](torch.empty(1, device="meta"))
    assert {"inline_asm", "llvm.nvvm"} <= of_cuda(kernels[0])
