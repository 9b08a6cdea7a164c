"""Calls of the Triton kernels to be compiled for GPUs that are not there: tensors of the device
"meta", nothing of a compilation before."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastft.optim.adamw_update import RESIDUES, Rounding
from support.row_problems import Case, Problem

HALF, FULL, CODES, NIBBLES = torch.bfloat16, torch.float32, torch.int8, torch.uint8


@pytest.fixture(scope="module", autouse=True)
def no_cache(tmp_path_factory: pytest.TempPathFactory):
    """What is looked at has been compiled by this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def rows_on_meta(case: Case, classes: int, dtype: torch.dtype) -> Problem:
    rows = 64
    weight = [torch.empty(classes, device="meta")] if case.weighted else []
    logits = torch.empty(rows, classes, dtype=dtype, device="meta")
    target = torch.empty(rows, dtype=case.target_dtype, device="meta")
    return Problem(case, logits, target, weight, [torch.empty(rows, device="meta")] * case.upstream)


def adamw_on_meta(rounding: Rounding, moment: torch.dtype, amsgrad: bool) -> list[Any]:
    """A call of `adamw_` over one parameter."""

    def one(dtype: torch.dtype, shape: tuple[int, ...] = (5, 1024)) -> list[torch.Tensor]:
        return [torch.empty(shape, dtype=dtype, device="meta")]

    kept, coded = FULL if rounding == Rounding.FP32 else HALF, moment in (CODES, NIBBLES)
    residues = one(RESIDUES[rounding][1]) if rounding in RESIDUES else []
    scales = [*one(FULL, (5, 8)), *one(FULL, (5, 8))] if coded else []
    exp_avg = one(moment, (5, 512)) if moment == NIBBLES else one(moment)
    tensors = [one(kept), one(kept), exp_avg, one(torch.uint8 if coded else moment)]
    tensors += [one(moment) if amsgrad else [], [*residues, *scales]]
    table, hyper = torch.tensor([[0, rounding, amsgrad, 0]]), torch.zeros(1, 9)
    return [*tensors, table, hyper, torch.ones((), device="meta"), 5]
