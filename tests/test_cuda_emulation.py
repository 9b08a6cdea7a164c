"""The CUDA kernels, compiled by g++ and run on the CPU: what they compute, not how fast, nor on a GPU."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from numerics import assert_no_worse
from support import cuda_host
from support.row_problems import CASES, EVERYTHING, IGNORED, Case, check, draw, run

import fastft
from fastft.optim import adamw

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")

SEEDS = ["0", "1", "2"]
SIZES = [(1, torch.float32), (63, torch.float16), (507, torch.float32), (507, torch.bfloat16)]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return cuda_host.operators(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(params=SEEDS)
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTFT_EMULATION_SEED", request.param)


@pytest.mark.parametrize(("classes", "dtype"), SIZES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_option(emulated: Any, order: None, case: Case, classes: int, dtype: torch.dtype) -> None:
    check(emulated.cross_entropy_rows, draw(case, 5, classes, dtype))
