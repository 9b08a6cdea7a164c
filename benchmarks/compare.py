"""Times ours and its rivals in turn, in one process, so that a slow moment of the machine hits all of them alike."""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable
from types import ModuleType

import torch
from pytest_benchmark.fixture import BenchmarkFixture

# where benchmarks run, at the sizes of a real fine-tune on a GPU
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Run = Callable[[], object]


def rival(module: str) -> ModuleType | None:
    """A rival's module, or None where it cannot be imported here (not installed, or it finds no GPU)."""
    try:
        return importlib.import_module(module)
    except Exception:
        return None


def compare(
    benchmark: BenchmarkFixture,
    ours: Run,
    rivals: dict[str, Run],
    *,
    rounds: int = 9,
    bytes_moved: int = 0,
    limit: Run | None = None,
) -> None:
    """Runs `ours`, every rival and the `limit` (what nobody can beat, e.g. a bare copy) alternately and keeps medians.

    pytest-benchmark receives the times of `ours`; `extra_info` receives medians in milliseconds, the ratio rival / ours
    (above 1: ours is faster), the ratio ours / limit, and GB/s where `bytes_moved` is given.
    """
    runs = {"ours": ours, **rivals, **({"limit": limit} if limit else {})}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()  # warm-up: first touches, thread pools, caches

    def once(name: str) -> None:
        _wait()
        start = time.perf_counter()
        runs[name]()
        _wait()
        times[name].append(time.perf_counter() - start)

    def others() -> None:
        for name in list(runs)[1:]:
            once(name)

    benchmark.pedantic(once, args=("ours",), setup=others, rounds=rounds)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    info = benchmark.extra_info
    info["median_ms"] = {name: round(1e3 * seconds, 4) for name, seconds in medians.items()}
    info["times_faster_than"] = {name: round(medians[name] / medians["ours"], 3) for name in rivals}
    if limit:
        info["times_the_limit"] = round(medians["ours"] / medians["limit"], 3)
    if bytes_moved:
        info["bytes_moved"] = bytes_moved
        info["gigabytes_per_second"] = round(bytes_moved / medians["ours"] / 1e9, 2)
    shown = ", ".join(f"{key} {value}" for key, value in info.items())
    print(f"\n{benchmark.name}: {shown}")


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
