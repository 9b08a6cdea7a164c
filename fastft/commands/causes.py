"""What is behind a difference, by name: batches, labels, random numbers, a leak, a shift, ...

Each cause is a function that looks for its own trace in what was recorded and returns a `Finding`
or None. They stand in the order in which one brings about the next.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from fastft.commands.case import Case
from fastft.commands.trace import Step, Trace
from fastft.commands.yardstick import Measured

_SHOWN = 4
_OTHER_MASKS = (
    "the random states differ after this step: it drew more or fewer random numbers than stock's, "
    "so that dropout has other masks"
)


@dataclass(frozen=True)
class Finding:
    """One thing that differs.

    Attributes:
        what: its name.
        step: the first step (from 1) in which it does.
        sentence: what was seen there.
        parameters: the names of the parameters that it is about, if it is about some.
    """

    what: str
    step: int
    sentence: str
    parameters: list[str] = field(default_factory=list)


def steps(case: Case) -> Finding | None:
    """One of both trains longer."""
    stock = len(case.stock.steps)
    for run in case.runs.fast:
        if len(run.steps) != stock:
            sentence = f"stock trains for {stock} optimizer steps, fastft for {len(run.steps)}"
            return Finding("number of steps", min(stock, len(run.steps)) + 1, sentence)
    return None


def parameters(case: Case) -> Finding | None:
    """A parameter is trained on one side only."""
    for run in case.runs.fast:
        lacks = [name for name in case.stock.parameters if name not in set(run.parameters)]
        extra = [name for name in run.parameters if name not in set(case.stock.parameters)]
        if lacks or extra:
            side = "stock, not by fastft" if lacks else "fastft, not by stock"
            return Finding(
                "trained parameters",
                1,
                f"{_named(lacks or extra)} trained by {side}",
                lacks or extra,
            )
    return None


def batches(case: Case) -> Finding | None:
    """Other examples, or other labels of the same."""
    for t, run, stock, fast in case.pairs():
        if Counter(stock.batches) == Counter(fast.batches):
            continue
        if Counter(m.inputs for m in stock.micro) == Counter(m.inputs for m in fast.micro):
            return Finding(
                "labels",
                t + 1,
                f"the tokens are the same, and their labels are not: {stock.supervised} tokens are "
                f"supervised in stock, {fast.supervised} in fastft",
            )
        return Finding("batches", t + 1, _other_batches(case.stock, run, t))
    return None


def _other_batches(stock_run: Trace, fast_run: Trace, t: int) -> str:
    stock, fast = stock_run.steps[t], fast_run.steps[t]
    documents = [sum(micro.documents for micro in step.micro) for step in (stock, fast)]
    text = (
        f"stock trains on {len(stock.micro)} batches, {documents[0]} documents and {stock.tokens} "
        f"tokens, fastft on {len(fast.micro)}, {documents[1]} and {fast.tokens}"
    )
    missing = Counter(stock.batches) - Counter(fast.batches)
    later = Counter(batch for step in fast_run.steps[t:] for batch in step.batches)
    if missing and not any(later[batch] for batch in missing):
        text += f"; {sum(missing.values())} of stock's batches never come: dropped"
    return text


def learning_rate(case: Case) -> Finding | None:
    """The schedule."""
    for t, _, stock, fast in case.pairs():
        rates = [sorted(set(step.learning_rate)) for step in (stock, fast)]
        pairs = zip(*rates, strict=False)
        if all(rates) and not (
            len(rates[0]) == len(rates[1])
            and all(math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-30) for a, b in pairs)
        ):
            listed = [", ".join(f"{rate:.3g}" for rate in side) for side in rates]
            return Finding("learning rate", t + 1, f"{listed[0]} in stock, {listed[1]} in fastft")
    return None


def random_numbers(case: Case) -> Finding | None:
    """Dropout has other masks. Without a consequence it is no difference."""
    for t, (stock, fast) in enumerate(zip(*_steps_of(case.runs.dropout), strict=False)):
        if stock.random != fast.random:
            return Finding("random numbers", t + 1, f"with dropout, {_OTHER_MASKS}")
    if not case.consequences:
        return None
    for t, _, stock, fast in case.pairs():
        if stock.random != fast.random and (stock.drew or fast.drew):
            return Finding("random numbers", t + 1, _OTHER_MASKS)
    return None


def _steps_of(pair: tuple[Trace, Trace] | None) -> tuple[list[Step], list[Step]]:
    return ([], []) if pair is None else (pair[0].steps, pair[1].steps)


def leak(case: Case) -> Finding | None:
    """Tokens of a packed batch see those of another document."""
    tolerance = max(1e-4, 8 * case.runs.epsilon)
    if (case.stock.leak or 0.0) > tolerance:
        return None  # the script packs, and stock leaks as well
    for run in case.runs.fast:
        if run.leak is not None and run.leak > tolerance:
            return Finding(
                "leak between packed documents",
                1,
                f"other tokens in a packed document change the outputs of its neighbour by "
                f"{run.leak:.2g} of their size",
            )
    return None


def shift(case: Case) -> Finding | None:
    """A label is predicted from the wrong token."""
    for t, _, stock, fast in case.pairs() if case.consequences else ():
        for ours, theirs in zip(fast.micro, stock.micro, strict=False):
            if None not in (ours.shift, theirs.shift) and ours.shift != theirs.shift:
                return Finding(
                    "shift of the labels",
                    t + 1,
                    f"a label is predicted {theirs.shift} positions ahead in stock, {ours.shift} "
                    f"in fastft",
                )
    return None


def ignored_labels(case: Case) -> Finding | None:
    """Another `ignore_index`: other positions get a gradient."""
    for t, _, stock, fast in case.pairs() if case.consequences else ():
        for ours, theirs in zip(fast.micro, stock.micro, strict=False):
            if None not in (ours.learning, theirs.learning) and ours.learning != theirs.learning:
                return Finding(
                    "ignored labels",
                    t + 1,
                    f"of the same batch {theirs.learning} positions get a gradient in stock, "
                    f"{ours.learning} in fastft ({ours.supervised} labels are not ignored): "
                    f"another ignore_index",
                )
    return None


def accumulation(case: Case) -> Finding | None:
    """The losses of a step's batches are put together otherwise: a mean of means."""
    t = case.loss.first
    if t is None:
        return None
    for run in case.runs.fast:
        stock, fast = case.stock.steps[t], run.steps[t]
        ratios = _ratios(stock.micro_losses, fast.micro_losses)
        labels = [micro.supervised for micro in stock.micro]
        if len(ratios) < 2 or len(ratios) != len(stock.micro) or 0 in labels:
            continue
        means = [sum(labels) / (len(labels) * count) for count in labels]
        near = 1e-3 + 4 * case.runs.epsilon
        seen = f"losses of {len(ratios)} batches are " + ", ".join(f"{r:.3f}" for r in ratios)
        for what, expected in (
            ("a mean of the batches' means instead of the mean over all their labels", means),
            ("the mean over all labels instead of a mean of means", [1 / m for m in means]),
        ):
            if max(expected) - min(expected) > 2 * near and _near(ratios, expected, near):
                return Finding("gradient accumulation", t + 1, f"the {seen} times stock's: {what}")
        factor = statistics.median(ratios)
        if abs(factor - 1) > 2 * near and _near(ratios, [factor] * len(ratios), near):
            text = f"the {seen} times stock's: all divided by another number of items"
            return Finding("gradient accumulation", t + 1, text)
    return None


