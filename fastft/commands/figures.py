"""How fast and how large a training is: tokens a second with an interval, memory, padding. Pure
functions on traces."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastft.commands.trace import Step, Trace

_WARM = 2  # the first steps, which allocate, compile and read what is not in caches yet
_DRAWS = 2000
# of a process's growth may be what libraries keep: imports, buffers, kernels for each shape
LIBRARIES = 512 * 2**20


@dataclass(frozen=True)
class Interval:
    """A figure, and where it is with a probability of 95 %."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Figures:
    """What a variant took.

    Attributes:
        runs: how many runs these are of.
        tokens_per_second: without padding.
        supervised_per_second: tokens that have a label which is not ignored.
        speedup: by how much its steps are faster than stock's; None of stock itself.
        peak: bytes, the largest of its runs, of one process.
        peak_kind: of what.
        peak_tells: whether it is more than what libraries keep in a process.
        padding: share of the batches' elements.
        ignored: share of the labels, padding's left out.
    """

    runs: int
    tokens_per_second: Interval
    supervised_per_second: Interval
    speedup: Interval | None
    peak: int
    peak_kind: str
    peak_tells: bool
    padding: float
    ignored: float


def figures(runs: Sequence[Trace], stock: Sequence[Trace] | None = None) -> Figures:
    """Measures a variant, and its speed against that of stock.

    Intervals are bootstrapped over the steps of all runs, the first two of a run left out, and are
    as wide as the runs differ at least.
    """
    steps = [step for run in runs for step in run.steps]
    tokens = sum(step.tokens for step in steps)
    elements = tokens + sum(step.padding for step in steps)
    labels = sum(step.supervised for step in steps)
    ignored = sum(step.ignored for step in steps)
    device = [run.peak_device for run in runs if run.peak_device is not None]
    peak = max(device) if device else max(run.peak_process for run in runs)
    return Figures(
        runs=len(runs),
        tokens_per_second=_rate(runs, lambda step: step.tokens),
        supervised_per_second=_rate(runs, lambda step: step.supervised),
        speedup=None if stock is None else speedup(runs, stock),
        peak=peak,
        peak_kind="device's allocator" if device else runs[0].peak_kind,
        peak_tells=bool(device) or peak >= LIBRARIES,
        padding=1 - tokens / elements if elements else 0.0,
        ignored=ignored / (ignored + labels) if ignored + labels else 0.0,
    )


def speedup(runs: Sequence[Trace], stock: Sequence[Trace]) -> Interval:
    """Tokens a second over stock's.

    Where both train on the same batches, steps are drawn in pairs, so that long and short batches
    take no part in the interval.
    """
    ours, theirs = [_warm(run) for run in runs], [_warm(run) for run in stock]
    count = min(len(steps) for steps in (*ours, *theirs))

    def ratio(fast: Sequence[Step], slow: Sequence[Step]) -> float:
        return _per_second(fast, _tokens) / (_per_second(slow, _tokens) or 1.0)

    generator = random.Random(0)
    drawn = []
    for _ in range(_DRAWS):
        picks = generator.choices(range(count), k=count)
        pair = [[generator.choice(side)[t] for t in picks] for side in (ours, theirs)]
        drawn.append(ratio(*pair))
    whole = ratio(
        [s for run in ours for s in run[:count]], [s for run in theirs for s in run[:count]]
    )
    each = [ratio(a[:count], b[:count]) for a in ours for b in theirs]
    return _interval(whole, drawn, each)


def _rate(runs: Sequence[Trace], amount: Callable[[Step], int]) -> Interval:
    warm = [_warm(run) for run in runs]
    steps = [step for run in warm for step in run]
    generator = random.Random(0)
    drawn = [_per_second(generator.choices(steps, k=len(steps)), amount) for _ in range(_DRAWS)]
    each = [_per_second(run, amount) for run in warm]
    return _interval(_per_second(steps, amount), drawn, each)


def _tokens(step: Step) -> int:
    return step.tokens or 1  # without tokens (images, say) a step is what counts


def _warm(run: Trace) -> list[Step]:
    return run.steps[min(_WARM, len(run.steps) - 1) :]


def _per_second(steps: Sequence[Step], amount: Callable[[Step], int]) -> float:
    seconds = sum(step.seconds for step in steps)
    return sum(amount(step) for step in steps) / seconds if seconds else 0.0


def _interval(value: float, drawn: Sequence[float], each: Sequence[float]) -> Interval:
    ordered = sorted(drawn)
    low, high = ordered[int(0.025 * len(ordered))], ordered[int(0.975 * len(ordered)) - 1]
    return Interval(value, min(low, value, *each), max(high, value, *each))
