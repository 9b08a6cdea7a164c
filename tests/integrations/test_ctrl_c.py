"""Ctrl-C at random moments of a training: the weights are those of whole steps, the model is stock,
threads have ended, and the next training is one that follows none."""

from __future__ import annotations

import os
import random
import signal
import tempfile
import threading
import time

import pytest
import torch
from support.courses import WAYS, Course, frozen_objects, made, outcome, traces

SEEDS = 8
QUICK = ("packs", "overlapped steps")
frozen = pytest.fixture(autouse=True, scope="module")(frozen_objects)


class Interrupt:
    """Sends the signal so many seconds after a training has begun, if it has not ended by then."""

    def __init__(self, seconds: float) -> None:
        self.timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))

    def __call__(self, place: str) -> None:
        if place == "on_train_begin":
            self.timer.start()
        elif place == "on_train_end":
            self.timer.cancel()


class Watch:
    """The seconds of a training."""

    def __init__(self) -> None:
        self.began, self.seconds = 0.0, 0.0

    def __call__(self, place: str) -> None:
        if place == "on_train_begin":
            self.began = time.perf_counter()
        elif place == "on_train_end":
            self.seconds = time.perf_counter() - self.began


@pytest.fixture
def handler():
    """Python's own, which a shell's job in the background does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[pytest.mark.slow] * (way not in QUICK)) for way in WAYS]
)
def test_ctrl_c_at_random_moments(tmp_path, quiet, handler, way):
    watch = Watch()
    logs, weights = outcome(Course(tempfile.mkdtemp(), way, made(way), watch).run())
    random_ = random.Random(way)
    for seed in range(2 if way in QUICK else SEEDS):
        model = made(way)
        interrupt = Interrupt(random_.uniform(0, watch.seconds))
        course = Course(tmp_path / f"{seed}", way, model, interrupt)
        try:
            course.run()
        except KeyboardInterrupt:
            pass
        interrupt.timer.join()
        torch.set_grad_enabled(
            True
        )  # torch's no_grad, interrupted when it is entered, leaves it off
        taken = len(course.weights)  # or one more, of which nobody has told the course
        assert all(map(same, course.weights, weights))
        assert any(same(model.state_dict(), each) for each in weights[taken - 1 : taken + 1])
        course.detach()
        assert traces(model) == course.stock[0]
        model.load_state_dict(weights[0])
        again = Course(tmp_path / f"{seed} again", way, model).run()
        assert outcome(again)[0] == logs and all(map(same, again.weights, weights))
        assert threading.active_count() == course.stock[1]