def loss(case: Case) -> Finding | None:
    """The loss of the first step with the same weights, or of a later one."""
    t = case.loss.first
    if t is None:
        return None
    text = _numbers(case.loss, t)
    stock = case.stock.steps[t]
    for run in case.runs.fast:
        off = [
            number + 1
            for number, ratio in enumerate(_ratios(stock.micro_losses, run.steps[t].micro_losses))
            if abs(ratio - 1) > 1e-3 + 4 * case.runs.epsilon
        ]
        if len(stock.micro) > 1 and off:
            text += f"; of its {len(stock.micro)} batches number {', '.join(map(str, off))} differs"
            break
    same = t == 0 and case.stock.projection0 == case.runs.fast[0].projection0
    return Finding("loss", t + 1, text + ("; the weights are still the same" if same else ""))


def gradients(case: Case) -> Finding | None:
    """The norm of all gradients, before clipping."""
    measured = case.grad_norm
    if measured is None or measured.first is None:
        return None
    t = measured.first
    names = [n for n, m in case.gradients.items() if m.over[t] and n not in case.noisy]
    text = _numbers(measured, t)
    if names and len(names) < len(case.gradients):
        text += f"; gradients that differ: {_named(names)}"
    return Finding("gradient norm", t + 1, text, names)


def clipping(case: Case) -> Finding | None:
    """The same gradients, and what the optimizer gets of them is not."""
    found = case.off(case.gradients)
    if found is None:
        return None
    t, names = found
    if case.grad_norm is not None and case.grad_norm.over[t]:
        return None
    ratios = [_ratio(case.gradients[name], t) for name in names]
    middle = statistics.median(ratios)
    share = len(names) / max(len(case.gradients) - len(case.noisy), 1)
    if share > 0.5 and all(abs(ratio / middle - 1) < 0.02 for ratio in ratios if middle):
        text = (
            f"gradients are those of stock before clipping, and {middle:.3g} times stock's where "
            f"the optimizer sees them"
        )
        return Finding("clipping", t + 1, text)
    return Finding("gradients", t + 1, f"{_named(names)}: {_worst(case.gradients, t)}", names)


def stale(case: Case) -> Finding | None:
    """A parameter stays where it is."""
    for t in case.steps:
        names = [
            name
            for name, m in case.moved.items()
            if m.over[t] and name not in case.noisy and m.fast[t] < 1e-3 * m.stock[t]
        ]
        if names:
            return Finding(
                "stale parameter", t + 1, f"{_named(names)}: moves in stock, not in fastft", names
            )
    return None


