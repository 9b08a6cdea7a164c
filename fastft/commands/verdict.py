"""Is the training with fastft the one without it? Pure functions on traces."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastft.commands.case import Case
from fastft.commands.causes import CAUSES, Finding
from fastft.commands.trace import Step, Trace
from fastft.commands.yardstick import Measured, Runs, distance, noise_of


@dataclass(frozen=True)
class Verdict:
    """What comes of a comparison.

    Attributes:
        equal: whether nothing differs by more than stock's own noise allows.
        findings: what differs, the cause first.
        loss: the losses against the yardstick.
        grad_norm: the same of the norms of all gradients, before clipping; None where a run has
            none.
        weights: after each step, how far all weights are from stock's: the root of the parameters'
            squared differences of projections, which is about the norm. The largest of the fast
            runs, and stock's own (the running maximum of `yardstick.py`); None without projections.
        same_bits: how many steps have weights of the same bits as stock's, from the first on.
        notes: what there is to say besides, a sentence each.
    """

    equal: bool
    findings: list[Finding]
    loss: Measured
    grad_norm: Measured | None
    weights: tuple[list[float], list[float]] | None
    same_bits: int
    notes: list[str] = field(default_factory=list)

    @property
    def cause(self) -> Finding | None:
        """What differs first, or None."""
        return self.findings[0] if self.findings else None

    @property
    def sensitivity(self) -> float:
        """The relative difference of the first step's loss from which on it would be seen."""
        return self.loss.allowed[0] / (abs(self.loss.stock[0]) or 1.0)


def judge(runs: Runs) -> Verdict:
    """Compares the fast runs with stock.

    Args:
        runs: each of at least one step, of all processes (`merged`).

    Returns:
        the verdict. Findings are in the order of their first steps, and within a step in the order
        in which one brings about the next: the first one is the cause.
    """
    case = Case(runs)
    found = [finding for cause in CAUSES if (finding := cause(case)) is not None]
    found.sort(key=lambda finding: finding.step)  # stable: CAUSES' order within a step
    return Verdict(
        equal=not found,
        findings=found,
        loss=case.loss,
        grad_norm=case.grad_norm,
        weights=_weights(case),
        same_bits=_same_bits(runs),
        notes=[*_closer_to_fp32(case), *_random_states(runs, found)],
    )


def unreproducible(stock: Sequence[Trace]) -> str | None:
    """Why two stock runs say nothing about a third: they are two different trainings.

    Args:
        stock: two stock runs or more, of at least one step, with noise or without.
    """
    for other in stock[1:]:
        why = _other_training(stock[0], other)
        if why is not None:
            return why
    return None


def _other_training(first: Trace, second: Trace) -> str | None:
    for t, (one, other) in enumerate(zip(first.steps, second.steps, strict=False)):
        if one.batches != other.batches:
            return (
                f"two runs without fastft train on different batches from step {t + 1} on, so that "
                f"there is nothing to compare with: seed what draws them (transformers.set_seed)"
            )
    loss, again = first.steps[0].loss, second.steps[0].loss
    if distance(loss, again) > 1e-2 * abs(loss):
        return (
            f"two runs without fastft have losses of {loss:.4g} and {again:.4g} in their first "
            f"step already: seed what makes weights and dropout (transformers.set_seed)"
        )
    return None


def merged(ranks: Sequence[Trace]) -> Trace:
    """One trace of what all processes recorded: the batches of all, the mean of their losses, the
    time of the slowest, the largest peak. A parameter is there once for each process, which has all
    of it or a shard."""
    if len(ranks) == 1:
        return ranks[0]
    first = ranks[0]
    return dataclasses.replace(
        first,
        parameters=[f"{n} (rank {trace.rank})" for trace in ranks for n in trace.parameters],
        weight_decay=[decay for trace in ranks for decay in trace.weight_decay],
        projection0=[number for trace in ranks for number in trace.projection0],
        steps=[
            _merged_step(steps) for steps in zip(*(trace.steps for trace in ranks), strict=False)
        ],
        fused=sum(trace.fused for trace in ranks),
        materialised=list(dict.fromkeys(place for trace in ranks for place in trace.materialised)),
        skipped=list(dict.fromkeys(why for trace in ranks for why in trace.skipped)),
        leak=max((trace.leak for trace in ranks if trace.leak is not None), default=None),
        peak_device=max((t.peak_device for t in ranks if t.peak_device is not None), default=None),
        peak_process=max(trace.peak_process for trace in ranks),
        ended=next((trace.ended for trace in ranks if trace.ended == "error"), first.ended),
        error=next((trace.error for trace in ranks if trace.error), None),
    )


def _merged_step(steps: Sequence[Step]) -> Step:
    return dataclasses.replace(
        steps[0],
        loss=statistics.fmean(step.loss for step in steps),
        micro=[micro for step in steps for micro in step.micro],
        gradients=[number for step in steps for number in step.gradients],
        moments=None
        if any(step.moments is None for step in steps)
        else [number for step in steps for number in step.moments or ()],
        moved=[number for step in steps for number in step.moved],
        projection=[number for step in steps for number in step.projection],
        weights=" ".join(step.weights for step in steps),
        random=" ".join(step.random for step in steps),
        drew=any(step.drew for step in steps),
        seconds=max(step.seconds for step in steps),
    )


def _weights(case: Case) -> tuple[list[float], list[float]] | None:
    runs, parameters = case.runs, case.parameters
    if not parameters.has("projection"):
        return None
    readers = [parameters.reader("projection", name) for name in parameters.names]

    def off(run: Trace, t: int) -> float:
        return math.hypot(*(distance(read(run, t), read(case.stock, t)) for read in readers))

    return [max(off(run, t) for run in runs.fast) for t in case.steps], noise_of(runs, off)


def _same_bits(runs: Runs) -> int:
    for t in range(runs.length):
        if any(run.steps[t].weights != runs.stock[0].steps[t].weights for run in runs.fast):
            return t
    return runs.length


def _closer_to_fp32(case: Case) -> list[str]:
    """With bf16 weights: whose losses are nearer to those of fp32 weights."""
    if case.runs.fp32 is None:
        return []
    reference = [step.loss for step in case.runs.fp32.steps[: case.runs.length]]
    stock, fast = (
        math.sqrt(
            statistics.fmean(distance(a, b) ** 2 for a, b in zip(side, reference, strict=True))
        )
        for side in (
            case.loss.stock,
            [step.loss for step in case.runs.fast[0].steps[: case.runs.length]],
        )
    )
    return [
        f"The weights are {case.stock.dtype}, in which stock loses every update of less than half "
        f"an ulp of its weight; a run with fp32 weights is the reference. Losses are off it by "
        f"{stock:.2g} (root mean square) in stock, by {fast:.2g} in fastft. What is no farther "
        f"from it than stock counts as equal."
    ]


def _random_states(runs: Runs, found: Sequence[Finding]) -> list[str]:
    states = [
        (run.steps[t].random, runs.stock[0].steps[t].random)
        for run in runs.fast
        for t in range(runs.length)
    ]
    if any(ours != theirs for ours, theirs in states) and not any(
        f.what == "random numbers" for f in found
    ):
        return ["The random states differ from stock's, without an effect on what was trained."]
    return []
