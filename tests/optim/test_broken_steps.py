"""A step of AdamW that something breaks off: nothing of it is done, or all of it, or whoever asks
for the optimizer's states is told that a part of it is."""

from __future__ import annotations

import functools
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastft

FASTFT = str(Path(fastft.__file__).parent)
PLACES = 50  # of a step, where it is interrupted
SHAPES = (5, 130), (63,), (1,), (2, 128)
WAYS: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": torch.float32},
    "exact": {},
    "kahan, clipped": {"rounding": "kahan", "max_grad_norm": 0.1},
    "8 bits": {"moments": "8bit", "seed": 3},
    "4 bits, stochastic": {"moments": "4bit", "rounding": "stochastic", "seed": 3},
    "plain torch": {"impl": "eager"},
    "plain torch, 8 bits": {"impl": "eager", "moments": "8bit", "seed": 3},
    "other strides": {"transposed": True},
    "states on the host": {"offload": "states"},
    "gradients on the host": {"offload": "gradients"},
    "overlapped": {"offload": "overlap"},
    "gradients released": {"release_gradients": True},
}


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        drawn = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList(
            [nn.Parameter(torch.randn(shape, generator=drawn).to(dtype)) for shape in SHAPES]
        )

    def forward(self) -> torch.Tensor:
        return sum((weight.float() ** 2).sum() for weight in self.weights)


class Training:
    """A model of a few weights and its optimizer, which has taken a step."""

    def __init__(
        self, dtype: torch.dtype = torch.bfloat16, transposed: bool = False, **options: Any
    ) -> None:
        self.model, self.transposed = Model(dtype), transposed
        self.optimizer = fastft.AdamW(self.model.parameters(), lr=1e-2, **options)
        if options.get("offload") == "overlap":
            self.optimizer.follow(self.model)
        self.gradients()
        self.optimizer.step()

    def gradients(self) -> None:
        self.optimizer.zero_grad()
        self.model().backward()
        if self.transposed:
            for weight in self.model.weights:
                weight.grad = weight.grad.T.contiguous().T

    def numbers(self) -> list[torch.Tensor]:
        """Weights, states and counts; raises where they are torn."""
        states = self.optimizer.state_dict()["state"]
        entries = [value for number in sorted(states) for value in states[number].values()]
        of_states = [value for value in entries if isinstance(value, torch.Tensor)]
        return [value.detach().clone() for value in (*self.model.weights, *of_states)]


def same(these: list[torch.Tensor], those: list[torch.Tensor]) -> bool:
    return all(
        torch.equal(one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8))
        for one, other in zip(these, those, strict=True)
    )


class _Failing(TorchDispatchMode):
    """Raises at one of torch's operations, without doing it."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.left -= 1
        if self.left == 0:
            raise MemoryError("no more")
        return func(*args, **(kwargs or {}))


def _outwards(frame: Any) -> Iterator[Any]:
    while frame is not None:
        yield frame
        frame = frame.f_back


@contextmanager
def interrupted(at: int) -> Iterator[Callable[[], int]]:
    """Ctrl-C at the so manieth call or return of any function, Python's or C's, inside of fastft.

    Outside of it torch's own modes can be left on: `no_grad` is no `with` yet when it is entered.
    """
    events = 0

    def count(frame: Any, event: str, function: Any) -> None:
        nonlocal events
        events += any(one.f_code.co_filename.startswith(FASTFT) for one in _outwards(frame))
        if events == at > 0:
            sys.setprofile(None)
            signal.raise_signal(signal.SIGINT)

    # a shell's job in the background ignores the signal
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.setprofile(count)
    try:
        yield lambda: events
    finally:
        sys.setprofile(None)
        signal.signal(signal.SIGINT, before)


def whole(training: Training) -> None:
    """All of a step that may be broken off."""
    if training.optimizer.release_gradients:  # inside backward
        training.gradients()
    training.optimizer.step()
    if training.optimizer.offload == "overlap":
        training.model()


def ready(way: str) -> Training:
    """A training in front of its next step."""
    training = Training(**WAYS[way])
    if not training.optimizer.release_gradients:
        training.gradients()
    return training


@functools.cache
def outcomes_of(way: str) -> list[list[torch.Tensor]]:
    """The numbers before a step, behind it, and behind the one after that."""
    training = ready(way)
    found = [training.numbers()]
    for _ in range(2):
        whole(training)
        found.append(training.numbers())
        if not training.optimizer.release_gradients:
            training.gradients()
    return found


def goes_on(training: Training, outcomes: list[list[torch.Tensor]]) -> bool:
    """Whether the step was taken, whole; goes on from there."""
    before, after, last = outcomes
    now = training.numbers()
    taken = same(now, after)
    assert taken or same(now, before)
    if taken:
        training.gradients()
    training.optimizer.step()
    assert same(training.numbers(), last if taken else after)
    return taken


# many operations, or much else like one of the others
_LONG = ("plain torch", "plain torch, 8 bits", "states on the host", "other strides")
_WAYS = [pytest.param(way, marks=[pytest.mark.slow] * (way in _LONG)) for way in WAYS]


@pytest.mark.parametrize("way", _WAYS[:-1])
def test_an_error_in_a_step_leaves_it_undone_or_says_that_it_is_torn(way):
    undone = torn = 0
    for at in range(1, 10_000):
        training = ready(way)
        try:
            with _Failing(at) as failing:
                training.optimizer.step()
        except MemoryError:
            pass
        if failing.left > 0:
            break
        try:
            training.numbers()
        except RuntimeError as error:
            assert "broke off in its middle (MemoryError: no more)" in str(error)
            with pytest.raises(RuntimeError, match="broke off in its middle"):
                training.optimizer.step()
            torn += 1
        else:
            undone += not goes_on(training, outcomes_of(way))
    assert undone > 0
    if way in ("fp32", "exact", "kahan, clipped", "8 bits", "4 bits, stochastic"):
        # behind the kernel only the count is left
        assert torn <= 1


@pytest.mark.parametrize("way", _WAYS)
def test_ctrl_c_in_a_step_comes_before_or_behind_all_of_it(way):
    training = ready(way)
    with interrupted(0) as events:
        whole(training)
    places = {"undone": 0, "done": 0}
    every = max(1, events() // PLACES)
    for at in range(1, events(), every):
        training = ready(way)
        with pytest.raises(KeyboardInterrupt), interrupted(at):
            whole(training)
        if way == "gradients released":
            check_parameters(training, outcomes_of(way))
        else:
            places["done" if goes_on(training, outcomes_of(way)) else "undone"] += 1
    assert way == "gradients released" or min(places.values()) > 0, places


def check_parameters(training: Training, outcomes: list[list[torch.Tensor]]) -> None:
    """Each parameter has taken its step or not, with its state; each can take the next."""
    now, before, after = training.numbers(), *outcomes[:2]
    count = len(training.model.weights)
    each = (len(now) - count) // count
    for place in range(count):
        own = [place, *range(count + place * each, count + (place + 1) * each)]
        parts = [[numbers[i] for i in own] for numbers in (now, before, after)]
        assert same(parts[0], parts[1]) or same(parts[0], parts[2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gradients were thrown away
        training.gradients()
        training.optimizer.step()
