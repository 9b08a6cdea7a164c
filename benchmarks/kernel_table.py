"""What our GPU kernels cost, counted without a GPU: writes results/kernels.json and kernels.md.

    make kernels        or: PYTHONPATH=tests python benchmarks/kernel_table.py

Needs nvcc, g++ and Triton. Instructions and bytes are those that the compiled PTX of a kernel
executes on the CPU (tests/support/kernel_counts.py says what runs), registers and widths those of
its machine code, launches and waits those of operators and whole steps (host_calls.py and
host_work.py beside it).
`tests/gpu/test_kernel_table.py` fails where a kernel has become worse than its row.

The estimate is a lower bound, never measured: the largest of four times, and 4 us for the launch.

    memory          bytes that must move / what a copy reaches; a second reading comes from the L2
                    cache where the rows that are in flight fit into four fifths of it
    instructions    of PTX, and 8 more for each division or root that is rounded to nearest
                    / 128 a clock and SM
    approximations  ex2, reciprocals, roots and their like / 16 a clock and SM
    double          operations in double precision and conversions to it / 64 a clock and SM, 32
                    of an A100's
"""

from __future__ import annotations

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from support.host_calls import operator_calls, python_calls, versions
from support.host_work import PIECES, host_work, stand_ins
from support.kernel_counts import CHIPS, ENGINES, Figures, Kernel, count, kernels

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


class Gpu(NamedTuple):
    """What the estimates take for granted of a GPU: a copy's bytes a second, processors, clock, L2
    cache, doubles."""

    name: str
    chip: int
    bandwidth: float
    processors: int
    clock: float
    l2: float
    doubles: int


GPUS = (
    Gpu("H200", 90, 4.3e12, 132, 1.755e9, 50e6, 64),
    Gpu("H100", 90, 3.0e12, 132, 1.755e9, 50e6, 64),
    Gpu("A100", 80, 1.75e12, 108, 1.41e9, 40e6, 32),
)
LAUNCH = 4e-6


def estimate(kernel: Kernel, figures: Figures, gpu: Gpu) -> tuple[float, str]:
    """Milliseconds for the units that the kernel states, at least, and what they are spent on."""
    units, clocks = kernel.stated[0], gpu.processors * gpu.clock
    in_flight = gpu.processors * figures.warps * 32 // figures.threads * kernel.again
    again = max(figures.read - kernel.minimum[0], 0.0) if in_flight > 0.8 * gpu.l2 else 0.0
    times = {
        "memory": (sum(kernel.minimum) + again) / gpu.bandwidth,
        "instructions": (figures.instructions + 8 * figures.exact) / (128 * clocks),
        "approximations": figures.approximations / (16 * clocks),
        "double": figures.double / (gpu.doubles * clocks),
    }
    limit = max(times, key=lambda name: times[name])
    return (times[limit] * units + LAUNCH) * 1e3, limit


def _counted(part: tuple[str, int]) -> dict[str, dict[str, Any]]:
    engine, chip = part
    return {kernel.key(chip): asdict(count(kernel, chip)) for kernel in kernels(engine)}


def measured() -> dict[str, Any]:
    """All rows, in the order of the table."""
    work, steps = host_work(), {}
    for name, prepare in PIECES.items():
        counts = {
            "operations": work[name].operations,
            "launches": work[name].launches,
            "waits": len(work[name].waits),
        }
        with stand_ins():
            steps[name] = counts | {"functions": python_calls(prepare), "versions": versions()}
    calls = operator_calls()
    parts = [(engine, chip) for engine in reversed(ENGINES) for chip in CHIPS]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        counted = {key: row for rows in pool.map(_counted, parts) for key, row in rows.items()}
    every = {key: counted[key] for key in keys()}
    return {"kernels": every, "calls": calls, "steps": steps}


def keys() -> list[str]:
    """Of all rows of kernels, in order."""
    return [kernel.key(chip) for engine in ENGINES for kernel in kernels(engine) for chip in CHIPS]