def weight_decay(case: Case) -> Finding | None:
    """Other parameters are decayed, by the optimizer's groups or by what it does."""
    for run in case.runs.fast:
        ours, theirs = (
            dict(zip(trace.parameters, trace.weight_decay, strict=False))
            for trace in (run, case.stock)
        )
        names = [
            name
            for name in case.parameters.names
            if not _same_decay(ours.get(name, math.nan), theirs.get(name, math.nan))
        ]
        if names:
            text = (
                f"{ours[names[0]]:g} in fastft, {theirs[names[0]]:g} in stock, for {_kind(names)}"
            )
            return Finding("weight decay", 1, text, names)
    found = case.off(case.projections)
    if found is None or not case.stock.projection0:
        return None
    t, names = found
    decays = {name: _decay(case, name, min(t + 2, len(case.steps) - 1)) for name in names}
    known = {abs(d) for d in case.stock.weight_decay if d and not math.isnan(d)}
    fitting = [
        name
        for name, decay in decays.items()
        if any(abs(abs(decay) - value) < 0.2 * value for value in known)
    ]
    if not fitting or len(fitting) < 0.6 * len(names):
        return None
    decay = statistics.median(decays[name] for name in fitting)
    text = (
        f"by learning rate x {abs(decay):.2g} x weight a step {_kind(fitting)} "
        f"{'is smaller' if decay > 0 else 'is larger'} than in stock: "
        f"{'decayed, and not so in stock' if decay > 0 else 'not decayed, as it is in stock'}"
    )
    return Finding("weight decay", t + 1, text, fitting)


def _decay(case: Case, name: str, t: int) -> float:
    """The coefficient by which the fast run decays a parameter more than stock, if that is all."""
    measured = case.projections[name]
    place = case.stock.parameters.index(name)
    before = [case.stock.projection0[place], *measured.stock]
    rates = [max(step.learning_rate, default=0.0) for step in case.stock.steps]
    walked = sum(rates[s] * before[s] for s in range(t + 1))
    return (measured.stock[t] - measured.fast[t]) / walked if walked else 0.0


def moments(case: Case) -> Finding | None:
    """The same gradients, and another mean of them."""
    found = case.off(case.moments)
    if found is None:
        return None
    t, names = found
    earlier = case.off(case.gradients)
    if earlier is not None and earlier[0] <= t:
        return None
    return Finding("moments", t + 1, f"{_named(names)}: {_worst(case.moments, t)}", names)


def update_size(case: Case) -> Finding | None:
    """Weights go less far, or farther."""
    found = case.off(case.moved)
    if found is None:
        return None
    t, names = found
    ratio = statistics.median(_ratio(case.moved[name], t) for name in names)
    of = f"{len(names)} of {len(case.moved)} parameters, {_named(names)},"
    return Finding(
        "size of updates", t + 1, f"{of} move {ratio:.3g} times as far as stock's", names
    )


def weights(case: Case) -> Finding | None:
    """Weights go elsewhere."""
    found = case.off(case.projections)
    if found is None:
        return None
    t, names = found
    return Finding("weights", t + 1, f"{_named(names)}: {_worst(case.projections, t)}", names)


# in the order in which one brings about the next within a step
CAUSES: list[Callable[[Case], Finding | None]] = [
    steps,
    parameters,
    batches,
    learning_rate,
    random_numbers,
    leak,
    shift,
    ignored_labels,
    accumulation,
    loss,
    gradients,
    clipping,
    stale,
    weight_decay,
    moments,
    update_size,
    weights,
]


def _ratio(measured: Measured, t: int) -> float:
    return measured.fast[t] / measured.stock[t] if measured.stock[t] else math.inf


def _ratios(stock: list[float], fast: list[float]) -> list[float]:
    return [b / a for a, b in zip(stock, fast, strict=False) if a]


def _near(values: list[float], expected: list[float], share: float) -> bool:
    return all(abs(a - b) < share * abs(b) for a, b in zip(values, expected, strict=True))


def _same_decay(ours: float, theirs: float) -> bool:
    if math.isnan(ours) or math.isnan(theirs):
        return True
    return math.isclose(ours, theirs, rel_tol=1e-6, abs_tol=1e-12)


def _numbers(measured: Measured, t: int) -> str:
    return (
        f"{measured.stock[t]:.6g} in stock, {measured.fast[t]:.6g} in fastft: off by "
        f"{measured.difference[t]:.2g}, where {measured.allowed[t]:.2g} is rounding"
    )


def _worst(kind: dict[str, Measured], t: int) -> str:
    name = max(kind, key=lambda n: kind[n].difference[t] / (kind[n].allowed[t] or 1e-300))
    return f"{name} {_numbers(kind[name], t)}"


def _named(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _kind(names: list[str]) -> str:
    """Parameters in a word, where their names allow it."""
    words = {"norm": "norm weights", "bias": "biases"}
    kinds = {next((w for w in words if w in name.lower()), "") for name in names}
    if "" in kinds:
        return _named(names)
    return f"{' and '.join(words[kind] for kind in sorted(kinds))} ({_named(names)})"
