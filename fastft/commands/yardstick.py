"""How far two trainings may differ: asked of stock itself. Pure functions on traces.

Trainings that round differently drift apart, the more the longer they run. Let a and a' be two
stock runs, n a stock run whose head got an input that was one ulp off and whose log-softmax added
in float64, and b a fast run. For a number x that each step has (its loss, a norm, a parameter's
projection)

    noise(t)   = max over s <= max(t + AHEAD, SETTLED) of max(|x_a'(s) - x_a(s)|, |x_n(s) - x_a(s)|)
    allowed(t) = FACTOR noise(t) + floor(t)
    x differs  : |x_b(t) - x_a(t)| > allowed(t) in two steps in a row, or > ALONE allowed(t) in one

One noise run gives one sample a step, which is small by luck now and then: therefore the largest so
far counts, the first SETTLED steps count together, and those that come next count too; and what is
off in one step alone differs only if it is far off. The floor is what rounding does to a sum.

With bf16 weights stock loses updates that are less than half an ulp of their weight, so that a
better optimizer must differ. There r, a run with fp32 weights, is the reference: x does not differ
where b is no farther from r than stock has been, or is by its noise.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastft.commands.trace import Step, Trace

FACTOR = 8.0
PARAMETER_FACTOR = (
    16.0  # of numbers that each parameter has: there are thousands to be unlucky with
)
SETTLED = 5
AHEAD = 2
ALONE = 3.0
EPSILON = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10, "float64": 2.0**-52}


@dataclass(frozen=True)
class Runs:
    """The runs that one verdict is about: `stock` has one or two, `fast` one or more, each with at
    least one step; the others are None where they were not made.

    `dropout`: a stock and a fast run whose random numbers have to be the same, where the others are
    without dropout."""

    stock: Sequence[Trace]
    fast: Sequence[Trace]
    noise: Trace | None = None
    fp32: Trace | None = None
    dropout: tuple[Trace, Trace] | None = None

    @property
    def length(self) -> int:
        """The number of steps that every run has."""
        others = [run for run in (self.noise, self.fp32) if run is not None]
        return min(len(run.steps) for run in (*self.stock, *self.fast, *others))

    @property
    def epsilon(self) -> float:
        """Of the dtype in which the model computes, at least fp32's: sums are in fp32."""
        stock = self.stock[0]
        known = [
            EPSILON.get(dtype, 0.0) for dtype in (stock.compute_dtype or stock.dtype, "float32")
        ]
        return max(known)


@dataclass(frozen=True)
class Measured:
    """A number of every step against the yardstick; lists by step.

    Attributes:
        stock, fast: its values in the first stock run, and in the fast run that is farther off.
        difference: between these two.
        noise, allowed: of the formula above.
        over: whether it differs.
    """

    stock: list[float]
    fast: list[float]
    difference: list[float]
    noise: list[float]
    allowed: list[float]
    over: list[bool]

    @property
    def first(self) -> int | None:
        """The first step (from 0) that differs."""
        return self.over.index(True) if any(self.over) else None


def distance(x: float, y: float) -> float:
    """|x - y|; nothing between two NaNs, infinity between a NaN and a number."""
    if x == y or (math.isnan(x) and math.isnan(y)):
        return 0.0
    return math.inf if math.isnan(x) or math.isnan(y) else abs(x - y)


def so_far(values: Sequence[float]) -> list[float]:
    """The running maximum, AHEAD values further, in which the first SETTLED count together."""
    return [max(values[: max(t + 1 + AHEAD, SETTLED)]) for t in range(len(values))]


