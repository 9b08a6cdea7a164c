"""Faults that fastft once had, planted back (benchmarks/planted_faults.py): each still can be, and
the quick ones are found."""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def planted() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module("planted_faults")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_each_change_fits_the_text(planted: ModuleType, tmp_path: Path) -> None:
    for fault in planted.FAULTS:
        root = tmp_path / fault.name
        for change in fault.changes:
            (root / change.file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / change.file, root / change.file)
        before = [(root / change.file).read_text() for change in fault.changes]
        planted.plant(fault, root)
        after = [(root / change.file).read_text() for change in fault.changes]
        assert all(map(str.__ne__, before, after))


def test_a_change_that_does_not_fit_is_an_error(planted: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "room.py").write_text("twice twice")
    for old, times in (("twice", 2), ("never", 0)):
        fault = planted.Fault("r99", "", "plan", (planted.Change("room.py", old, "new"),))
        with pytest.raises(ValueError, match=f"r99: room.py has {times} times '{old}'"):
            planted.plant(fault, tmp_path)


def test_each_target_is_there(planted: ModuleType) -> None:
    for fault in planted.FAULTS:
        room = not fault.target.startswith("tests/")
        assert (ROOT / (f"tests/fuzz/{fault.target}.py" if room else fault.target)).exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["r04", "r05", "r10", "r13"])
def test_a_planted_fault_is_found(planted: ModuleType, name: str) -> None:
    (fault,) = (fault for fault in planted.FAULTS if fault.name == name)
    outcome = planted.find(fault)
    assert outcome.found and outcome.cases, outcome


@pytest.mark.slow
def test_without_a_fault_nothing_is_found(planted: ModuleType) -> None:
    nothing = planted.Fault("none", "", "plan", ())
    assert not planted.find(nothing, seconds=1).found
