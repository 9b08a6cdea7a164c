"""Times ours and its rivals in turn, in one process, so that a slow moment of the machine hits all
of them alike.

On a GPU a time is the device's, between two events on the stream. The stream is kept busy before
the first of them for longer than the host takes to launch the run, so that no launch is waited for,
and what keeps it busy sweeps the L2 cache. The host's own time until the run returns stands beside
it: where it is the longer of the two, a training that does nothing else would wait for the host.
"""

from __future__ import annotations

import functools
import importlib
import statistics
import time
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

# where benchmarks run, at the sizes of a real fine-tune on a GPU
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Run = Callable[[], object]


class Took(NamedTuple):
    """Seconds: of the device, or on a CPU of the call; and of the host until the call returned."""

    seconds: float
    host: float


def rival(module: str) -> ModuleType | None:
    """A rival's module, or None where it cannot be imported here (not installed, or it finds no
    GPU)."""
    try:
        return importlib.import_module(module)
    except Exception:
        return None


def timed(run: Run, expected_host: float = 0.0) -> Took:
    """Of one call; `expected_host`: seconds that the host is thought to take, for which a GPU is
    kept busy."""
    if DEVICE == "cpu":
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        return Took(seconds, seconds)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    sweep, of_one = _sweep()
    torch.cuda.synchronize()
    for _ in range(1 + min(int(2 * expected_host / of_one), _SWEEPS)):
        sweep.zero_()
    begin.record()
    start = time.perf_counter()
    run()
    host = time.perf_counter() - start
    end.record()
    torch.cuda.synchronize()
    return Took(1e-3 * begin.elapsed_time(end), host)


_SWEEPS = 256  # at most, before a run: some tens of milliseconds


@functools.cache
def _sweep() -> tuple[torch.Tensor, float]:
    """A tensor larger than any L2 cache, and the seconds that a GPU takes to write it."""
    sweep = torch.empty(2**28, dtype=torch.int8, device=DEVICE)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    sweep.zero_()
    begin.record()
    for _ in range(10):
        sweep.zero_()
    end.record()
    torch.cuda.synchronize()
    return sweep, 1e-4 * begin.elapsed_time(end)


def compare(
    benchmark: BenchmarkFixture,
    ours: Run,
    rivals: dict[str, Run],
    *,
    rounds: int = 9,
    bytes_moved: int = 0,
    bare: Run | None = None,
) -> None:
    """Runs `ours`, every rival and the bare work (what cannot be left out, done alone, e.g. a copy)
    alternately, and keeps medians.

    `extra_info` receives medians in milliseconds, on a GPU also the host's, the ratio rival / ours
    (above 1: ours is faster), the ratio ours / bare work (no bound: a cache, or work that ours is
    spared, brings it below 1), and GB/s where `bytes_moved` is given.
    pytest-benchmark's own table has the times of `ours` with all that is done around them.
    """
    runs = {"ours": ours, **rivals, **({"bare work": bare} if bare else {})}
    took: dict[str, list[Took]] = {name: [] for name in runs}
    for run in runs.values():
        run()  # warm-up: first touches, thread pools, caches
    hosts = {name: timed(run).host if DEVICE == "cuda" else 0.0 for name, run in runs.items()}

    def once(name: str) -> None:
        took[name].append(timed(runs[name], hosts[name]))

    def others() -> None:
        for name in list(runs)[1:]:
            once(name)

    benchmark.pedantic(once, args=("ours",), setup=others, rounds=rounds)
    medians = {
        name: statistics.median(each.seconds for each in all_of) for name, all_of in took.items()
    }
    info = benchmark.extra_info
    info["median_ms"] = {name: round(1e3 * seconds, 4) for name, seconds in medians.items()}
    if DEVICE == "cuda":
        info["host_ms"] = {
            name: round(1e3 * statistics.median(each.host for each in all_of), 4)
            for name, all_of in took.items()
        }
    info["times_faster_than"] = {name: round(medians[name] / medians["ours"], 3) for name in rivals}
    if bare:
        info["times_the_bare_work"] = round(medians["ours"] / medians["bare work"], 3)
    if bytes_moved:
        info["bytes_moved"] = bytes_moved
        info["gigabytes_per_second"] = round(bytes_moved / medians["ours"] / 1e9, 2)
    shown = ", ".join(f"{key} {value}" for key, value in info.items())
    print(f"\n{benchmark.name}: {shown}")
