"""Every single wait of the engine is needed: without it a training under the tests' device
fails."""

from __future__ import annotations

import ast
import functools
import gc
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.offloaded import (
    TIERS,
    Case,
    Trained,
    assert_same_bits,
    small_buffers,
    trained,
)
from support.scheduler import Scheduler

import fastft
from fastft.optim.offload import gradients

ROOM = Path(fastft.__file__).parent / "optim"
CASES = {
    "plain": Case("chain", rounding="exact"),
    "clipped, accumulated": Case("chain", clipping="option", accumulation=3, params="late"),
    "8 bits, resumed": Case("chain", moments="8bit", clipping="call", resumed="as before"),
    "reduced in another queue": Case("chain", clipping="option"),
}
STEPS = 4
_FIRST = {"gradients": "gradients", "deferred": "overlap"}  # tiers, by the room of a wait


class Site(NamedTuple):
    """A call of `wait` or `synchronize`."""

    file: str
    first: int
    last: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.first}"


def sites() -> list[Site]:
    """All of the optimizer, but for the interface itself."""
    found = []
    for path in sorted(ROOM.rglob("*.py")):
        if path.name == "device.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in ("wait", "synchronize")
            ):
                name = path.relative_to(ROOM.parent).as_posix()
                end = node.end_lineno or node.lineno
                found.append(Site(name, node.lineno, end, node.col_offset))
    return sorted(found)


@pytest.fixture(autouse=True)
def many_pieces(monkeypatch):
    """Buffers so small that each is used again many times within a step."""
    small_buffers(monkeypatch)


@functools.cache
def resident(name: str) -> Trained:
    return trained(CASES[name], offload=None, steps=STEPS)


def attempt(name: str, tier: str, scheduler: Scheduler) -> None:
    """Fails where the bits are other than the resident optimizer's, or the device finds a fault."""
    expected = resident(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with scheduler.installed(), pytest.MonkeyPatch.context() as patch:
            if name != "plain":  # whose gradients wait for those before them
                patch.setattr(gradients, "IN_FLIGHT", 2**28)
            if name == "reduced in another queue":
                reduced = _Reduced(scheduler)
                patch.setattr(gradients.HeldGradients, "hold", reduced.hold())
                found = trained(CASES[name], offload=tier, steps=STEPS, backward=reduced.backward)
            else:
                found = trained(CASES[name], offload=tier, steps=STEPS)
            gc.collect()  # what goes with the optimizer goes here
    assert_same_bits(found, expected)


class _Reduced:
    """Makes gradients as FSDP2 does: in another queue, which the model's waits for at the end of
    backward; in a new one each time."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler, self._queue = scheduler, scheduler.queue()
        self._kept: list[torch.Tensor] = []

    def hold(self) -> Any:
        hold = gradients.HeldGradients.hold

        def reduce_and_hold(held: Any, param: Any) -> None:
            if type(param.grad) is torch.Tensor:
                self._kept.append(param.grad)
                self._queue.wait(self._scheduler.current().record())
                with self._scheduler.under(self._queue):
                    param.grad = param.grad.clone()
                    hold(held, param)

        return reduce_and_hold

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()
        self._scheduler.current().wait(self._queue.record())
        self._kept.clear()
        self._queue = self._scheduler.queue()


def fails_without(site: Site) -> bool:
    """Tells whether a training of some tier needs this wait."""
    reached = False
    first = _FIRST.get(Path(site.file).stem, "states")
    for tier in sorted(TIERS, key=lambda tier: tier != first):
        for name in CASES:
            scheduler = Scheduler("late", without=(site.file, range(site.first, site.last + 1)))
            try:
                attempt(name, tier, scheduler)
            except Exception:
                # of every kind: numbers that are poison may raise anywhere
                assert scheduler.ignored or not scheduler.faults
                return True
            reached |= scheduler.ignored > 0
    assert reached, f"no training here comes to the wait at {site}"
    return False


@pytest.mark.parametrize("site", sites(), ids=str)
def test_without_this_wait_a_training_fails(site):
    lines = [other for other in sites() if other.file == site.file and other.first == site.first]
    assert lines == [site], "two waits in a line: this test tells them apart by their lines"
    assert fails_without(site), f"the wait at {site} is not needed"


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("order", ["late", 0])
def test_with_all_its_waits_the_engine_has_the_resident_bits(order, name, tier):
    attempt(name, tier, Scheduler(order))


@pytest.mark.slow
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("order", ["early", *range(1, 20)])
def test_with_all_its_waits_the_engine_has_the_resident_bits_in_more_orders(order, name, tier):
    attempt(name, tier, Scheduler(order))