HEAD = """# What the GPU kernels cost, counted without a GPU

`make kernels` writes this page. Nothing here has run on a GPU: kernels are compiled for sm_80
(A100) and sm_90 (H100, H200), their PTX is executed on the CPU, their machine code is read. CI
fails where one has become worse than its row.

* **instructions**: executed instructions of PTX for each unit, moves not counted.
* **read, written**: bytes that a unit loads and stores, also from caches; in brackets what cannot
  but move.
* **a load, a store**: bytes of an access that threads come to, in the mean; behind it how many
  accesses the machine code has of each width in bytes.
* **registers** of a thread, **spills** and bytes of **stack**, **shared** bytes of a block,
  **threads** of a block, **warps** that an SM holds at once, of 64.
* **at least**: an ESTIMATE in ms, never measured, and what it is spent on;
  `benchmarks/kernel_table.py` says how.
"""
COLUMNS = (
    "kernel | chip | instructions | read | written | a load | a store | registers | spills, stack "
    "| shared | threads "
    "| warps | at least (estimate)"
)
HOST_HEAD = """
## The host

Launches and waits of a call of an operator, as the CUDA library makes them:

| operator | launches | waits |
|---|---|---|
"""
STEPS_HEAD = """
Of a training step's second run: operations that torch dispatches, those of them that launch
something (an operator of ours counts once), waits for the device, and functions that fastft's
Python calls. None of them grows with vocabulary or tokens, but that the fused loss goes by
chunks. The one wait is GradScaler's, which decides on the host whether to step.

| step | operations | launches | waits | functions | with |
|---|---|---|---|---|---|
"""


def page(rows: dict[str, Any]) -> str:
    """results/kernels.md, from what results/kernels.json holds."""
    text = HEAD
    for engine, title in zip(ENGINES, ("CUDA", "Triton"), strict=True):
        every = [(kernel, chip) for kernel in kernels(engine) for chip in CHIPS]
        figures = {key: Figures(**row) for key, row in rows["kernels"].items()}
        compilers = sorted({row.compiler for key, row in figures.items() if key.startswith(engine)})
        text += (
            f"\n## {title}: compiled by {', '.join(compilers)}\n\n| {COLUMNS} |\n|{'---|' * 13}\n"
        )
        text += "".join(_line(kernel, chip, figures[kernel.key(chip)]) for kernel, chip in every)
    text += HOST_HEAD
    for name, row in rows["calls"].items():
        text += f"| {name} | {row['launches']} | {row['waits']} |\n"
    text += STEPS_HEAD
    for name, row in rows["steps"].items():
        text += f"| {name} | {' | '.join(map(str, row.values()))} |\n"
    return text


def _line(kernel: Kernel, chip: int, row: Figures) -> str:
    cells = [
        f"{kernel.name} ({kernel.unit})",
        f"sm_{chip}",
        f"{row.instructions:.1f}",
        f"{row.read:.2f} ({kernel.minimum[0]:g})",
        f"{row.written:.2f} ({kernel.minimum[1]:g})",
        f"{row.load_bytes:.1f}: {_widths(row.loads)}",
        f"{row.store_bytes:.1f}: {_widths(row.stores)}",
        str(row.registers),
        f"{row.spills}, {row.stack}",
        f"{row.shared:,}",
        str(row.threads),
        str(row.warps),
        _estimates(kernel, chip, row),
    ]
    return f"| {' | '.join(cells)} |\n"


def _widths(accesses: dict[str, int]) -> str:
    return ", ".join(f"{n} of {int(width) // 8}" for width, n in accesses.items()) or "none"


def _estimates(kernel: Kernel, chip: int, row: Figures) -> str:
    if not kernel.stated[0]:
        return ""
    found = [(gpu.name, *estimate(kernel, row, gpu)) for gpu in GPUS if gpu.chip == chip]
    return f"{kernel.stated[1]}: " + ", ".join(
        f"{name} {time:.3g} ({limit})" for name, time, limit in found
    )


if __name__ == "__main__":
    rows = measured()
    (RESULTS / "kernels.json").write_text(json.dumps(rows, indent=1) + "\n")
    (RESULTS / "kernels.md").write_text(page(rows))
