"""Each room of tests/soak for long (`make soak`); for a short while in the ordinary tests, which
also shows that what a room would have to find is found."""

from __future__ import annotations

import importlib
import tempfile
import threading
from pathlib import Path

import pytest
from support.soaking import BYTES, COUNTS, SLOWER, Grown, Watch, needs_proc

pytestmark = [needs_proc, pytest.mark.usefixtures("quiet")]
ROOMS = sorted(
    file.stem
    for file in Path(__file__).parent.glob("*.py")
    if not file.stem.startswith(("_", "test_"))
)


def soaked(room, folder, each=lambda: None, brief=True):
    module = importlib.import_module(f"soak.{room}")
    turns, every = module.BRIEF if brief else (module.TURNS, module.EVERY)
    with Watch(folder) as watch:
        module.soak(watch, turns, every, folder, each)
    return watch, module


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.soak
@pytest.mark.parametrize("room", ROOMS)
def test_nothing_grows(room, folder, record_property):
    watch, module = soaked(room, folder, brief=False)
    record_property("soaked", f"{room}: {watch.said()}")
    watch.check(COUNTS | BYTES | module.BOUNDS, SLOWER)


@pytest.mark.parametrize("room", ROOMS)
def test_nothing_is_counted_more_often(room, folder):
    watch, _ = soaked(room, folder)
    try:
        watch.check(COUNTS)
    except Grown:  # by what other tests of this process have begun, too, but that no second time
        watch, _ = soaked(room, folder)
        watch.check(COUNTS)


class Leaks:
    """What a careless programmer leaves behind at each turn."""

    def __init__(self, folder):
        self.folder, self.kept, self.stop = folder, [], threading.Event()

    def objects(self):
        self.kept.append([])

    def files(self):
        self.kept.append((self.folder / "kept").open("w"))

    def threads(self):
        self.kept.append(threading.Thread(target=self.stop.wait))
        self.kept[-1].start()

    def temporary_files(self):
        tempfile.NamedTemporaryFile(delete=False).close()

    def allocated(self):
        self.kept = bytearray(len(self.kept) + 100_000)

    def end(self):
        self.stop.set()
        for each in self.kept:
            getattr(each, "close", getattr(each, "join", int))()


@pytest.mark.parametrize("what", ["objects", "files", "threads", "temporary files", "allocated"])
@pytest.mark.parametrize("room", ["trainings", "operators"])
def test_a_leak_is_found(room, what, folder):
    leaks = Leaks(folder)
    bounds = {what: {**COUNTS, "allocated": 50_000}[what]}
    try:
        watch, _ = soaked(room, folder, getattr(leaks, what.replace(" ", "_")))
    finally:
        leaks.end()
    with pytest.raises(Grown, match=f"{what} grow by"):
        watch.check(bounds)


def test_turns_that_become_slower_are_found(folder):
    with Watch(folder) as watch:
        for turn in range(1, 41):
            sum(range(100_000 if turn < 25 else 400_000))
            watch.look(turn)
    with pytest.raises(Grown, match="turns become slower"):
        watch.check({}, SLOWER)
