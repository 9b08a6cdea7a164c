"""The runs of one verdict, and what is measured of them against the yardstick."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from functools import cached_property

from fastft.commands.trace import Step, Trace
from fastft.commands.yardstick import EPSILON, Measured, Parameters, Runs, measure, relative


class Case:
    """The runs of one verdict, and what is measured of them when a cause asks."""

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        self.stock, self.steps = runs.stock[0], range(runs.length)
        self.parameters = Parameters(runs)

    def pairs(self) -> Iterator[tuple[int, Trace, Step, Step]]:
        """Step by step: its number from 0, a fast run, stock's step, the run's."""
        for t in self.steps:
            for run in self.runs.fast:
                yield t, run, self.stock.steps[t], run.steps[t]

    @cached_property
    def norm_error(self) -> list[float]:
        """By how much stock's norm of all gradients is off, as the largest share so far.

        torch sums the squares in the gradients' dtype: of some million elements the fourth digit is
        wrong, and clipping scales all gradients by that. Their own norms are recorded exactly. A
        clipped norm has only the fast run's to be held against; what is above 2 % is no rounding.
        """
        largest, errors = 0.0, []
        for stock, fast in zip(self.stock.steps, self.runs.fast[0].steps, strict=False):
            ours, theirs = (math.hypot(*map(size_of, step.gradients)) for step in (fast, stock))
            reported = size_of(stock.grad_norm or 0.0)
            against = reported if theirs > 0.95 * reported else ours
            error = abs(theirs / against - 1) if against and theirs else 0.0
            largest = max(largest, min(error, 0.02))
            errors.append(largest)
        return errors[: self.runs.length]

    def _floor(self, share: float) -> list[float]:
        return [max(share, 2 * error) for error in self.norm_error]

    @cached_property
    def loss(self) -> Measured:
        """A mean over labels rounds like its sum, in the computation's dtype for each label; and
        what the loss has changed by is as exact as the norm of gradients."""

        floor = [
            max(2.0**-19, 2 * self.runs.epsilon / math.sqrt(max(step.supervised, 1)))
            * size_of(step.loss)
            for step in self.stock.steps[: self.runs.length]
        ]
        losses = [size_of(step.loss) for step in self.stock.steps]
        for t, error in enumerate(self.norm_error):
            floor[t] += error * (max(losses[: t + 1]) - min(losses[: t + 1]))
        return measure(self.runs, relative(lambda step: step.loss), floor)

    @cached_property
    def grad_norm(self) -> Measured | None:
        """None where some step of a run has none."""
        runs = [*self.runs.stock, *self.runs.fast, self.runs.noise, self.runs.fp32]
        norms = [s.grad_norm for run in runs if run for s in run.steps[: self.runs.length]]
        if None in norms:
            return None
        # a norm of bf16 gradients is itself rounded to bf16
        own = EPSILON.get(self.stock.dtype, 0.0)
        share = self._floor(max(1e-5, own, self.runs.epsilon / 8))
        return measure(
            self.runs,
            relative(lambda step: float(step.grad_norm or 0.0)),
            [share[t] * size_of(self.stock.steps[t].grad_norm or 0.0) for t in self.steps],
        )

    @cached_property
    def gradients(self) -> dict[str, Measured]:
        """Of each parameter, as the optimizer sees them. One of a part of 1e-4 of the typical
        gradient, the bias of keys say, is rounding alone."""
        if not self.parameters.has("gradients"):
            return {}
        read = {name: self.parameters.reader("gradients", name) for name in self.parameters.names}
        typical = [
            statistics.median(size_of(read[name](self.stock, t)) for name in read) if read else 0.0
            for t in self.steps
        ]
        return self.parameters.measure(
            "gradients",
            lambda name, t: max(size_of(read[name](self.stock, t)), 1e-4 * typical[t]),
            self._floor(max(1e-4, self.runs.epsilon)),
        )

    @cached_property
    def moments(self) -> dict[str, Measured]:
        """Of each parameter, the optimizer's `exp_avg`."""
        if not self.parameters.has("moments"):
            return {}
        read = {name: self.parameters.reader("moments", name) for name in self.parameters.names}
        return self.parameters.measure(
            "moments",
            lambda name, t: size_of(read[name](self.stock, t)),
            self._floor(max(1e-3, self.runs.epsilon)),
        )

    @cached_property
    def moved(self) -> dict[str, Measured]:
        """Of each parameter, how far it moved in the step."""
        if not self.parameters.has("moved"):
            return {}
        read = {name: self.parameters.reader("moved", name) for name in self.parameters.names}
        return self.parameters.measure(
            "moved", lambda name, t: size_of(read[name](self.stock, t)), self._floor(1e-3)
        )

    @cached_property
    def projections(self) -> dict[str, Measured]:
        """Of each parameter, where its weights are, relative to how far they have come."""
        if not (self.parameters.has("projection") and self.parameters.has("moved")):
            return {}
        walked: dict[str, list[float]] = {}
        for name in self.parameters.names:
            read, sums = self.parameters.reader("moved", name), [0.0]
            for t in self.steps:
                sums.append(sums[-1] + size_of(read(self.stock, t)))
            walked[name] = sums[1:]
        return self.parameters.measure(
            "projection", lambda name, t: walked[name][t], self._floor(1e-3)
        )

    @cached_property
    def noisy(self) -> set[str]:
        """Parameters whose gradient is rounding alone, like that of the keys' bias: AdamW makes
        whole steps of it, each time others."""
        if not self.gradients:
            return set()
        largest = [max(m.stock[t] for m in self.gradients.values()) for t in self.steps]
        return {
            name
            for name, measured in self.gradients.items()
            if any(
                measured.noise[t] > 0.1 * measured.stock[t]
                or measured.stock[t] < 1e-6 * largest[t]
                or math.isnan(measured.stock[t])
                for t in self.steps[:5]
            )
        }

    def off(self, kind: dict[str, Measured]) -> tuple[int, list[str]] | None:
        """The first step in which parameters differ, and which."""
        for t in self.steps:
            names = [n for n, m in kind.items() if m.over[t] and n not in self.noisy]
            if names:
                return t, names
        return None

    @property
    def consequences(self) -> bool:
        """Whether a loss or a gradient differs."""
        norms = self.grad_norm is not None and self.grad_norm.first is not None
        return self.loss.first is not None or norms


def size_of(number: float) -> float:
    """|number|; 0 of what is none."""
    return abs(number) if math.isfinite(number) else 0.0
