"""Fuzzing by hypothesis: a room of tests/fuzz has `CASES`, a strategy of named tuples of plain
values, and `check(case)`, which raises where a promise is broken.

In the ordinary tests a room is tried with `EXAMPLES` cases of a fixed seed; `make fuzz SECONDS=60
SEED=7` tries each for so long, with rounds of seeds from there on. A failure ends in a program
that shows it: the smallest case that was found is in it as Python writes it.
"""

from __future__ import annotations

import time
from itertools import count
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

ROUND = 100  # cases of a seed


class Found(AssertionError):
    """A case that breaks a promise, with the program that shows it."""


class Tried(NamedTuple):
    cases: int
    seconds: float


def program(room: ModuleType, case: Any) -> str:
    """What shows the case again, run where the tests are."""
    # a number that is not finite is written by its name
    return (
        f"# PYTHONPATH=tests python this_file.py\n"
        f"from math import inf, nan\nfrom {room.__name__} import *\n\ncheck({case!r})\n"
    )


def fuzz(
    room: ModuleType, first_seed: int, seconds: float | None = None, shrink: bool = True
) -> Tried:
    """Tries a room.

    Args:
        seconds: how long; None for the room's number of `EXAMPLES`.
        shrink: looks for the smallest case where one has failed.

    Raises:
        Found: `check` has raised, whose exception is the cause.
    """
    begin, tried = time.monotonic(), 0
    for seed_of_round in count(first_seed):
        examples = room.EXAMPLES if seconds is None else min(ROUND, room.EXAMPLES)
        tried += _round(room, seed_of_round, examples, tried, shrink)
        passed = time.monotonic() - begin
        if seconds is None or passed >= seconds:
            return Tried(tried, passed)
    raise AssertionError("unreachable")


def _round(room: ModuleType, seed_of_round: int, examples: int, before: int, shrink: bool) -> int:
    """The number of cases, where `before` have been tried without a failure."""
    tried: list[Any] = []
    failed: list[int] = []

    @seed(seed_of_round)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(room.CASES)
    def every(case: Any) -> None:
        tried.append(case)
        try:
            room.check(case)
        except BaseException:
            failed.append(before + len(tried))
            raise

    try:
        every()
    except (Exception, pytest.fail.Exception) as error:  # the second is none, of pytest.raises
        # hypothesis runs the smallest one last
        first = f"first seen in case {failed[0]:,}"
        raise Found(f"{error!r}\n{first}:\n\n{program(room, tried[-1])}") from error
    return len(tried)
