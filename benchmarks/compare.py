"""Times ours and its rivals in turn, in one process, so that a slow moment of the machine hits all
of them alike.

On a GPU a time is the device's, between two events on the stream. The stream is kept busy before
the first of them for longer than the host takes to launch the run, so that no launch is waited for,
and what keeps it busy sweeps the L2 cache. The host's own time until the run returns stands beside
it: where it is the longer of the two, a training that does nothing else would wait for the host.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import turns
from goals import BARE

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


_BEYOND_CACHES = 2**29


@functools.cache
def bytes_a_second() -> float:
    """The most that was read, or read and written in place, of memory that no cache holds."""
    floats = torch.ones(2**28, device=DEVICE)
    reads, writes = (_fastest(run) for run in (floats.sum, lambda: floats.mul_(1.0)))
    return floats.nbytes * max(1 / reads, 2 / writes)


@functools.cache
def flops_a_second(dtype: torch.dtype) -> float:
    """The most of a square product, of `dtype` or of fp32 (a processor may have no units for
    `dtype`), by torch, by its oneDNN where it has that for fp32, or by fastft."""
    from fastft.layers import matrix_product
    from fastft.loss.head_gemms import is_emulated

    size, rates = 8192 if DEVICE == "cuda" else 2048, []
    for factors in {torch.float32} if is_emulated(dtype, DEVICE) else {dtype, torch.float32}:
        left, right = (torch.randn(size, size, device=DEVICE).to(factors) for _ in range(2))
        runs = [functools.partial(torch.mm, left, right)]
        if factors == torch.float32 and DEVICE == "cpu":
            onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
            if onednn is not None:
                runs.append(functools.partial(onednn, left, right, None, "none", [], ""))
            if matrix_product.is_ahead():
                out = torch.empty_like(left)
                ours = matrix_product.PRODUCT.implementation("cpp", left.device)
                runs.append(functools.partial(ours, out, left, right, False))
        rates += [2 * size**3 / _fastest(run) for run in runs]
    return max(rates)


def _fastest(run: Run) -> float:
    began, best = time.perf_counter(), timed(run).seconds
    while time.perf_counter() - began < 1.0:
        best = min(best, timed(run).seconds)
    return best


def compare(
    benchmark: BenchmarkFixture,
    ours: Run,
    rivals: dict[str, Run],
    *,
    check: Run,
    bytes_moved: float = 0,
    products: tuple[float, torch.dtype] | None = None,
    bare: Run | None = None,
) -> None:
    """Checks, then runs `ours` by turns with each rival and with the bare work (turns.py); keeps
    what each took. Where benchmarks are disabled all run once.

    Args:
        check: raises where ours is wrong: nothing is timed then.
        bytes_moved: that nobody is spared. They bound those that caches do not hold.
        products: floating-point operations of matrix products that nobody is spared, and of which
            dtype the factors are.
        bare: work that cannot be left out, done alone, e.g. a copy. It is no bound: a cache, or
            work that ours is spared, is faster.

    `extra_info` receives medians and quartiles in milliseconds, on a GPU also the host's medians,
    the ratios rival / ours (above 1: ours is faster) and ours / bare work, GB/s, and `bound_ms`:
    what the bytes and products take at the highest rate that was seen on this machine.
    """
    check()
    runs = {"ours": ours, **rivals, **({BARE: bare} if bare else {})}
    hosts: dict[str, list[float]] = {name: [] for name in runs}
    if benchmark.disabled:
        for run in runs.values():
            run()
        benchmark.pedantic(ours)
        return

    def timing(name: str) -> Callable[[], float]:
        def once() -> float:
            took = timed(runs[name], hosts[name][-1] if hosts[name] else 0.0)
            hosts[name].append(took.host)
            return took.seconds

        return once

    with _without_garbage():
        pairs = {
            name: turns.by_turns({each: timing(each) for each in ("ours", name)})
            for name in [*runs][1:] or ["ours"]
        }
    benchmark.pedantic(ours)  # pytest-benchmark's table has one run more
    info = benchmark.extra_info
    keep(info, pairs)
    if DEVICE == "cuda":
        info["host_ms"] = {
            name: round(1e3 * statistics.median(all_of), 4) for name, all_of in hosts.items()
        }
    if bytes_moved:
        info["bytes_moved"] = int(bytes_moved)
        info["gigabytes_per_second"] = round(bytes_moved / info["median_ms"]["ours"] / 1e6, 2)
    bounds = [bytes_moved / bytes_a_second()] if bytes_moved >= _BEYOND_CACHES else []
    bounds += [products[0] / flops_a_second(products[1])] if products else []
    if bounds:
        info["bound_ms"] = round(1e3 * max(bounds), 4)
    shown = ", ".join(f"{key} {value}" for key, value in info.items())
    print(f"\n{benchmark.name}: {shown}")


@contextlib.contextmanager
def _without_garbage() -> Iterator[None]:
    """Nobody's time has a collection in it that another one's objects set off."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def keep(info: dict[str, Any], pairs: dict[str, turns.Times]) -> None:
    """Medians and quartiles, and the ratios to ours with theirs, each of ours by turns with that
    run. Ours' own times are those beside the first; the spread is that of all but the bare work,
    which nobody claims to be."""
    first, *_ = pairs.values()
    of = {"ours": first, **pairs}
    info["median_ms"] = {name: _ms(times.median(name)) for name, times in of.items()}
    info["quartiles_ms"] = {
        name: [_ms(each) for each in times.quartiles(name)] for name, times in of.items()
    }
    alone = turns.Times({"ours": first.samples["ours"]}, first.attempts)
    claimed = [times for name, times in pairs.items() if name != BARE] or [alone]
    info["spread"] = round(max(times.spread() for times in claimed), 4)
    info["attempts"] = max(times.attempts for times in pairs.values())
    rivals = {name: times for name, times in pairs.items() if name != "ours"}
    if len(rivals) > 1:
        beside = {name: times.median("ours") for name, times in rivals.items()}
        info["ours_beside_ms"] = {name: _ms(seconds) for name, seconds in beside.items()}
    of_ratios = {name: times.ratio(name, "ours") for name, times in rivals.items()}
    info["ratio_quartiles"] = {
        name: [round(low, 3), round(high, 3)] for name, (low, _, high) in of_ratios.items()
    }
    ratios = {name: median for name, (_, median, _) in of_ratios.items()}
    if BARE in ratios:
        info["times_the_bare_work"] = round(1 / ratios.pop(BARE), 3)
    info["times_faster_than"] = {name: round(ratio, 3) for name, ratio in ratios.items()}


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 4)
