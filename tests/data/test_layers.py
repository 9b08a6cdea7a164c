"""The rooms of fastft/data: planning and collating have a pack in common, and stand on no wing."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fastft

DATA = Path(fastft.__file__).parent / "data"
PLANNING = ("plan", "packed", "streaming", "balance", "even_packs", "lengths")
COMMON = ("pack", "processed", "arrow_rows", "column_rows", "keys")


def imported(room: Path) -> set[str]:
    """The modules of fastft that a room imports, wherever in it, but for its types alone."""
    tree = ast.parse(room.read_text())
    typed = [
        name
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and ast.unparse(test.test) == "TYPE_CHECKING"
        for name in test.body
    ]
    return {
        node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        and node not in typed
        and (node.module or "").startswith("fastft")
    }


@pytest.mark.parametrize("room", PLANNING)
def test_planning_meets_collating_in_a_pack(room):
    others = {name.removeprefix("fastft.data.") for name in imported(DATA / f"{room}.py")}
    assert not {name for name in others if (DATA / f"{name}.py").exists()} - {*PLANNING, *COMMON}


def test_no_room_of_collating_needs_a_plan():
    rooms = [path for path in DATA.rglob("*.py") if path.stem not in PLANNING]
    plans = {f"fastft.data.{room}" for room in PLANNING}
    assert len(rooms) > 15 and not [path.name for path in rooms if imported(path) & plans]


@pytest.mark.parametrize("wing", ["attention", "integrations", "loss", "optim"])
def test_data_stands_on_no_other_wing(wing):
    for room in DATA.rglob("*.py"):
        assert not [name for name in imported(room) if name.startswith(f"fastft.{wing}")], room
