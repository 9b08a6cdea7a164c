"""The machine that runs PTX, and through it every GPU kernel: what the others build on."""

from __future__ import annotations

import pytest
import torch
from support import ptx
from support.row_problems import EVERYTHING, check, draw

needs_nvcc = pytest.mark.skipif(
    ptx.missing() is not None, reason=f"the CUDA kernels: {ptx.missing()}"
)


@needs_nvcc
@pytest.mark.parametrize("chip", [80, 90])
def test_a_cuda_launch(chip: int) -> None:
    with ptx.cuda_operators(chip) as gpu:
        check(gpu.ops.cross_entropy_rows, draw(EVERYTHING, 5, 507, torch.bfloat16))
    (launch,) = gpu.launches
    assert launch.kernel == "rows_kernel<__nv_bfloat16, true>" and launch.grid == (5, 1, 1)
    assert launch.bytes_written > 5 * 507 * 2 and launch.instructions > 0 and not gpu.waits


@pytest.mark.parametrize("chip", [80, 90])
def test_a_triton_launch(chip: int) -> None:
    pytest.importorskip("triton")
    from fastft.loss.cross_entropy_rows_triton import cross_entropy_rows

    with ptx.triton_as_ptx(chip) as launches:
        check(cross_entropy_rows, draw(EVERYTHING, 5, 507, torch.bfloat16))
    assert launches[0].kernel == "_rows_kernel" and launches[0].grid == (5, 1, 1)
