"""No kernel may cost more than its row of benchmarks/results/kernels.json, and what the rows must
hold.

The whole table is marked `ptx` (`make ptx`); by default a row of each kernel and engine is counted
anew.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from support.device_mode import DeviceMode
from support.host_calls import operator_calls, python_calls, versions
from support.host_work import PIECES, adamw, attention, batch, loss, stand_ins, work_of
from support.kernel_counts import CHIPS, ENGINES, Figures, count, kernels, worse
from support.machine_code import Binary, assembled, binaries
from support.ptx import missing

import fastft

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
ROWS: dict[str, Any] = json.loads((RESULTS / "kernels.json").read_text())
EVERY = {
    kernel.key(chip): (kernel, chip)
    for each in ENGINES
    for kernel in kernels(each)
    for chip in CHIPS
}
SAMPLE = (
    "cuda, cross-entropy, plain, bf16, V=128256, sm_90",
    "cuda, cross-entropy, all options, bf16, V=50257, sm_80",
    "cuda, AdamW, exact, moments fp32, sm_90",
    "cuda, AdamW, stochastic, moments 8-bit, sm_90",
    "cuda, AdamW, exact, moments 4-bit, sm_90",
    "cuda, norm of gradients, bf16, sm_90",
    "cuda, boundaries, tokens, sm_90",
    "cuda, scaling of gradients, bf16, sm_90",
    "triton, cross-entropy, plain, bf16, V=128256, sm_90",
    "triton, AdamW, exact, moments fp32, sm_80",
    "triton, AdamW, stochastic, moments 8-bit, sm_90",
    "triton, AdamW, exact, moments 4-bit, sm_90",
    "triton, boundaries, tokens, sm_90",
    "triton, scaling of gradients, bf16, sm_90",
)
Prepare = Callable[[DeviceMode], Callable[[], Any]]
MUST_HOLD = "cuda, cross-entropy, plain, bf16, V=128256"
needs_nvcc = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@functools.cache
def counted(key: str) -> Figures:
    kernel, chip = EVERY[key]
    if kernel.engine == "cuda" and missing():
        pytest.skip(f"{key}: {missing()}")
    return count(kernel, chip)


def row(key: str) -> Figures:
    assert key in ROWS["kernels"], f"no row of {key}: make kernels"
    return Figures(**ROWS["kernels"][key])


@pytest.mark.parametrize(
    "key", [pytest.param(k, marks=[] if k in SAMPLE else [pytest.mark.ptx]) for k in EVERY]
)
def test_no_kernel_is_worse_than_its_row(key: str) -> None:
    now, before = counted(key), row(key)
    found = "; ".join(worse(before, now))
    if now.compiler != before.compiler:
        pytest.skip(
            f"{key}: the row is of {before.compiler}, this is {now.compiler}: {found or 'no worse'}"
        )
    assert not found, f"{key}: {found} (make kernels, if it must be so)"


def test_every_row_is_of_a_kernel_that_there_is() -> None:
    assert list(ROWS["kernels"]) == list(EVERY) and list(ROWS["steps"]) == list(PIECES), (
        "make kernels"
    )


def test_the_page_shows_the_rows() -> None:
    spec = importlib.util.spec_from_file_location(
        "kernel_table", ROOT / "benchmarks" / "kernel_table.py"
    )
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    assert (RESULTS / "kernels.md").read_text() == table.page(ROWS), "make kernels"


@pytest.mark.parametrize(
    ("name", "better"),
    [
        ("instructions", lambda value: value * 0.98),
        ("read", lambda value: value * 0.98),
        ("written", lambda value: value * 0.98),
        ("load_bytes", lambda value: value * 1.1),
        ("store_bytes", lambda value: value * 1.1),
        ("loads", lambda value: {"256": 1}),
        ("stores", lambda value: {"256": 1}),
        ("registers", lambda value: value - 5),
        ("spills", lambda value: value - 1),
        ("stack", lambda value: value - 8),
        ("warps", lambda value: value + 4),
    ],
)
def test_a_row_that_is_better_than_its_kernel_is_found(name: str, better: Any) -> None:
    now = counted("triton, AdamW, exact, moments fp32, sm_80")
    (found,) = worse(replace(now, **{name: better(getattr(now, name))}), now)
    assert name in found and not worse(now, now)


COPIES = """
struct alignas(16) Vector { unsigned short at[8]; };
__global__ void wide_kernel(const uint4* from, uint4* to) { to[threadIdx.x] = from[threadIdx.x]; }
__global__ void narrow_kernel(const uint4* from, volatile unsigned short* to) {
  const uint4 value = from[threadIdx.x];
  const Vector pieces = reinterpret_cast<const Vector&>(value);
  for (int i = 0; i < 8; i++) to[threadIdx.x * 8 + i] = pieces.at[i];
}
__global__ void __launch_bounds__(1024, 2) spilling_kernel(const float* from, float* to) {
  float values[64];
#pragma unroll
  for (int i = 0; i < 64; i++) values[i] = from[threadIdx.x * 64 + i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; i++) to[threadIdx.x * 64 + i] = values[i] * values[63 - i];
}
"""


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Binary]:
    folder = tmp_path_factory.mktemp("copies")
    (folder / "copies.cu").write_text(COPIES)
    found = binaries(assembled(folder / "copies.cu", 90, folder))
    return {
        name: next(code for key, code in found.items() if name in key)
        for name in ("wide", "narrow", "spilling")
    }


@needs_nvcc
def test_stores_of_two_bytes_are_found(copies: dict[str, Binary]) -> None:
    assert copies["wide"].stores == {128: 1} and copies["narrow"].stores == {16: 8}
    assert copies["wide"].loads == copies["narrow"].loads == {128: 1}
    before = Figures("nvcc", 1, 0, 0, 0, 2, 2, 16, 16, {"128": 1}, {"128": 1})
    now = replace(before, stores={"16": 8}, store_bytes=2.0)
    assert len(worse(before, now)) == 2 and not worse(now, before)


@needs_nvcc
def test_spills_and_stack_are_found(copies: dict[str, Binary]) -> None:
    assert (
        copies["spilling"].spills > 0
        and copies["spilling"].stack > 0
        and copies["wide"].spills == 0
    )
    assert copies["spilling"].registers <= 32


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "warps"),
    [
        (60, 1024, 816, 32),
        (95, 128, 0, 20),
        (118, 128, 0, 16),
        (32, 256, 2048, 64),
        (33, 256, 0, 48),
        (60, 512, 101_344, 32),
        (60, 512, 200_000, 16),
    ],
)
def test_warps_of_an_sm(registers: int, threads: int, shared: int, warps: int) -> None:
    """As NVIDIA's occupancy calculator says of compute capability 9.0."""
    assert Binary(registers, 0, Counter()).warps(90, threads, shared) == warps


