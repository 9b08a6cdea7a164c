"""The CUDA kernels, compiled by g++ and run on the CPU: what they compute, not how fast, nor on a GPU."""

from __future__ import annotations

import ctypes
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import cuda_host
from support.row_problems import CASES, EVERYTHING, IGNORED, Case, check, draw, run

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


# from a block of 8 warps to one of 32; the last two rows do not fit into shared memory and are read twice
@pytest.mark.parametrize("padding", [0, 3, 8])
@pytest.mark.parametrize("classes", [5_000, 40_003, 60_000])
def test_long_rows(emulated: Any, order: None, classes: int, padding: int) -> None:
    dtype = torch.bfloat16 if classes == 5_000 else torch.float32
    for case in (CASES["in place"], EVERYTHING):
        check(emulated.cross_entropy_rows, draw(case, 2, classes, dtype, padding=padding))


def test_the_order_of_threads_and_blocks_changes_no_bit(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = draw(CASES["everything in place"], 9, 5_001, torch.bfloat16)
    results = []
    for seed in SEEDS:
        monkeypatch.setenv("FASTFT_EMULATION_SEED", seed)
        results.append(run(emulated.cross_entropy_rows, problem))
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


@pytest.mark.parametrize("position", [3, 500], ids=["other", "target"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_none(emulated: Any, value: float, position: int) -> None:
    problem = draw(Case(), 3, 507, torch.float32)
    problem.target[0], problem.logits[0, position] = 500, value
    ours = run(emulated.cross_entropy_rows, problem)
    leaf = problem.logits.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(leaf, problem.target, reduction="none", ignore_index=IGNORED)
    (losses * problem.upstream[0]).sum().backward()
    assert torch.equal(ours["losses"].isnan(), losses.isnan()) and torch.equal(ours["losses"].isinf(), losses.isinf())
    assert torch.equal(ours["grad"].isnan(), leaf.grad.isnan())


@pytest.mark.parametrize("target", [-1, 63, 2**31 - 1])
def test_a_target_out_of_range_is_nan_in_its_row(emulated: Any, target: int) -> None:
    problem = draw(EVERYTHING, 3, 63, torch.float32)
    problem.target[0] = target
    ours = run(emulated.cross_entropy_rows, problem)
    assert ours["losses"][0].isnan() and ours["grad"][0].isnan().all() and not ours["is_top1"][0]
    assert all(value[1:].isfinite().all() for value in ours.values())


def test_ties_count_for_the_first_class(emulated: Any) -> None:
    problem = draw(Case(statistics=True), 4, 63, torch.float32)
    problem.logits[:, [7, 40]] = 100.0
    problem.target.copy_(torch.tensor([7, 40, 8, IGNORED]))
    assert run(emulated.cross_entropy_rows, problem)["is_top1"].tolist() == [True, False, False, False]


def test_arguments_are_checked(emulated: Any) -> None:
    problem = draw(EVERYTHING, 3, 63, torch.float32)
    for broken in (
        replace(problem, target=problem.target[:2]),
        replace(problem, weight=[torch.ones(62)]),
        replace(problem, upstream=problem.upstream[:2]),
        replace(problem, logits=problem.logits.double()),
    ):
        with pytest.raises(RuntimeError, match="cross_entropy_rows: "):
            run(emulated.cross_entropy_rows, broken)


FAULTY = r"""
#include <cuda_runtime.h>
#include "launch.h"
__global__ void reverse(int* out, bool barrier) {
  FASTFT_SHARED(shared);
  int* numbers = reinterpret_cast<int*>(shared);
  numbers[threadIdx.x] = threadIdx.x;
  if (barrier) __syncthreads();
  out[threadIdx.x] = numbers[blockDim.x - 1 - threadIdx.x];
}
__global__ void diverge(int* out, bool together) {
  if (together || threadIdx.x < 7) __syncthreads();
  else __syncthreads();
  out[threadIdx.x] = 1;
}
FASTFT_EXPORT const char* launch(int* out, int which, bool right) {
  try {
    if (which == 0) FASTFT_LAUNCH(reverse, 1, 64, 256, nullptr, out, right);
    else FASTFT_LAUNCH(diverge, 1, 64, 0, nullptr, out, right);
  } catch (const std::exception& error) {
    return "failed";
  }
  return "ran";
}
"""


def test_the_emulation_finds_faults(order: None, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / "faulty"
    if not folder.exists():
        folder.mkdir()
        (folder / "faulty.cu").write_text(FAULTY)
        cuda_host.build(folder, [folder / "faulty.cu"])
    library = ctypes.CDLL(str(folder / "libemulated.so"))
    library.launch.restype = ctypes.c_char_p
    out = torch.zeros(64, dtype=torch.int32)

    def launch(which: int, right: bool) -> bytes:
        return library.launch(ctypes.c_void_p(out.data_ptr()), which, right)

    assert launch(0, True) == b"ran" and out.tolist() == list(range(63, -1, -1))
    assert launch(0, False) == b"ran" and out.tolist() != list(range(63, -1, -1))
    assert launch(1, True) == b"ran"
    assert launch(1, False) == b"failed"