def measure(
    runs: Runs,
    read: Callable[[Trace, int], float],
    floor: Sequence[float],
    pooled: Sequence[float] | None = None,
    factor: float = FACTOR,
) -> Measured:
    """Holds a number against the yardstick.

    `read` gives it of a run and a step (from 0), by step `floor` is what is allowed in
    any case and `pooled` a noise below which its own is taken for luck; `factor` is how many noises
    are allowed.
    """
    steps = range(runs.length)
    values = [[read(run, t) for t in steps] for run in runs.stock]
    stock = values[0]
    noise = noise_of(runs, read)
    if pooled is not None:
        noise = [max(own, other) for own, other in zip(noise, pooled, strict=True)]
    allowed = [factor * noise[t] + floor[t] for t in steps]
    over, fast, difference = [False for _ in steps], list(stock), [0.0 for _ in steps]
    reference = [read(runs.fp32, t) for t in steps] if runs.fp32 is not None else None
    if reference is not None:
        lost = so_far([max(distance(run[t], reference[t]) for run in values) for t in steps])
    for run in runs.fast:
        excess = []
        for t in steps:
            value = read(run, t)
            off = distance(value, stock[t])
            if off > difference[t]:
                fast[t], difference[t] = value, off
            if reference is not None and off > allowed[t]:
                off = distance(value, reference[t]) - lost[t]
            excess.append(off / allowed[t] if allowed[t] else math.inf if off > 0 else 0.0)
        over = [one or another for one, another in zip(over, _differs(excess), strict=True)]
    return Measured(stock, fast, difference, noise, allowed, over)


def _differs(excess: Sequence[float]) -> list[bool]:
    """Whether a step does, of differences by what is allowed. One that is alone may be luck."""
    beside = [max(pair) for pair in zip([0.0, *excess], [*excess[1:], 0.0], strict=False)]
    return [one > ALONE or (one > 1 < near) for one, near in zip(excess, beside, strict=True)]


def noise_of(runs: Runs, read: Callable[[Trace, int], float]) -> list[float]:
    """The noise of a number by step."""
    others = [*runs.stock[1:], *([runs.noise] if runs.noise is not None else [])]
    steps = range(runs.length)
    return so_far(
        [
            max((distance(read(run, t), read(runs.stock[0], t)) for run in others), default=0.0)
            for t in steps
        ]
    )


def relative(reader: Callable[[Step], float]) -> Callable[[Trace, int], float]:
    """Makes a reader of a step one of a run and a step."""
    return lambda run, t: reader(run.steps[t])


class Parameters:
    """The lists of traces that have a number for each parameter, read by name.

    A parameter that some run lacks is not among `names`.
    """

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        everyone = [*runs.stock, *runs.fast, *(r for r in (runs.noise, runs.fp32) if r)]
        self._index = {id(run): {n: i for i, n in enumerate(run.parameters)} for run in everyone}
        shared = set.intersection(*(set(run.parameters) for run in everyone))
        self.names = [name for name in runs.stock[0].parameters if name in shared]

    def has(self, kind: str) -> bool:
        """Whether every run has a list of this kind ("gradients", "moments", "moved",
        "projection") in every step."""
        everyone = [*self.runs.stock, *self.runs.fast]
        everyone += [r for r in (self.runs.noise, self.runs.fp32) if r is not None]
        return all(
            len(getattr(step, kind) or ()) == len(run.parameters)
            for run in everyone
            for step in run.steps[: self.runs.length]
        )

    def reader(self, kind: str, name: str) -> Callable[[Trace, int], float]:
        """Reads the number of one parameter."""
        return lambda run, t: float(getattr(run.steps[t], kind)[self._index[id(run)][name]])

    def measure(
        self, kind: str, scale: Callable[[str, int], float], floor: Sequence[float]
    ) -> dict[str, Measured]:
        """Holds the numbers of all parameters against the yardstick.

        `scale` says what a parameter's noise and the `floor` of each step are relative to. A noise
        below the median of all parameters is taken for luck.
        """
        steps = range(self.runs.length)
        shares: list[list[float]] = [[] for _ in steps]
        for name in self.names:
            for t, noise in enumerate(noise_of(self.runs, self.reader(kind, name))):
                if scale(name, t) > 0 and math.isfinite(noise):
                    shares[t].append(noise / scale(name, t))
        typical = [statistics.median(share) if share else 0.0 for share in shares]
        return {
            name: measure(
                self.runs,
                self.reader(kind, name),
                [floor[t] * scale(name, t) for t in steps],
                [typical[t] * scale(name, t) for t in steps],
                PARAMETER_FACTOR,
            )
            for name in self.names
        }
