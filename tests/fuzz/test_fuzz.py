"""Each room of tests/fuzz, with a fixed seed; `make fuzz SECONDS=60 SEED=7` for longer."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import strategies as st
from support.fuzzing import Found, fuzz, program

HERE = Path(__file__).parent
ROOMS = sorted(
    file.stem for file in HERE.glob("*.py") if not file.stem.startswith(("_", "test_", "conftest"))
)


@pytest.mark.parametrize("room", ROOMS)
def test_room(room: str, request: pytest.FixtureRequest, record_property) -> None:
    options = request.config.option
    asked = options.fuzz_seed, options.fuzz_seconds, not options.fuzz_first
    tried = fuzz(importlib.import_module(f"fuzz.{room}"), *asked)
    record_property("fuzzed", f"{room}: {tried.cases:,} cases in {tried.seconds:.0f} s")
    assert tried.cases > 0


def _room(check) -> SimpleNamespace:
    return SimpleNamespace(
        __name__="room", EXAMPLES=200, CASES=st.tuples(st.integers(0, 10**6)), check=check
    )


def test_what_is_found_is_the_smallest_case_and_a_program() -> None:
    def check(case):
        assert case[0] < 1000

    with pytest.raises(Found, match=r"check\(\(1000,\)\)"):
        fuzz(_room(check), 0)


def test_what_does_not_raise_is_found_too() -> None:
    def check(case):
        with pytest.raises(ValueError, match="refused"):
            if case[0] < 10:
                raise ValueError("refused")

    with pytest.raises(Found, match=r"check\(\(10,\)\)"):
        fuzz(_room(check), 0)


def test_a_fixed_seed_tries_the_same() -> None:
    seen: list[list[tuple[int]]] = [[], []]
    for each in seen:
        fuzz(_room(each.append), 3)
    assert seen[0] == seen[1] and len(set(seen[0])) > 100


def test_seconds_are_spent_on_other_seeds() -> None:
    seen: list[tuple[int]] = []
    tried = fuzz(_room(seen.append), 0, seconds=0.5)
    assert tried.seconds >= 0.5 and tried.cases == len(seen) >= len(set(seen)) > 50


def test_the_program_of_a_case_shows_it(tmp_path: Path) -> None:
    plan = importlib.import_module("fuzz.plan")
    case = plan.Case([4, 9], 8, None, None, "truncate", None, 1, 0)
    file = tmp_path / "shown.py"
    # a case that the room would never draw: the plan refuses it
    for each, ends in ((case, 0), (case._replace(overlong="error"), 1)):
        file.write_text(program(plan, each))
        done = subprocess.run(
            [sys.executable, str(file)],
            env={"PYTHONPATH": f"{HERE.parent}:{HERE.parents[1]}", "PATH": ""},
            capture_output=True,
            text=True,
        )
        assert done.returncode == ends, done.stderr
