"""Faults that are planted (benchmarks/planted_faults.py): each still can be, each room has one to
find, the quick ones are found, and what is no finding is not taken for one."""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

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


def test_each_room_has_something_to_find(planted: ModuleType) -> None:
    files = (ROOT / "tests" / "fuzz").glob("*.py")
    rooms = {file.stem for file in files if not file.stem.startswith(("_", "test_"))}
    assert rooms <= {fault.target for fault in planted.FAULTS}


FINDING = "def test_it():\n    assert 1 == 2, 'another number'"
NO_FINDING = {
    "the copy cannot be imported": "import nowhere",
    "a text that is no Python": "def test_it(:",
    "a fixture": "import pytest\n\n@pytest.fixture\ndef one():\n    assert False\n\n"
    "def test_it(one):\n    pass",
    "no test at all": "",
}


def _ordinary(planted: ModuleType, root: Path, text: str) -> Any:
    (root / "tests").mkdir()
    (root / "tests" / "test_one.py").write_text(text)
    return planted.run("tests/test_one.py", root, 1)


def test_a_test_that_fails_is_a_finding(planted: ModuleType, tmp_path: Path) -> None:
    outcome = _ordinary(planted, tmp_path, FINDING)
    assert outcome.found and "another number" in outcome.shown


def test_an_import_that_fails_is_no_finding(planted: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="not by a fault"):
        _ordinary(planted, tmp_path, "def test_it():\n    import nowhere")


@pytest.mark.slow
@pytest.mark.parametrize("what", NO_FINDING)
def test_what_cannot_be_tested_is_no_finding(
    planted: ModuleType, tmp_path: Path, what: str
) -> None:
    with pytest.raises(RuntimeError, match=r"tested nothing|not by a fault|could not be run"):
        _ordinary(planted, tmp_path, NO_FINDING[what])


@pytest.mark.slow
def test_a_room_that_cannot_be_imported_is_no_finding(planted: ModuleType, tmp_path: Path) -> None:
    planted.copied(tmp_path)
    (tmp_path / "tests" / "fuzz" / "plan.py").write_text("import nowhere")
    with pytest.raises(RuntimeError, match="not by a fault"):
        planted.run("plan", tmp_path, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["r04", "r05", "r10", "r13", "n01", "n04", "n10"])
def test_a_planted_fault_is_found(planted: ModuleType, name: str) -> None:
    (fault,) = (fault for fault in planted.FAULTS if fault.name == name)
    outcome = planted.find(fault)
    assert outcome.found and outcome.cases, outcome


@pytest.mark.slow
def test_without_a_fault_nothing_is_found(planted: ModuleType) -> None:
    outcome = planted.find(planted.Fault("none", "", "plan", ()), seconds=1)
    assert not outcome.found and outcome.cases
