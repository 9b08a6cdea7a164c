"""Whatever raises in a training, wherever: the weights are those of the steps that were taken, the
model is stock, and the next training of it is one that follows none."""

from __future__ import annotations

import functools
import itertools
import tempfile
import threading
from collections import Counter

import pytest
import torch
from support.courses import EVENTS, WAYS, Course, frozen_objects, made, outcome, traces

import fastft
from fastft import _native
from fastft.integrations import linear_products
from fastft.layers import matrix_product, swiglu

ERRORS = (RuntimeError, KeyboardInterrupt, SystemExit, StopIteration, MemoryError)
PLACES = (
    *EVENTS,
    *("dataset", "collator", "forward", "inside the forward", "backward", "before the step"),
    *("behind the step", "scheduler", "metrics", "save"),
)
# where Trainer takes it for the end of what it iterates over
TAKEN_FOR_AN_END = {("dataset", StopIteration), ("collator", StopIteration)}
# what takes itself off, without restore()
PLUGGED = [way for way in WAYS if way not in ("fused loss", "packing", "throughput")]

CASES = [
    case
    for case in itertools.product(WAYS, PLACES, ERRORS)
    if case[1:] not in TAKEN_FOR_AN_END and (case[0] != "throughput" or case[1] != "collator")
]


def _quick() -> list[tuple[str, str, type]]:
    """Each place once, the ways and errors by turns."""
    ways, errors = itertools.cycle(WAYS), itertools.cycle(ERRORS)
    turns = [(next(ways), place, next(errors)) for place in PLACES]
    return [case for case in turns if case in CASES]


class Fault:
    """Raises when a place is reached for the `at`-th time; counts them all."""

    def __init__(self, place: str | None = None, at: int = 0, error: type = RuntimeError) -> None:
        self.place, self.at, self.error, self.counts = place, at, error, Counter()

    def __call__(self, place: str) -> None:
        self.counts[place] += 1
        if place == self.place and self.counts[place] == self.at:
            raise self.error("planted")


frozen = pytest.fixture(autouse=True, scope="module")(frozen_objects)


@pytest.fixture(autouse=True)
def small_products(monkeypatch):
    """The layers of a tiny model have fastft's products too."""
    monkeypatch.setattr(linear_products, "is_ahead", lambda: _native.missing("cpu") is None)
    monkeypatch.setattr(matrix_product, "LEAST", 4)
    monkeypatch.setattr(linear_products, "LEAST_WORK", 1)
    monkeypatch.setattr(swiglu, "LEAST", 1)


@functools.cache
def undisturbed(way: str):
    """A training that follows none, and how often it comes by each place."""
    fault = Fault()
    course = Course(tempfile.mkdtemp(), way, made(way), fault).run()
    course.detach()
    assert traces(course.model) == course.stock[0]
    return outcome(course), fault.counts


def same(these, those) -> bool:
    return len(these) == len(those) and all(
        one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        for one, other in zip(these, those, strict=True)
    )


def check(folder, way, fault, number, raised):
    (logs, weights), _ = undisturbed(way)
    model = made(way)
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    course = Course(folder / "fault", way, model, fault, first=number % 2 == 0)
    with pytest.raises(raised, match="planted"):
        course.run()
    taken = len(course.weights)
    assert same(course.weights, weights[:taken])
    assert same([model.state_dict()], course.weights[-1:])
    if way in PLUGGED:
        assert traces(model) == course.stock[0]
    if number % 3 == 0:
        course.detach()
        assert traces(model) == course.stock[0]
    model.load_state_dict(initial)
    again = Course(folder / "again", way, model).run()
    assert outcome(again)[0] == logs and same(again.weights, weights)
    again.detach()
    course.detach()
    assert traces(model) == course.stock[0]
    assert threading.active_count() == course.stock[1]
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@pytest.mark.parametrize(
    ("way", "place", "error", "number"),
    [
        pytest.param(*case, number, id=f"{case[0]}-{case[1]}-{case[2].__name__}", marks=marks)
        for number, case in enumerate(CASES)
        for marks in [() if case in _quick() else pytest.mark.slow]
    ],
)
def test_whatever_raises(tmp_path, quiet, way, place, error, number):
    _, counts = undisturbed(way)
    check(tmp_path, way, Fault(place, counts[place] // 2 + 1, error), number, error)


def test_a_probe_that_runs_out_of_memory_is_not_remembered(tmp_path, quiet):
    fault = Fault("forward without gradients", 1, MemoryError)
    check(tmp_path, "packing", fault, 1, fastft.PackingLeakError)