@pytest.mark.parametrize("chip", CHIPS)
def test_the_row_kernel_needs_32_instructions_a_logit_and_stores_16_bytes(chip: int) -> None:
    figures = counted(f"{MUST_HOLD}, sm_{chip}")
    assert figures.instructions <= 32
    assert "128" in figures.stores and figures.store_bytes > 15


@pytest.mark.parametrize("rounding", ["fp32", "exact", "kahan", "stochastic", "nearest"])
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("moments", ["8-bit", "4-bit"])
def test_coded_adamw_needs_120_instructions_an_element(
    moments: str, rounding: str, chip: int
) -> None:
    figures = counted(f"cuda, AdamW, {rounding}, moments {moments}, sm_{chip}")
    assert figures.instructions <= 120


def test_no_kernel_spills() -> None:
    spilling = [
        key for key, figures in ROWS["kernels"].items() if figures["spills"] or figures["stack"]
    ]
    assert not spilling


def test_no_operator_waits_or_launches_more_than_its_row() -> None:
    if missing():
        pytest.skip(f"launches of the CUDA library: {missing()}")
    for name, counts in operator_calls().items():
        assert counts["waits"] == 0 and counts["launches"] <= ROWS["calls"][name]["launches"], name


# GradScaler asks the device at each step whether to take it, with torch's own optimizers too;
# capturable=True does not
ASKS = "AdamW, 400 tensors, GradScaler"


@pytest.mark.parametrize("name", PIECES)
def test_no_step_waits_for_the_device_or_launches_more_than_its_row(name: str) -> None:
    with stand_ins():
        work, before = work_of(PIECES[name]), ROWS["steps"][name]
    assert len(work.waits) == (name == ASKS)
    if versions() != before["versions"]:
        pytest.skip(
            f"{name}: {before['launches']} launches with {before['versions']}, {work.launches} "
            f"with {versions()}"
        )
    assert work.launches <= before["launches"], "make kernels, if it must be so"


@pytest.mark.parametrize(
    ("small", "large"),
    [
        (loss(tokens=63, classes=97), loss(tokens=1024, classes=507)),
        (adamw(tensors=40, numel=640), adamw(tensors=40, numel=6400)),
        (
            adamw(tensors=40, numel=640, max_grad_norm=1.0),
            adamw(tensors=40, numel=6400, max_grad_norm=1.0),
        ),
        (attention(length=64), attention(length=512)),
        (batch(tokens=64, expand_on_device=True), batch(tokens=4096, expand_on_device=True)),
    ],
    ids=["loss", "AdamW", "AdamW with clipping", "attention", "batch"],
)
def test_nothing_of_the_host_grows_with_vocabulary_or_tokens(
    small: Prepare, large: Prepare
) -> None:
    with stand_ins():
        assert work_of(small)[:2] == work_of(large)[:2]
        assert python_calls(small) == python_calls(large)


def test_every_chunk_of_the_fused_loss_costs_the_same() -> None:
    def prepare(chunks: int) -> Prepare:
        def of(mode: Any) -> Any:
            x, head = (
                torch.randn(rows, 8, device=mode.device).requires_grad_()
                for rows in (16 * chunks, 63)
            )
            target = torch.zeros(16 * chunks, dtype=torch.int64, device=mode.device)
            return lambda: fastft.linear_cross_entropy(x, head, target, chunk_rows=16).backward()

        return of

    with stand_ins():
        six, seven, nine = (work_of(prepare(chunks)).launches for chunks in (6, 7, 9))
        calls = [python_calls(prepare(chunks)) for chunks in (6, 7, 9)]
    assert nine - seven == 2 * (seven - six) <= 16
    assert calls[2] - calls[1] == 2 * (calls[1] - calls[0])
